"""The Transformer layer of the T2T module, with upstream's parameter names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..functional import soft_split_linear, token_mlp
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Window
from . import fusion, remembered
from .attention import attend, heads, merged
from .block import FusedMlp
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

    def mix(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention on packed (B, T, 3 * in_dim): its output and the values v, (B, T, in_dim) each."""
        q, k, v = heads(qkv, self.num_heads)
        return merged(attend(q, k, v, self.scale, self.attn_drop)), merged(v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dim) -> (B, T, in_dim)."""
        y, v = self.mix(self.qkv(x))
        return v + self.proj_drop(self.proj(y))


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


_PARTS = fusion.Checks(
    {
        "norm1": fusion.layer_norm,
        "attn": fusion.container(TokenAttention, "qkv", "attn_drop", "proj", "proj_drop"),
        "attn.qkv": fusion.linear,
        "attn.proj": fusion.linear,
        "attn.proj_drop": fusion.dropout,
        "drop_path": fusion.no_drop_path,
        "norm2": fusion.layer_norm,
        "mlp": fusion.container(Mlp, "fc1", "act", "fc2", "drop"),
        "mlp.fc1": fusion.linear,
        "mlp.act": fusion.gelu,
        "mlp.fc2": fusion.linear,
        "mlp.drop": fusion.no_dropout,
    }
)


class TokenTransformer(TokenLayer):
    """LayerNorm and attention (no skip around them: the width changes), then LayerNorm and MLP with a skip.

    Upstream: ``Token_transformer`` (``models/token_transformer.py``); parameters have its names and shapes, and the
    arguments have the same meaning. Dropout in the MLP and stochastic depth have no fused form.
    """

    mlp_name = "mlp"
    """Name of the child with ``fc1``, ``act`` and ``fc2``; subclasses whose checkpoints use another override it."""

    _parts = _PARTS

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
        parts = fusion.children(self, self._parts)
        drop = getattr(self.attn, "attn_drop", None)
        if parts is None or (drop is not None and fusion.dropout(drop) is not None):
            return None
        attn, rates = parts["attn"], (0.0 if drop is None else fusion.rate(drop), self._projection_dropout())
        names = ("attn.qkv", "norm1", "attn.proj", "norm2", f"{self.mlp_name}.fc1", f"{self.mlp_name}.fc2")
        tensors = (x, *[tensor for name in names for tensor in fusion.weights(parts[name])])
        numbers = parts["norm1"].eps, parts["norm2"].eps, attn.num_heads, attn.scale, *rates
        return tensors, (window, *numbers, *remembered.constants_of(pixel_norm))

    def _fused(
        self, x: torch.Tensor, window: Window, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        kernel, stride, padding = window
        qkv, mlp = self.attn.qkv, getattr(self, self.mlp_name)
        tokens = remembered.run(
            found,
            soft_split_linear,
            (x, qkv.weight, qkv.bias, self.norm1.weight, self.norm1.bias),
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            norm_eps=self.norm1.eps,
            pixel_norm=pixel_norm,
        )
        y, v = self.attn.mix(tokens)
        parameters = [fusion.weights(each) for each in (self.attn.proj, self.norm2, mlp.fc1, mlp.fc2)]
        out: torch.Tensor = remembered.run(
            found,
            token_mlp,
            (y, v, *(tensor for pair in parameters for tensor in pair)),
            norm_eps=self.norm2.eps,
            proj_drop=self._projection_dropout(),
        )
        return out

    def _projection_dropout(self) -> float:
        return fusion.rate(self.attn.proj_drop)

    def _unfused(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attn(self.norm1(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))
