"""Triton functions: the mean of each window of a tile and its sum of squared deviations, accumulated by blocks.

The value at the window's centre is subtracted from the inputs, so that an offset of the image has no effect. ``known``:
1 for each column of a block that is one of the K VALUES of a window, else 0; ``None`` if all are.
"""

import triton
import triton.language as tl

LEVELS = tl.constexpr(3)
RUN = tl.constexpr(8)
"""2^LEVELS neighbouring columns of a half type are read by one thread in one access and added by that thread."""


@triton.jit
def no_statistics(TOKENS: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr):
    """The initial state of :func:`observed`."""
    if tl.float32 == OPERAND:
        first, second = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    else:
        first = tl.zeros([TOKENS, BLOCK // RUN], tl.float32)
        second = tl.zeros([TOKENS, BLOCK // RUN], tl.float32)
    return first, second, 0.0


@triton.jit
def observed(statistics, block, known, OPERAND: tl.constexpr):
    """Update the statistics with one more block, (TOKENS, BLOCK) in float32, 0 in columns that are not known.

    For products in float32 they are means and squared deviations, merged by Chan's rule. For half types they are sums
    and sums of squares per thread, at about half the cost: the centre is a value of the window, so the squared mean is
    at most K times the variance, and cancellation loses at most K roundings of float32.
    """
    first, second, seen = statistics
    if tl.float32 == OPERAND:
        count = block.shape[1] * 1.0
        if known is not None:
            count = tl.sum(known, 0)
        here = tl.sum(block, 1) / tl.maximum(count, 1.0)
        apart = block - here[:, None]
        if known is not None:
            apart *= known[None, :]
        step = here - first
        part = count / (seen + count)
        second += tl.sum(apart * apart, 1) + step * step * (seen * part)
        first += step * part
        seen += count
    else:
        runs = (block,)
        for _ in tl.static_range(LEVELS):
            halves = ()
            for index in tl.static_range(len(runs)):
                pairs = tl.reshape(runs[index], [block.shape[0], runs[index].shape[1] // 2, 2])
                halves = halves + tl.split(pairs)
            runs = halves
        for index in tl.static_range(RUN):
            first += runs[index]
            second += runs[index] * runs[index]
    return first, second, seen


@triton.jit
def final_statistics(statistics, VALUES: tl.constexpr, OPERAND: tl.constexpr):
    """Each window's mean minus the value at its centre, and its sum of squared deviations."""
    mean, squares, _ = statistics
    if tl.float32 != OPERAND:
        mean = tl.sum(mean, 1) / VALUES
        squares = tl.sum(squares, 1) - mean * mean * VALUES
        squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return mean, squares
