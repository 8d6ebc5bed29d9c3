"""The tokens-to-token front end as timm's patch embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import check_pair
from ..modules import T2TModule
from ..ops._common.spec import T2T_WINDOWS, Window, grid_after
from ..ops._common.windows import as_image

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


class T2TEmbed(nn.Module):
    """Drop-in for timm's ``PatchEmbed``: a :class:`T2TModule` that any timm ViT takes as ``embed_layer``.

        VisionTransformer(embed_layer=partial(T2TEmbed, tokens_type="performer"), ...)

    (B, in_chans, H, W) -> (B, N, embed_dim), or the layout of ``output_fmt``. Unlike timm's, it accepts H and W
    that are not multiples of the patch size; the grid is rounded up (:meth:`dynamic_feat_size`).

    Args:
        img_size: int, (H, W) or ``None`` (no size is checked, :attr:`grid_size` and :attr:`num_patches` are ``None``).
        patch_size: what the strides of ``windows`` multiply to, 16 by default; another one is an error.
        norm_layer: made with ``embed_dim`` and applied to the output, or ``None``.
        flatten: return (B, N, embed_dim); ``False`` returns (B, embed_dim, h, w).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC"; wins over ``flatten``. timm asks for "NHWC" with
            ``dynamic_img_size``.
        bias: whether the last projection has one.
        strict_img_size: refuse images of another size than ``img_size``.
        dynamic_img_pad: zero-pad images at the bottom and right to multiples of the patch size, as timm's.
        device, dtype: of the parameters.
        tokens_type, token_dim, windows: as :class:`T2TModule`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        tokens_type: str = "performer",
        token_dim: int = 64,
        windows: Sequence[Window] = T2T_WINDOWS,
    ) -> None:
        super().__init__()
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"T2TEmbed: output_fmt must be one of {', '.join(FORMATS)} or None, got {output_fmt!r}")
        tokens = T2TModule(224 if img_size is None else img_size, tokens_type, in_chans, embed_dim, token_dim, windows)
        self.tokens_to_token = tokens
        self.windows = tokens.windows
        if not bias:
            tokens.project.register_parameter("bias", None)
        tokens.to(device=device, dtype=dtype)
        height, width = (prod(window.stride[axis] for window in self.windows) for axis in (0, 1))
        self.patch_size = (height, width)
        self._check_patch_size(patch_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else str(getattr(output_fmt, "value", output_fmt))
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim).to(device=device, dtype=dtype)
        self.img_size: tuple[int, int] | None = None
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        if img_size is not None:
            self.set_input_size(img_size)

    def _check_patch_size(self, patch_size: Any) -> None:
        if check_pair("T2TEmbed", "patch_size", patch_size, minimum=1) != self.patch_size:
            height, width = self.patch_size
            expected = height if height == width else self.patch_size
            raise ValueError(
                f"T2TEmbed: patch_size must be {expected}, the product of the soft splits' strides, got {patch_size!r}"
            )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size; ``patch_size`` cannot change, and another one is a ``ValueError``."""
        if patch_size is not None:
            self._check_patch_size(patch_size)
        if img_size is not None:
            self.img_size = check_pair("T2TEmbed", "img_size", img_size, minimum=1)
            self.tokens_to_token.img_size = self.img_size
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token: the larger of the two axes, or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of an image of (H, W), padding included."""
        height, width = img_size
        pad_height, pad_width = self._padding(height, width)
        return grid_after(self.windows, height + pad_height, width + pad_width)

    def _padding(self, height: int, width: int) -> tuple[int, int]:
        return (-height % self.patch_size[0], -width % self.patch_size[1]) if self.dynamic_img_pad else (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, N, embed_dim), or the layout of ``output_fmt``."""
        height, width = x.shape[2:]
        if self.strict_img_size and self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"T2TEmbed: with strict_img_size the image must be {self.img_size[0]} x {self.img_size[1]}, "
                f"got {height} x {width}"
            )
        pad_height, pad_width = self._padding(height, width)
        if pad_height or pad_width:
            x = F.pad(x, (0, pad_width, 0, pad_height))
        grid = grid_after(self.windows, *x.shape[2:])
        x = self.tokens_to_token(x)
        if not self.flatten:
            x = _reformat(x, grid, self.output_fmt)
        return self.norm(x)


def _reformat(tokens: torch.Tensor, grid: tuple[int, int], output_fmt: str) -> torch.Tensor:
    """Tokens (B, h*w, C) in another layout."""
    if output_fmt == "NHWC":
        return as_image(tokens, grid).permute(0, 2, 3, 1)
    if output_fmt == "NLC":
        return tokens
    return tokens.transpose(1, 2) if output_fmt == "NCL" else as_image(tokens, grid)
