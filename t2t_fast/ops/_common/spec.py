"""Sizes of a sliding window, computed in one place: operators, fakes, checks, tests and benchmarks ask here."""

from typing import NamedTuple


class Window(NamedTuple):
    """A soft split's window: (height, width) pairs of kernel, stride and zero padding; dilation is 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def taps(self):
        """Pixels in the window, k*k for a square one."""
        return self.kernel[0] * self.kernel[1]

    def grid(self, height, width):
        """Token grid (h, w) of an image: ``floor((n + 2p - k) / s) + 1`` along each axis."""
        return tuple(
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        )

    def remainder(self, height, width):
        """Rows and columns at the far border that no window reaches (a convolution's ``output_padding``)."""
        return tuple(
            (n + 2 * p - k) % s
            for n, k, s, p in zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        )

    def __str__(self):
        def short(pair):
            return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

        return f"k{short(self.kernel)} s{short(self.stride)} p{short(self.padding)}"


def square(kernel, stride, padding):
    """The window of equal sides."""
    return Window((kernel, kernel), (stride, stride), (padding, padding))


T2T_WINDOWS = (square(7, 4, 2), square(3, 2, 1), square(3, 2, 1))
"""The three soft splits of T2T-ViT (paper, section 3.1)."""


def grid_after(windows, height, width):
    """Token grid (h, w) of an image after several soft splits, each on the tokens of the one before."""
    for window in windows:
        height, width = window.grid(height, width)
    return height, width
