"""The base of the T2T module's layers: fused on tokens or on the soft split of an image, else child by child."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import check_tensor
from ..functional import image_values, soft_split
from ..functional.arguments import IMAGES
from ..ops._common.pixels import PixelNorm
from ..ops._common.spec import Window, square
from ..ops._common.windows import as_image
from . import fusion, remembered

_SINGLE = square(1, 1, 0)


class TokenLayer(nn.Module):
    """A layer whose ``forward`` calls operators on its children's parameters, unless there is an obstacle."""

    _parts: ClassVar[fusion.Checks]

    def obstacle(self) -> str | None:
        """Why this layer runs unfused, or ``None``."""
        return fusion.obstacle(self, self._parts)

    def forward(
        self, x: torch.Tensor, window: Window | None = None, pixel_norm: PixelNorm | None = None
    ) -> torch.Tensor:
        """The layer on tokens, or on the soft split of an image, which is not materialised.

        Args:
            x: tokens (B, T, dim); with ``window`` an image (B, C, H, W), any strides, where ``dim = C * k * k``.
            window: the soft split's :class:`Window`.
            pixel_norm: (mean, std) for an image of uint8 (:func:`soft_split_linear`).

        Returns:
            (B, T, width), T = h*w with ``window``.
        """
        call = None if torch.compiler.is_compiling() else self.dependencies(x, window, pixel_norm)
        found = None if call is None else remembered.entry(self, *call)
        if found is None or not found.passed:
            check_tensor(type(self).__name__, "x", x, ndim=3 if window is None else 4, dtypes=IMAGES)
        if not remembered.passes(found, self.obstacle):
            if window is not None:
                x = soft_split(image_values(x, pixel_norm, fusion.values_dtype(self)), *window)
            return self._unfused(x)
        fused = partial(self._on_image, x, window, pixel_norm, found)
        out: torch.Tensor = fused() if call is None else remembered.forward(found, fused, call[0])
        return out

    def _on_image(
        self, x: torch.Tensor, window: Window | None, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        """The layer on an image; tokens are one whose windows are single pixels."""
        if window is None:
            x, window = as_image(x, (1, x.shape[1])), _SINGLE
        return self._fused(x, window, pixel_norm, found)

    def dependencies(
        self, x: Any, window: Window | None, pixel_norm: PixelNorm | None
    ) -> remembered.Dependencies | None:
        """What a call depends on, for :func:`remembered.entry`; ``None``: the children must be called."""
        raise NotImplementedError

    def _fused(
        self, x: torch.Tensor, window: Window, pixel_norm: PixelNorm | None, found: remembered.Entry | None
    ) -> torch.Tensor:
        """The layer by its operators."""
        raise NotImplementedError

    def _unfused(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on tokens, child by child, as upstream."""
        raise NotImplementedError
