"""The Performer layer of the T2T module, with upstream's parameter names."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import check_tensor
from ..functional import image_values, performer_attention, performer_layer, soft_split
from ..functional.arguments import IMAGES
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Window, square
from ..ops._common.windows import as_image
from . import fusion, remembered
from .options import check_options, deprecated_memory

_SINGLE = square(1, 1, 0)

_PARTS = fusion.Checks(
    {
        "norm1": fusion.layer_norm,
        "kqv": fusion.linear,
        "dp": fusion.dropout,
        "proj": fusion.linear,
        "norm2": fusion.layer_norm,
        "mlp": fusion.container(nn.Sequential, "0", "1", "2", "3"),
        "mlp.0": fusion.linear,
        "mlp.1": fusion.gelu,
        "mlp.2": fusion.linear,
        "mlp.3": fusion.dropout,
    }
)
_WEIGHTS = ("kqv", "norm1", "proj", "norm2", "mlp.0", "mlp.2")


class TokenPerformer(nn.Module):
    """LayerNorm, Performer attention with a skip through ``v``, then LayerNorm and MLP with a skip.

    Upstream: ``Token_performer`` (``models/token_performer.py``); parameters have its names and shapes.

    Args:
        dim: width of the incoming tokens.
        in_dim: width of the outgoing tokens, per head.
        head_cnt: factor of the token width, ``in_dim * head_cnt``; heads are not split.
        kernel_ratio: random features per channel, ``m = int(in_dim * head_cnt * kernel_ratio)``.
        dp1, dp2: dropout after the projection and after the MLP in training mode; both 0.1 as upstream.
    """

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

    def obstacle(self) -> str | None:
        """Why this layer runs unfused, or ``None``."""
        return fusion.obstacle(self, _PARTS)

    def forward(
        self, x: torch.Tensor, window: Window | None = None, pixel_norm: PixelNorm | None = None
    ) -> torch.Tensor:
        """The layer on tokens, or on the soft split of an image, which is not materialised.

        Args:
            x: tokens (B, T, dim); with ``window`` an image (B, C, H, W), any strides, where ``dim = C * k * k``.
            window: the soft split's :class:`Window`.
            pixel_norm: (mean, std) for an image of uint8 (:func:`soft_split_linear`).

        Returns:
            (B, T, in_dim * head_cnt), T = h*w with ``window``.
        """
        call = None if torch.compiler.is_compiling() else self.recalled(x, window, pixel_norm)
        found = None if call is None else remembered.entry(self, *call)
        if found is None or not found.passed:
            check_tensor(type(self).__name__, "x", x, ndim=3 if window is None else 4, dtypes=IMAGES)
        if not remembered.passes(found, self):
            if window is not None:
                x = soft_split(image_values(x, pixel_norm, fusion.values_dtype(self)), *window)
            return self._unfused(x)
        fused = partial(self._fused, x, window, pixel_norm, found)
        out: torch.Tensor = fused() if call is None else remembered.forward(found, fused, call[0])
        return out

    def recalled(self, x: Any, window: Window | None, pixel_norm: PixelNorm | None) -> remembered.Arguments | None:
        """What a call depends on, for :func:`remembered.entry`; ``None``: the children must be called."""
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
        self, x: torch.Tensor, window: Window | None, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        """The layer by its operator."""
        mlp: Any = self.mlp
        parts = {"kqv": self.kqv, "norm1": self.norm1, "proj": self.proj, "norm2": self.norm2}
        parts |= {"mlp.0": mlp[0], "mlp.2": mlp[2]}
        proj_drop, mlp_drop = self._rates()
        kernel, stride, padding = _SINGLE if window is None else window
        out: torch.Tensor = remembered.run(
            found,
            performer_layer,
            self._tensors(parts, as_image(x, (1, x.shape[1])) if window is None else x),
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
        """Call the children one by one, as upstream."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        y = performer_attention(q, k, v, self.w, self.epsilon)
        x = v + self.dp(self.proj(y))
        return x + self.mlp(self.norm2(x))
