"""How windows lie in memory, and the resulting order of columns, for kernels and packed weights."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ..._common.spec import Window

NARROW = 64
"""Outputs of one product; packed matrices are padded to a multiple of it."""

_BLOCKS = (64, 32, 16)
_WASTE = 2
"""Limit on the pixels of a window's cells, as a multiple of the window's pixels."""


@dataclass(frozen=True)
class Layout:
    """The windows' memory layout, a compile-time constant of the kernels.

    Attributes:
        channels: values of a tap, contiguous unless ``gather``; window: the window over such taps.
        cell: ``None``, or for windows over cells of an image, made by ``cells_kernel``: height, width and channels of a
            cell, height and width of the image's window.
        gather: whether values are read one by one.
    """

    channels: int
    window: Window
    cell: tuple | None
    gather: bool

    @property
    def columns(self):
        """Columns of a window, including padding columns."""
        return self.channels * self.window.taps

    @property
    def values(self):
        """K, the values of a window."""
        if self.cell is None:
            return self.columns
        _, _, channels, kh, kw = self.cell
        return channels * kh * kw

    @property
    def cell_size(self):
        """Values of a cell."""
        height, width, channels = self.cell[:3]
        return height * width * channels

    def block(self, wanted):
        """Columns of a product: at most ``wanted``, and within a tap unless values are gathered."""
        return next(size for size in _BLOCKS if size <= wanted and (self.gather or self.channels % size == 0))


@lru_cache(maxsize=256)
def layout(channels, window):
    """The layout of windows over an image with ``channels`` channels.

    Blocks of 16 channels or more are contiguous in channels-last tokens. For an image with few channels, the pixels of
    one stride step form a cell, which is contiguous and shared by neighbouring windows: a window of 7 x 7 pixels at
    stride 4 is one of 2 x 2 cells, with zeros in the weight for pixels outside the window.
    """
    if channels % _BLOCKS[-1] == 0:
        return Layout(channels, window, None, False)
    (kh, kw), (high, wide), _ = window
    size, down, across = high * wide * channels, -(-kh // high), -(-kw // wide)
    if size % _BLOCKS[-1] == 0 and down * high * across * wide <= _WASTE * window.taps:
        # neighbouring cells are contiguous: a tap is a row of cells
        row = Window((down, 1), (1, 1), (0, 0))
        return Layout(across * size, row, (high, wide, channels, kh, kw), False)
    return Layout(channels, window, None, True)


class Operands(NamedTuple):
    """What the kernels read of a call's parameters, as tensors (or their shapes); what they do not need is ``None``.

    Attributes:
        weight: in the operands' dtype, LayerNorm folded in: (columns, outputs), or for the image's gradient (taps,
            outputs, channels). Outputs are padded to a multiple of NARROW, columns to whole blocks.
        offset: ``b'`` of docs/math.md, section 1, (outputs) in float32; without LayerNorm the bias.
        row_sums: ``Wg 1`` there, likewise; ``None`` without LayerNorm.
        used: (columns) in float32, 1 for each column that is one of a window's K values, else 0; ``None`` if all
            columns are, or if the others are 0 anyway.
        scale, shift: of the values of an image of bytes, (columns) in float32.
    """

    weight: Any
    offset: Any
    row_sums: Any
    used: Any
    scale: Any
    shift: Any

    def present(self):
        """The fields that are not ``None``, in order."""
        return [field for field in self if field is not None]

    def filled(self, values):
        """These operands with the fields of :meth:`present` replaced by ``values``, in order."""
        values = iter(values)
        return Operands(*(None if field is None else next(values) for field in self))


@lru_cache(maxsize=256)
def operand_shapes(outputs, values, norm, channels, window, as_bytes, turned):
    """The shapes of the :class:`Operands` of a weight (outputs, values).

    turned: of those for the image's gradient; else of those for the forward kernels.
    """
    width = outputs + -outputs % NARROW
    if turned:
        block = next((size for size in reversed(_BLOCKS) if size >= channels), _BLOCKS[0])
        return Operands((values // channels, width, channels + -channels % block), (width,), None, None, None, None)
    found = layout(channels, window)
    columns = found.columns + -found.columns % _BLOCKS[0] if found.gather else found.columns
    used = found.columns != values or (found.gather and norm)
    pixels = (columns,) if as_bytes else None
    return Operands(
        (columns, width), (width,), (width,) if norm else None, (columns,) if used else None, pixels, pixels
    )
