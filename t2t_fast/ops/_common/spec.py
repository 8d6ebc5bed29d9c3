"""Sizes of a sliding window, for operators, fakes, checks, tests and benchmarks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Pair: TypeAlias = int | Sequence[int]
"""One number for height and width, or (height, width)."""


class Window(NamedTuple):
    """A soft split's window: (height, width) pairs of kernel, stride and zero padding; dilation is 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def taps(self) -> int:
        """Pixels in the window, k*k for a square one."""
        return self.kernel[0] * self.kernel[1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (h, w) of an image: ``floor((n + 2p - k) / s) + 1`` along each axis."""
        (kh, kw), (sh, sw), (ph, pw) = self
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1

    def remainder(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns at the far border that no window reaches (a convolution's ``output_padding``)."""
        rows, columns = (
            (n + 2 * p - k) % s
            for n, k, s, p in zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        )
        return rows, columns

    def __str__(self) -> str:
        def short(pair: tuple[int, int]) -> str:
            return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

        return f"k{short(self.kernel)} s{short(self.stride)} p{short(self.padding)}"


def square(kernel: int, stride: int, padding: int) -> Window:
    """A square window."""
    return Window((kernel, kernel), (stride, stride), (padding, padding))


T2T_WINDOWS = (square(7, 4, 2), square(3, 2, 1), square(3, 2, 1))
"""The three soft splits of T2T-ViT (paper, section 3.1)."""


def grid_after(windows: Iterable[Window], height: int, width: int) -> tuple[int, int]:
    """Token grid (h, w) of an image after several soft splits in sequence."""
    for window in windows:
        height, width = window.grid(height, width)
    return height, width
