"""The Performer layer of the T2T module, with upstream's parameter names."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..functional import performer_attention, performer_layer
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Window
from . import fusion, remembered
from .options import check_options, deprecated_memory
from .token_layer import TokenLayer

_PARTS = fusion.Checks(
    {
        "norm1": fusion.layer_norm,
        "kqv": fusion.linear,
        "dp": fusion.dropout,
        "proj": fusion.linear,
        "norm2": fusion.layer_norm,
        "mlp": fusion.holder(nn.Sequential, ("0", "1", "2", "3")),
        "mlp.0": fusion.linear,
        "mlp.1": fusion.gelu,
        "mlp.2": fusion.linear,
        "mlp.3": fusion.dropout,
    }
)
_WEIGHTS = ("kqv", "norm1", "proj", "norm2", "mlp.0", "mlp.2")


class TokenPerformer(TokenLayer):
    """LayerNorm, Performer attention with a skip through ``v``, then LayerNorm and MLP with a skip.

    Upstream: ``Token_performer`` (``models/token_performer.py``); parameters have its names and shapes.

    Args:
        dim: width of the incoming tokens.
        in_dim: width of the outgoing tokens, per head.
        head_cnt: factor of the token width, ``in_dim * head_cnt``; heads are not split.
        kernel_ratio: random features per channel, ``m = int(in_dim * head_cnt * kernel_ratio)``.
        dp1, dp2: dropout after the projection and after the MLP in training mode; both 0.1 as upstream.
    """

    _parts = _PARTS

    recompute = False
    """Whether backward recomputes k, q and v (see :func:`performer_layer`); no effect in an unfused layer."""

    memory = deprecated_memory("TokenPerformer")

    def __init__(
        self, dim: int, in_dim: int, head_cnt: int = 1, kernel_ratio: float = 0.5, dp1: float = 0.1, dp2: float = 0.1
    ) -> None:
        super().__init__()
        check_options("TokenPerformer", locals())
        self.emb = in_dim * head_cnt
        self.head_cnt = head_cnt
        self.m = int(self.emb * kernel_ratio)
        if self.m < 1:
            raise ValueError(
                f"TokenPerformer: int(in_dim * head_cnt * kernel_ratio) must be at least 1, got in_dim={in_dim}, "
                f"head_cnt={head_cnt}, kernel_ratio={kernel_ratio}"
            )
        self.epsilon = 1e-8
        self.kqv = nn.Linear(dim, 3 * self.emb)
        self.dp = nn.Dropout(dp1)
        self.proj = nn.Linear(self.emb, self.emb)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(self.emb)
        self.mlp = nn.Sequential(
            nn.Linear(self.emb, self.emb), nn.GELU(), nn.Linear(self.emb, self.emb), nn.Dropout(dp2)
        )
        directions = nn.init.orthogonal_(torch.randn(self.m, self.emb))
        self.w = nn.Parameter(directions * math.sqrt(self.m), requires_grad=False)

    def dependencies(
        self, x: Any, window: Window | None, pixel_norm: PixelNorm | None
    ) -> remembered.Dependencies | None:
        parts = fusion.children(self, _PARTS)
        if parts is None:
            return None
        numbers = (parts["norm1"].eps, self.epsilon, parts["norm2"].eps, *self._rates(), self.recompute)
        return self._tensors(parts, x), (window, *numbers, *remembered.constants_of(pixel_norm))

    def _tensors(self, parts: Mapping[str, Any], x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The tensors of a call, in the order of ``performer_layer.tensors``."""
        kqv, norm1, proj, norm2, fc1, fc2 = [fusion.weights(parts[name]) for name in _WEIGHTS]
        return (x, *kqv, *norm1, self.w, *proj, *norm2, *fc1, *fc2)

    def _rates(self) -> tuple[float, float]:
        mlp: Any = self.mlp
        return fusion.rate(self.dp), fusion.rate(mlp[3])

    def _fused(
        self, x: torch.Tensor, window: Window, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        mlp: Any = self.mlp
        parts = {"kqv": self.kqv, "norm1": self.norm1, "proj": self.proj, "norm2": self.norm2}
        parts |= {"mlp.0": mlp[0], "mlp.2": mlp[2]}
        proj_drop, mlp_drop = self._rates()
        kernel, stride, padding = window
        out: torch.Tensor = remembered.run(
            found,
            performer_layer,
            self._tensors(parts, x),
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            norm1_eps=self.norm1.eps,
            eps=self.epsilon,
            norm2_eps=self.norm2.eps,
            proj_drop=proj_drop,
            mlp_drop=mlp_drop,
            pixel_norm=pixel_norm,
            recompute=self.recompute,
        )
        return out

    def _unfused(self, x: torch.Tensor) -> torch.Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = performer_attention(q, k, v, self.w, self.epsilon)
        x = v + self.dp(self.proj(y))
        return x + self.mlp(self.norm2(x))
