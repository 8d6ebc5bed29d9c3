"""Triton functions shared by several operators: tiles of tokens, small matrices, products.

A tile has TOKENS rows of WIDTH columns; WIDTH is a row's length rounded up to a size that matrix instructions support.
Elements outside a tensor are read as zero and never written.
"""

import triton
import triton.language as tl

from ...config import triton_interpreted

INTERPRETED = tl.constexpr(triton_interpreted())
"""The interpreter multiplies the raw bits of bfloat16 operands, and truncates to bfloat16 where a GPU rounds."""

ONES = tl.constexpr(16)
"""Columns of a product with ones: the minimum of a matrix instruction."""


@triton.jit
def _large(x):
    """float32 truncated to TF32."""
    bits = x.to(tl.int32, bitcast=True) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """``acc + a b``; with PRECISION "tf32x3", float32 products are three TF32 products in sequence.

    Triton's own "tf32x3" loads both parts of both operands at once. Here a barrier separates the parts, which saves
    registers; APART adds one between all products. Infinite values become NaN.

    Matrix units truncate their sums towards zero, so that a long accumulation drifts. Therefore the three products
    start at zero, and their sum is added to ``acc`` in registers, with rounding.
    """
    if PRECISION == "tf32x3" and a.dtype == tl.float32:
        large_a, large_b = _large(a), _large(b)
        if APART:
            part = tl.dot(large_a, b - large_b, input_precision="tf32")
            tl.debug_barrier()
            part = tl.dot(a - large_a, large_b, part, input_precision="tf32")
            tl.debug_barrier()
            part = tl.dot(large_a, large_b, part, input_precision="tf32")
            tl.debug_barrier()
        else:
            part = tl.dot(a - large_a, large_b, input_precision="tf32")
            tl.debug_barrier()
            part = tl.dot(large_a, b - large_b, part, input_precision="tf32")
            part = tl.dot(large_a, large_b, part, input_precision="tf32")
        acc = part if acc is None else acc + part
    else:
        if INTERPRETED and a.dtype == tl.bfloat16:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def widened(x):
    """``x`` in float32; a half type is converted two values at a time from the register that holds both."""
    if INTERPRETED or not (x.dtype == tl.bfloat16 or x.dtype == tl.float16):
        x = x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        x = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [x],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    return x


@triton.jit
def inverse(x):
    """``1 / x`` in float32, in one instruction without the range checks of a division; for x of moderate size."""
    if INTERPRETED:
        x = 1.0 / x
    else:
        x = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """``x`` in ``DTYPE``, rounded to the nearest."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """``x`` as the operand of a matrix product: in ``DTYPE``; for TF32 rounded to 10 bits, where the hardware
    truncates.
    """
    if tl.float32 == DTYPE and PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return narrowed(x, DTYPE)


@triton.jit
def no_sum(SIZE: tl.constexpr, DTYPE: tl.constexpr, TURNED: tl.constexpr):
    """The initial value of :func:`summed`."""
    return tl.zeros([SIZE] if tl.float32 == DTYPE else [SIZE, ONES] if TURNED else [ONES, SIZE], tl.float32)


@triton.jit
def summed(x, total, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` plus the column sums of a tile; for a half type by a product with ones, which needs no reduction.

    TURNED: the product's first operand is the transposed tile, which suits wgmma; else its second operand is the tile.
    """
    if x.dtype == tl.float32:
        total += tl.sum(x, 0)
    elif TURNED:
        total = dot(tl.trans(x), narrowed(tl.full([x.shape[0], ONES], 1.0, tl.float32), x.dtype), total, PRECISION)
    else:
        total = dot(narrowed(tl.full([ONES, x.shape[0]], 1.0, tl.float32), x.dtype), x, total, PRECISION)
    return total


@triton.jit
def sum_of(total, TURNED: tl.constexpr):
    """The sums of :func:`summed`."""
    return tl.sum(total, 1 if TURNED else 0) / ONES if len(total.shape) == 2 else total


@triton.jit
def inside(there, columns, width, EVEN: tl.constexpr):
    """Mask of a tile; with full rows (EVEN) it depends on tokens only, so that loads are vectorised."""
    return there[:, None] if EVEN else there[:, None] & (columns < width)[None, :]


@triton.jit
def load(x, start, rows, there, columns, width, token_stride, column_stride, EVEN: tl.constexpr):
    """Load a tile from token ``start``, zero outside; its offsets fit into 32 bits (triton_runtime.readable)."""
    x += start.to(tl.int64) * token_stride
    offsets = rows[:, None] * token_stride + columns[None, :] * column_stride
    return tl.load(x + offsets, mask=inside(there, columns, width, EVEN), other=0.0)


@triton.jit
def store(x, value, start, rows, there, columns, width, token_stride, column_stride, EVEN: tl.constexpr):
    """Store a tile, with the arguments of :func:`load`."""
    x += start.to(tl.int64) * token_stride
    offsets = rows[:, None] * token_stride + columns[None, :] * column_stride
    tl.store(x + offsets, narrowed(value, x.dtype.element_ty), mask=inside(there, columns, width, EVEN))


@triton.jit
def matrix(pointer, height, width, row_stride, column_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Load a small matrix in float32, zero outside."""
    rows, columns = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    there = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=there, other=0.0).to(tl.float32)


@triton.jit
def row_of(pointer, size, SIZE: tl.constexpr, NONE: tl.constexpr):
    """A parameter of ``size`` values in float32, zero beyond them; filled with NONE if it is absent."""
    if pointer is None:
        row = tl.full([SIZE], NONE, tl.float32)
    else:
        columns = tl.arange(0, SIZE)
        row = tl.load(pointer + columns, mask=columns < size, other=0.0).to(tl.float32)
    return row
