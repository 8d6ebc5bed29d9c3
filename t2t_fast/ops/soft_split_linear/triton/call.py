"""State shared by the Triton kernels of one call: sizes, launch parameters, constants, and the image."""

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.spec import Window
from . import launch
from .layout import NARROW, Layout, layout

CELLS = 64
"""Cells in a tile of ``cells_kernel``."""


class Image(NamedTuple):
    """An image, or its cells, from which kernels read windows.

    Attributes:
        pointer: the tensor; batch, channel, row, column: strides, in values.
        scale, shift: for an image of bytes u, one float32 value per column: the kernels read ``scale u + shift``; else
            ``None``.
    """

    pointer: torch.Tensor
    batch: int
    channel: int
    row: int
    column: int
    scale: torch.Tensor | None
    shift: torch.Tensor | None


class Folded(NamedTuple):
    """The parameters of a forward kernel (``layout.Operands``)."""

    weight: torch.Tensor
    used: torch.Tensor | None
    row_sums: torch.Tensor | None
    offset: torch.Tensor


class Sizes(NamedTuple):
    """What follows from the shape of an image and its windows."""

    layout: Layout
    grid: tuple
    length: int
    """Tokens of an image."""
    tokens: int
    """Tokens of all images."""
    covered: tuple
    """Height and width of the part of the image that windows cover; pixels outside it are in no cell."""
    cells: tuple
    """Rows and columns of an image's cells, and the cells of all images; empty without cells."""


@lru_cache(maxsize=1024)
def sizes(shape, window):
    """The :class:`Sizes` of an image of ``shape`` (B, C, H, W)."""
    found, grid = layout(shape[1], window), window.grid(*shape[2:])
    length = grid[0] * grid[1]
    covered = tuple(min(n, (steps - 1) * s + k - p) for n, steps, k, s, p in zip(shape[2:], grid, *window, strict=True))
    cells = ()
    if found.cell is not None:
        rows = grid[0] + found.window.kernel[0] - 1
        columns = grid[1] + found.channels // found.cell_size - 1
        cells = rows, columns, shape[0] * rows * columns
    return Sizes(found, grid, length, shape[0] * length, covered, cells)


class Call:
    """State shared by the kernels of one call.

    Args:
        x: (B, C, H, W), any strides; dtype: of the operands of products; window, outputs: those of the call.
        pixels: scale and shift of every column (``layout.Operands``), or ``None``.
    """

    def __init__(self, x, dtype, window, outputs, pixels=None):
        self.x, self.dtype, self.outputs, self.pixels = x, dtype, outputs, pixels
        self.window = Window(*(tuple(pair) for pair in window)) if type(window) is not Window else window
        self.sizes = sizes(x.shape, self.window)
        self.layout, self.grid, self.length, self.tokens = self.sizes[:4]

    def parameters(self, name):
        """Launch parameters of a pass; those of the forward pass also depend on the number of tokens."""
        device = self.x.device
        section = runtime.section(device, self.tokens) if name == "forward" else runtime.architecture(device)
        return launch.TABLE.chosen(name, section, self.dtype, self.layout.channels, self.outputs)

    def constants(self, parameters):
        """Compile-time constants shared by several kernels."""
        return {"NARROW": NARROW, "EVEN": self.outputs % NARROW == 0, **self.products(parameters)}

    def products(self, parameters):
        """Compile-time constants of the products, and launch options."""
        tf32 = self.dtype == torch.float32 and runtime.allows_tf32()
        return {**products(self.dtype, tf32), "num_warps": parameters["warps"], "num_stages": parameters["stages"]}

    def image(self):
        """The :class:`Image` from which the kernels read windows."""
        x = self.x
        if self.layout.cell is not None:
            x, strides = self._cells()
        else:
            if not self.layout.gather and x.stride(1) != 1:
                x = x.contiguous(memory_format=torch.channels_last)
            strides = x.stride()
        return Image(x, *strides, *(self.pixels or (None, None)))

    def _cells(self):
        """Cells of the image, and strides of the windows over them: a tap is a contiguous row of cells.

        Bytes are converted to the operands' dtype without normalisation, which is exact. Pixels that no window covers
        are left out.
        """
        from . import forward as kernels

        rows, columns, cells = self.sizes.cells
        size = self.layout.cell_size
        dtype = self.x.dtype if self.pixels is None else self.dtype
        out = torch.empty((cells, size), dtype=dtype, device=self.x.device)
        replay.launch(
            kernels.cells_kernel,
            (-(-cells // CELLS),),
            self.x,
            self.x.stride(),
            out,
            *self.sizes.covered,
            rows,
            columns,
            cells,
            CELL=self.layout.cell,
            PADDING=self.window.padding,
            BYTES=self.pixels is not None,
            TILE=CELLS,
            BLOCK=16,
            num_warps=4,
            **runtime.FUSION,
        )
        return out, (rows * columns * size, 1, columns * size, size)

    def singles(self):
        """An empty float32 value for each token, (B, h, w)."""
        return torch.empty((self.x.shape[0], *self.grid), dtype=torch.float32, device=self.x.device)


@cache
def products(dtype, tf32):
    """Constants of products with operands of a dtype."""
    from triton import language as tl

    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {"OPERAND": names[dtype], "PRECISION": "tf32" if tf32 else "tf32x3", **runtime.FUSION}


def divisor(number, most):
    """The largest divisor of ``number`` that is at most ``most``."""
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)
