"""Plain patch tokenisation, ViT's front end."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import check_pair, check_tensor
from ..modules.options import check_options
from ..ops._common.spec import square


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution: (B, C, H, W) -> (B, H/P * W/P, embed_dim).

    Upstream: ``PatchEmbed`` of ``models/vit.py``. Any H and W that ``patch_size`` divides.

    Args:
        img_size: int or (H, W); patch_size: side of the square patch.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768
    ):
        super().__init__()
        check_options("PatchEmbed", locals())
        self.img_size = check_pair("PatchEmbed", "img_size", img_size, minimum=1)
        self.patch_size = patch_size
        self.windows = (square(patch_size, patch_size, 0),)
        self.grid(*self.img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Token grid (h, w) of an image of ``img_size``."""
        return self.grid(*self.img_size)

    @property
    def num_patches(self) -> int:
        """Tokens of an image of ``img_size``."""
        return self.grid_size[0] * self.grid_size[1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an image of ``height`` x ``width``.

        Raises:
            ValueError: the patch does not divide the image.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"PatchEmbed: patch_size {self.patch_size} must divide the image, got height {height}, width {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, h*w, embed_dim)."""
        check_tensor("PatchEmbed", "x", x, ndim=4)
        self.grid(*x.shape[2:])
        return self.proj(x).flatten(2).transpose(1, 2)

    def forward_with_grid(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self.forward(x), self.grid(*x.shape[2:])
