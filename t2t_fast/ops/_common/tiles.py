"""What the Triton kernels of several operators share: tiles of tokens, small matrices, products.

A tile is TOKENS rows of WIDTH columns; WIDTH is a row's length rounded up to what a matrix instruction takes. What is
beyond a tensor's edges is read as zero and never written.
"""

import triton
import triton.language as tl

from ...config import triton_interpreted

INTERPRETED = tl.constexpr(triton_interpreted())
"""The interpreter takes the bits of bfloat16 operands for numbers, and cuts bfloat16 off where a GPU rounds."""


@triton.jit
def _large(x):
    """The bits of float32 that TF32 has."""
    bits = x.to(tl.int32, bitcast=True) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """``acc + a b``; with PRECISION "tf32x3" float32 by three TF32 products, one after the other.

    Triton's own three fetch both parts of both operands at once. Here a barrier keeps the parts apart, and with them
    registers; with APART one parts every product from the next. What is infinite becomes NaN.

    Matrix units cut off what they add, always towards zero, so that a long sum in them drifts. The three start at zero
    therefore, and registers, which round, add them to ``acc``.
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
    """``x`` in float32; of a half type two values at a time from the register that holds both, so that it stays one."""
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
    """``1 / x`` in float32, in one instruction, for x of ordinary size: a division checks its range first."""
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
    """``x`` as a matrix product will see it: in ``DTYPE``, for TF32 rounded to its 10 bits (the hardware cuts them)."""
    if tl.float32 == DTYPE and PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return narrowed(x, DTYPE)


@triton.jit
def inside(there, columns, width, EVEN: tl.constexpr):
    """Mask of a tile; where its rows are full (EVEN), of its tokens alone, so that they are read in whole vectors."""
    return there[:, None] if EVEN else there[:, None] & (columns < width)[None, :]


@triton.jit
def load(x, start, rows, there, columns, width, token_stride, column_stride, EVEN: tl.constexpr):
    """A tile from token ``start`` on, zero where there is none; offsets in it fit 32 bits (triton_runtime.readable)."""
    x += start.to(tl.int64) * token_stride
    offsets = rows[:, None] * token_stride + columns[None, :] * column_stride
    return tl.load(x + offsets, mask=inside(there, columns, width, EVEN), other=0.0)


@triton.jit
def store(x, value, start, rows, there, columns, width, token_stride, column_stride, EVEN: tl.constexpr):
    """The tile that :func:`load` would read."""
    x += start.to(tl.int64) * token_stride
    offsets = rows[:, None] * token_stride + columns[None, :] * column_stride
    tl.store(x + offsets, narrowed(value, x.dtype.element_ty), mask=inside(there, columns, width, EVEN))


@triton.jit
def matrix(pointer, height, width, row_stride, column_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A small matrix in float32, zero beyond its edges."""
    rows, columns = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    there = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=there, other=0.0).to(tl.float32)
