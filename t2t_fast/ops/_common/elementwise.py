"""Triton functions of single elements that several operators share: GELU, dropout and its random bits (philox.py)."""

import triton
import triton.language as tl

from .philox import PATHS
from .tiles import INTERPRETED, inverse, narrowed, widened

ROUNDS = tl.constexpr(7)
PATHS_STREAM = tl.constexpr(PATHS)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _words(seed, low, high, STREAM: tl.constexpr):
    """The four words of a call of philox.py: its counter is (low, high, STREAM, 0)."""
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero + STREAM, zero, ROUNDS)


@triton.jit
def lanes_of(seed, element, STREAM: tl.constexpr):
    """The 16 random bits of each of some elements (int64), as uint32; a call for each."""
    low, high = (element >> 3 & 0xFFFFFFFF).to(tl.uint32), (element >> 35).to(tl.uint32)
    a, b, c, d = _words(seed, low, high, STREAM)
    lane = (element & 7).to(tl.int32)
    word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
    return tl.where(lane % 2 == 0, word, word >> 16) & 0xFFFF


@triton.jit
def random_lanes(
    seed,
    token,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    OCTETS: tl.constexpr,
    column=0,
    STREAM: tl.constexpr = 0,
):
    """The 16 random bits of each element of a tile from ``token`` and ``column``, as in philox.py: (TOKENS, WIDTH)
    uint32.

    OCTETS: a row's length is a multiple of 8 elements, the output of one call, and so is ``column``.
    """
    rows = tl.arange(0, TOKENS)
    if OCTETS:
        calls = width // 8
        first = token * calls + column // 8
        base = (first & 0xFFFFFFFF).to(tl.uint32)
        columns = tl.arange(0, WIDTH // 8)
        low = base + (rows[:, None] * calls + columns[None, :]).to(tl.uint32)
        high = (first >> 32).to(tl.uint32) + (low < base).to(tl.uint32)
        a, b, c, d = _words(seed, low, high, STREAM)
        words = tl.join(tl.join(a, c), tl.join(b, d))
        lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [TOKENS, WIDTH])
    else:
        columns = tl.arange(0, WIDTH) + column
        lanes = lanes_of(seed, token * width + (rows[:, None] * width + columns[None, :]), STREAM)
    return lanes


@triton.jit
def left_out(lanes, drop):
    """Which elements dropout drops, from their random bits.

    drop: the first value that drops an element (``None``: 0), the number of such values (``None``: no dropout), and the
    scale of kept elements, in float32, so that another probability needs no new kernel.
    """
    first, count, _ = drop
    lanes = lanes.to(tl.uint32)
    if first is not None:
        lanes -= tl.cast(first, tl.uint32)
    return lanes < tl.cast(count, tl.uint32)


@triton.jit
def dropped(x, lanes, drop):
    """A tile in float32 after dropout: multiplied by the scale or by 0, so that a dropped infinity becomes NaN."""
    if drop[1] is not None:
        x *= tl.where(left_out(lanes, drop), 0.0, drop[2])
    return x


@triton.jit
def spared(x, lanes, drop):
    """A tile after dropout without its scale (:func:`scale_of`), in the tile's dtype."""
    if drop[1] is not None:
        none = narrowed(widened(x) * 0.0, x.dtype) if INTERPRETED else x * 0.0
        x = tl.where(left_out(lanes, drop), none, x)
    return x


@triton.jit
def scale_of(drop):
    """The scale of dropout."""
    return 1.0 if drop[1] is None else drop[2]


@triton.jit
def _once(x):
    """``x``, computed where it is: otherwise the compiler computes it again in the layout of each of its uses."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def path_factors(seed, start, length, path, TOKENS: tl.constexpr):
    """The factors of stochastic depth of a tile's rows: (TOKENS) float32, 1 without it.

    seed: pointer; start: the tile's first row (int64) of (samples x length) rows; path: ``drop`` of :func:`left_out`.
    """
    factors = tl.full([TOKENS], 1.0, tl.float32)
    if path[1] is not None:
        sample = start // length + (start % length + tl.arange(0, TOKENS)).to(tl.int32) // length
        factors = _once(tl.where(left_out(lanes_of(tl.load(seed), sample, PATHS_STREAM), path), 0.0, path[2]))
    return factors


@triton.jit
def branch_dropped(
    x,
    seed,
    start,
    factors,
    drop,
    width,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    OCTETS: tl.constexpr,
    column=0,
):
    """A tile of a residual branch in float32 after dropout and stochastic depth, as by philox.branch_masks.

    seed, start, factors: :func:`path_factors`; drop: :func:`left_out`; OCTETS, column: :func:`random_lanes`.
    """
    if drop[1] is not None:
        x = dropped(x, random_lanes(tl.load(seed), start, width, TOKENS, WIDTH, OCTETS, column), drop)
    return x * factors[:, None]


@triton.jit
def normal_of(h):
    """The standard normal's density and its tail ``Phi(-|h|)``, from one exponential.

    The tail is ``phi(x) r(1 / (1 + 0.32 x))`` for x >= 0. The polynomial r is fitted by weighted least squares; its
    error is 2.5e-8.
    """
    density = tl.exp2(h * h * (-0.5 * LOG2E) - 1.3257480647361592)  # includes 1 / sqrt(2 pi)
    t = inverse(0.32 * tl.abs(h) + 1.0)
    r = t * -0.3211710034314119 + 1.225343188351582
    r = r * t - 0.6378672765604185
    r = r * t + 0.7674615917922787
    r = r * t + 0.20814712249209733
    r = r * t + 0.011400479654180127
    return density, density * r


@triton.jit
def gelu_of(h):
    """``gelu(h)``."""
    _, beyond = normal_of(h)
    return tl.maximum(h, 0.0) - tl.abs(h) * beyond


@triton.jit
def gelu_and_slope_of(h):
    """``gelu(h)`` and its derivative, with an error of Phi below 2.5e-7 (with erf below 6e-8)."""
    density, beyond = normal_of(h)
    half = (0.5 - beyond).to(tl.int32, bitcast=True)
    sign = h.to(tl.int32, bitcast=True) & -0x80000000
    cdf = 0.5 + (half ^ sign).to(tl.float32, bitcast=True)
    return h * cdf, cdf + h * density
