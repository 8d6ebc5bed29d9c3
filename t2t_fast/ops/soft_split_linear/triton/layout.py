"""How windows lie in memory, and the resulting order of columns, for kernels and packed weights."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

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

    def pack(self, weight):
        """Pack (O, K) in upstream's column order as (columns, O padded to a multiple of NARROW)."""
        outputs = weight.shape[0]
        columns = self.columns + -self.columns % _BLOCKS[0] if self.gather else self.columns
        if self.cell is None:
            packed = weight.reshape(outputs, self.channels, -1).permute(2, 1, 0)
        else:
            packed = F.pad(weight.reshape(outputs, *self._taps()), self._margin()).reshape(outputs, *self._cells())
            packed = packed.permute(2, 4, 1, 3, 5, 0)
        packed = packed.reshape(-1, outputs)
        return _padded(packed, -outputs % NARROW, columns - packed.shape[0])

    def spread(self, row):
        """Pack (K) in upstream's column order as (columns)."""
        return self.pack(row.unsqueeze(0))[:, 0].contiguous()

    def unpack(self, packed, outputs):
        """The (O, K) matrix of a packed one, (columns or more, O or more); the inverse of :meth:`pack`."""
        packed = packed[: self.columns, :outputs]
        if self.cell is None:
            return packed.view(-1, self.channels, outputs).permute(2, 1, 0).reshape(outputs, -1)
        channels, down, high, right, wide = self._cells()
        found = packed.reshape(down, right, channels, high, wide, outputs).permute(5, 2, 0, 3, 1, 4)
        _, kh, kw = self._taps()
        return found.reshape(outputs, channels, down * high, right * wide)[..., :kh, :kw].reshape(outputs, -1)

    def _taps(self):
        _, _, channels, kh, kw = self.cell
        return channels, kh, kw

    def _cells(self):
        high, wide, channels, kh, kw = self.cell
        return channels, -(-kh // high), high, -(-kw // wide), wide

    def _margin(self):
        high, wide, _, kh, kw = self.cell
        return 0, -kw % wide, 0, -kh % high


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


def _padded(x, columns, rows):
    """``x`` padded with columns and rows, contiguous.

    ``contiguous`` is called before the padding: an empty padding keeps the strides, which a traced graph cannot know.
    """
    return F.pad(x.contiguous(), (0, columns, 0, rows))


def pack_taps(weight, channels):
    """Pack (O, K) in upstream's column order as (taps, O padded to NARROW, channels padded to blocks)."""
    outputs = weight.shape[0]
    packed = weight.reshape(outputs, channels, -1).permute(2, 0, 1)
    block = next((size for size in reversed(_BLOCKS) if size >= channels), _BLOCKS[0])
    return _padded(packed, -channels % block, -outputs % NARROW)


def pad_outputs(vector):
    """(O) in float32, padded to a multiple of NARROW."""
    return F.pad(vector.to(torch.float32), (0, -vector.shape[0] % NARROW))
