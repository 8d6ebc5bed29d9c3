"""Where windows lie in memory, and the order of columns that follows: what kernels and packed weights agree on."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..._common.spec import Window

NARROW = 64
"""Outputs of one product; packed matrices have whole multiples."""

_BLOCKS = (64, 32, 16)
_WASTE = 2
"""Cells may have that many times the window's pixels."""


@dataclass(frozen=True)
class Layout:
    """Windows as the kernels see them; a constant of theirs.

    Attributes:
        channels: values of a tap, a run of memory unless ``gather``; window: that slides over such taps.
        cell: ``None``, or for windows over cells of an image, made by ``cells_kernel``: height, width and channels of a
            cell, height and width of the image's window.
        gather: values are read one by one.
    """

    channels: int
    window: Window
    cell: tuple | None
    gather: bool

    @property
    def columns(self):
        """Columns of a window, with those that are none of its values."""
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
        """(O, K) with upstream's columns, as (columns, O up to whole multiples of NARROW)."""
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
        """(K) with upstream's columns, as (columns)."""
        return self.pack(row.unsqueeze(0))[:, 0].contiguous()

    def unpack(self, packed, outputs):
        """The (O, K) matrix in (columns or more, O or more) as :meth:`pack` orders it."""
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
    """How windows over an image of some channels are read.

    Blocks of 16 channels or more are runs of memory in channels-last tokens. Of an image with few channels, the pixels
    of one stride's step make a cell, of which neighbouring windows share most: cells are runs of memory too, and a
    window of 7 x 7 pixels at stride 4 is one of 2 x 2 cells, with zeros in the weight for what is none of its pixels.
    """
    if channels % _BLOCKS[-1] == 0:
        return Layout(channels, window, None, False)
    (kh, kw), (high, wide), _ = window
    size, down, across = high * wide * channels, -(-kh // high), -(-kw // wide)
    if size % _BLOCKS[-1] == 0 and down * high * across * wide <= _WASTE * window.taps:
        # cells side by side are one run of memory: a tap is a row of them
        row = Window((down, 1), (1, 1), (0, 0))
        return Layout(across * size, row, (high, wide, channels, kh, kw), False)
    return Layout(channels, window, None, True)


def _padded(x, columns, rows):
    """``x`` with more columns and rows, contiguous.

    Made so before the padding, not after it: a padding by nothing keeps strides, and a traced graph does not know that.
    """
    return F.pad(x.contiguous(), (0, columns, 0, rows))


def pack_taps(weight, channels):
    """(O, K) with upstream's columns as (taps, O up to NARROW's multiples, channels up to whole blocks)."""
    outputs = weight.shape[0]
    packed = weight.reshape(outputs, channels, -1).permute(2, 0, 1)
    block = next((size for size in reversed(_BLOCKS) if size >= channels), _BLOCKS[0])
    return _padded(packed, -channels % block, -outputs % NARROW)


def pad_outputs(vector):
    """(O) in float32, up to NARROW's multiples."""
    return F.pad(vector.to(torch.float32), (0, -vector.shape[0] % NARROW))
