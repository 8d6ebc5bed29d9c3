"""Soft split and soft composition as modules; they have no parameters."""

from torch import nn

from ..functional import soft_composition, soft_split, window


class SoftSplit(nn.Module):
    """Overlapping windows of an image as tokens (T2T-ViT paper, section 3.1).

    Args:
        kernel_size, stride, padding: int or (height, width) pair.
    """

    def __init__(self, kernel_size, stride=1, padding=0):
        super().__init__()
        self.window = window(kernel_size, stride, padding, function="SoftSplit")

    def forward(self, x, grid=None):
        """(B, C, H, W), or tokens (B, H*W, C) with ``grid=(H, W)`` -> tokens (B, h*w, C*k*k)."""
        return soft_split(x, *self.window, grid=grid)

    def forward_with_grid(self, x, grid=None):
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self(x, grid), self.window.grid(*(grid or x.shape[2:]))

    def extra_repr(self):
        return str(self.window)


class SoftComposition(nn.Module):
    """Overlapping tokens added up into an image; the adjoint of :class:`SoftSplit`.

    Args:
        output_size: int or (H, W) of the image.
        kernel_size, stride, padding: int or (height, width) pair.
    """

    def __init__(self, output_size, kernel_size, stride=1, padding=0):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.window = window(kernel_size, stride, padding, function="SoftComposition")

    def forward(self, tokens):
        """(B, h*w, C*k*k) -> (B, C, H, W)."""
        return soft_composition(tokens, self.output_size, *self.window)

    def extra_repr(self):
        return f"{self.output_size[0]}x{self.output_size[1]}, {self.window}"


class Unfold(nn.Module):
    """Drop-in for ``nn.Unfold`` (dilation 1) whose transposed output is contiguous tokens.

    Every T2T model transposes what ``nn.Unfold`` returns; here that transpose undoes a view instead of making one.
    """

    def __init__(self, kernel_size, stride=1, padding=0):
        super().__init__()
        self.window = window(kernel_size, stride, padding, function="Unfold")

    def forward(self, x):
        """(B, C, H, W) -> (B, C*k*k, h*w)."""
        return soft_split(x, *self.window).transpose(1, 2)

    def extra_repr(self):
        return str(self.window)
