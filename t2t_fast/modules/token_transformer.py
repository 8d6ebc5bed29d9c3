"""The Transformer layer of the T2T module, with upstream's parameter names."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn

from ..functional import soft_split_linear, token_mlp
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Window
from . import fusion, remembered
from .attention import attend, heads, merged
from .block import ATTENTION, MLP, FusedMlp, Parts, block_parts, part_checks
from .drop_path import DropPath
from .options import check_options
from .token_layer import TokenLayer


class TokenAttention(nn.Module):
    """Softmax attention from width ``dim`` to width ``in_dim`` with a skip through ``v``.

    Upstream: ``Attention`` of ``models/token_transformer.py``. The default scale is ``(dim // num_heads) ** -0.5``
    with ``dim`` the *unfolded* width (147, 576): checkpoints are trained with it.

    Args:
        dim, in_dim: widths in and out.
        num_heads: must be 1, since upstream's skip through v drops the head axis.
        qkv_bias, qk_scale, attn_drop, proj_drop: as upstream.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        in_dim: int | None = None,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        in_dim = dim if in_dim is None else in_dim
        check_options("TokenAttention", locals())
        if num_heads != 1:
            raise ValueError(
                f"TokenAttention: num_heads must be 1 (upstream's skip through v drops the head axis), got {num_heads}"
            )
        self.num_heads = num_heads
        self.in_dim = in_dim
        self.scale = dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_dim, in_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) -> (B, T, in_dim)."""
        q, k, v = heads(self.qkv(x), self.num_heads, self.qkv)
        y = merged(attend(q, k, v, self.scale, self.attn_drop))
        return merged(v) + self.proj_drop(self.proj(y))


class Mlp(FusedMlp):
    """Linear, activation, dropout, Linear, dropout; upstream's names ``fc1`` and ``fc2``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_options("Mlp", locals())
        hidden_features = in_features if hidden_features is None else hidden_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features if out_features is None else out_features)
        self.drop = nn.Dropout(drop)

    def _unfused(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def _checks(cls: Any) -> fusion.Checks:
    """The table of :func:`fusion.obstacle` for a class of token layers.

    Dropout in the MLP and stochastic depth have no fused form. The dropout of the attention's weights may be any
    module, which is called on them.
    """
    checks, parts = dict(part_checks(cls)), cls.parts
    checks.pop(parts.attn_drop, None)
    inactive = {"hidden_drop": fusion.no_dropout, "drop": fusion.no_dropout}
    inactive |= {"drop_path1": fusion.no_drop_path, "drop_path2": fusion.no_drop_path}
    checks |= {getattr(parts, role): check for role, check in inactive.items() if getattr(parts, role)}
    return fusion.Checks(checks)


class TokenTransformer(TokenLayer):
    """LayerNorm and attention (no skip around them: the width changes), then LayerNorm and MLP with a skip.

    Upstream: ``Token_transformer`` (``models/token_transformer.py``); parameters have its names and shapes, and the
    arguments have the same meaning. With dropout in the MLP or stochastic depth it runs unfused.
    """

    parts: ClassVar[Parts] = block_parts(
        ATTENTION, "attn", MLP, "mlp", norm1="norm1", norm2="norm2", drop_path2="drop_path"
    )
    """Where the parts are; subclasses whose checkpoints have other names override it and :attr:`containers`."""
    containers: ClassVar[tuple[tuple[str, type[nn.Module]], ...]] = (("attn", TokenAttention), ("mlp", Mlp))

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls._parts = _checks(cls)

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_options("TokenTransformer", locals())
        self.norm1: Any = norm_layer(dim)
        self.attn: Any = TokenAttention(
            dim,
            num_heads=num_heads,
            in_dim=in_dim,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2: Any = norm_layer(in_dim)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), in_dim, act_layer=act_layer, drop=drop)

    def dependencies(
        self, x: Any, window: Window | None, pixel_norm: PixelNorm | None
    ) -> remembered.Dependencies | None:
        children = fusion.children(self, self._parts)
        if children is None:
            return None
        drop = self._weights_dropout()
        if isinstance(drop, nn.Module) and fusion.dropout(drop) is not None:
            return None
        parts = self.parts
        paths = parts.qkv, parts.norm1, parts.proj, parts.norm2, parts.fc1, parts.fc2
        tensors = (x, *[tensor for path in paths for tensor in fusion.weights(children[path])])
        rates = fusion.rate(drop) if isinstance(drop, nn.Module) else drop, self._projection_dropout()
        numbers = children[parts.norm1].eps, children[parts.norm2].eps, self._heads(), self._scale(), *rates
        return tensors, (window, *numbers, *remembered.constants_of(pixel_norm))

    def _fused(
        self, x: torch.Tensor, window: Window, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        kernel, stride, padding = window
        parts = self.parts
        roles = parts.norm1, parts.qkv, parts.proj, parts.norm2, parts.fc1, parts.fc2
        norm1, qkv, *others = (attrgetter(path)(self) for path in roles)
        packed = remembered.run(
            found,
            soft_split_linear,
            (x, qkv.weight, qkv.bias, norm1.weight, norm1.bias),
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            norm_eps=norm1.eps,
            pixel_norm=pixel_norm,
        )
        q, k, v = heads(packed, self._heads())
        y = merged(attend(q, k, v, self._scale(), self._weights_dropout()))
        out: torch.Tensor = remembered.run(
            found,
            token_mlp,
            (y, merged(v), *(tensor for each in others for tensor in fusion.weights(each))),
            norm_eps=others[1].eps,
            proj_drop=self._projection_dropout(),
        )
        return out

    def _heads(self) -> int:
        number: int = attrgetter(self.parts.num_heads)(self)
        return number

    def _scale(self) -> float:
        """The factor of q k^T."""
        scale: float = attrgetter(self.parts.scale)(self)
        return scale

    def _weights_dropout(self) -> nn.Module | float:
        """The dropout module of the attention's weights, 0 if there is none."""
        drop: nn.Module | float = attrgetter(self.parts.attn_drop)(self) if self.parts.attn_drop else 0.0
        return drop

    def _projection_dropout(self) -> float:
        return fusion.rate(attrgetter(self.parts.proj_drop)(self)) if self.parts.proj_drop else 0.0

    def _unfused(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


TokenTransformer._parts = _checks(TokenTransformer)
