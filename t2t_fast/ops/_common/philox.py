"""Counter-based dropout masks: (seed, element) determines the bits, so masks are recomputed and not stored.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call serves eight
elements of a contiguous tensor: counter (element // 8 as two words, stream, 0), key = the two halves of the seed, eight
16-bit lanes, low half of each word first. Masks do not depend on tiling, backend, device or launch. Streams are
independent masks of one seed: an operator uses one stream for each shape of mask.

A layer's two dropouts share the lane u of an element. The first drops [0, a) with ``a = 65536 p1``, the second
[a - o, a - o + b) with ``b = 65536 p2``: the two intervals overlap by ``o = a b / 65536``, as for
independent masks: they are independent up to the rounding of o (a correlation below 1e-4), at the cost of one mask.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

ROUNDS = 7
HIDDEN, PATHS = 1, 2
"""Streams of a transformer block's masks: an MLP's hidden units, and stochastic depth; 0: the residual branches."""
CPU_CALLS = 2**16
"""Calls per batch in eager mode on a CPU."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 64-bit product of a 32-bit word held in int64 and a constant above 2**31.

    The product of two such words overflows int64. With 2**32 subtracted from the constant it does not, and
    the missing ``x * 2**32`` only affects the high word.
    """
    product = x * (constant - 2**32)
    return (product >> 32).add_(x), product.bitwise_and_(_WORD)


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random words from four counter words and two key words, all int64 tensors of broadcasting shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = (high1 ^ c1).bitwise_xor_(k0), low1, (high0 ^ c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _lanes(first: int, last: int, seed: torch.Tensor, stream: int = 0) -> list[torch.Tensor]:
    """The lanes of calls ``first`` to ``last``: eight (calls,) int64 tensors."""
    zero = seed & 0  # derived from the seed, of which each sample has one under torch.vmap
    calls = torch.arange(first, last, dtype=torch.int64, device=seed.device) + zero
    # A counter word that is the same for all calls stays a scalar, which halves the work of two rounds. The mask is
    # needed even where it has no effect: Inductor computes expressions linear in an arange in 32 bits.
    counter = (calls & _WORD, zero if last <= _WORD else calls >> 32)
    words = philox((*counter, zero + stream, zero), (seed & _WORD, (seed >> 32) & _WORD))
    return [half for word in words for half in (word & 0xFFFF, word >> 16)]


def _outside(lane: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Which lanes are not in [low, high), a bool tensor of their shape."""
    return lane >= high if low == 0 else (lane < low).logical_or_(lane >= high)


def keep_masks(
    seed: torch.Tensor, shape: Sequence[int], p1: float, p2: float, stream: int = 0
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The masks of the elements that two dropouts keep.

    Args:
        seed: int64 scalar tensor; its device is the result's.
        shape: the masks' shape.
        p1, p2: the dropouts' probabilities in [0, 1), resolved to 1/65536.
        stream: number of the stream.

    Returns:
        two bool tensors of ``shape``, False with probability ``p1`` and ``p2``; ``None`` where that is 0.
    """
    a, b = round(65536 * p1), round(65536 * p2)
    low = a - round(a * b / 65536)
    intervals = [(0, a) if p1 else None, (low, low + b) if p2 else None]
    if intervals == [None, None]:
        return None, None
    count = math.prod(shape)
    calls = (count + 7) // 8
    # In eager mode on a CPU, the words of a whole tensor would not stay in the cache between the hundred operations.
    step = calls if torch.compiler.is_compiling() or seed.device.type != "cpu" else CPU_CALLS
    pieces: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for first in range(0, calls, step) if calls else [0]:
        lanes = _lanes(first, min(first + step, calls), seed, stream)
        for interval, parts in zip(intervals, pieces, strict=True):
            if interval:
                parts.append(torch.stack([_outside(lane, *interval) for lane in lanes], dim=-1))
    first_mask, second_mask = (
        (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten()[:count].view(shape) if parts else None
        for parts in pieces
    )
    return first_mask, second_mask


@lru_cache(maxsize=256)
def kernel_drops(
    p1: float, p2: float
) -> tuple[tuple[float | None, float | None, float], tuple[float | None, float | None, float]]:
    """The two dropouts of :func:`keep_masks` as kernels take them: arguments ``drop`` of ``elementwise.left_out``."""
    a, b = round(65536 * p1), round(65536 * p2)
    begin = a - round(a * b / 65536)
    first = None, float(a) if p1 > 0 else None, 1.0 / (1.0 - p1)
    return first, (float(begin), float(b) if p2 > 0 else None, 1.0 / (1.0 - p2))


class Drops(NamedTuple):
    """The probabilities of dropout and of stochastic depth (of whole samples) of a residual branch."""

    drop: float = 0.0
    path: float = 0.0


NONE = Drops()


def branch_masks(
    seed: torch.Tensor | None, shape: Sequence[int], first: Drops, second: Drops = NONE, index: int = 0
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The masks of one of the two residual branches of a transformer block.

    Args:
        seed: as :func:`keep_masks`; ``None`` only if all probabilities are 0.
        shape: (B, N, D) of the branch.
        first, second: the probabilities of both branches, which share random numbers.
        index: which branch, 0 or 1.

    Returns:
        the bool mask of the elements that dropout keeps, of ``shape``, and that of the samples that stochastic depth
        keeps, (B, 1, 1); ``None`` where the branch's probability is 0.
    """
    p, q = (first, second)[index]
    keep = keep_masks(seed, shape, first.drop, second.drop)[index] if seed is not None and p else None
    path = keep_masks(seed, shape[:1], first.path, second.path, PATHS)[index] if seed is not None and q else None
    return keep, None if path is None else path.view(-1, 1, 1)


def dropout_(x: torch.Tensor, p: float, keep: torch.Tensor | None) -> torch.Tensor:
    """Dropout in place: multiplies ``x`` by 0 or ``1 / (1 - p)``; a no-op if ``keep`` is ``None``. Returns ``x``."""
    return x if keep is None else x.mul_(keep).mul_(1.0 / (1.0 - p))


def fresh_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator, so that ``torch.manual_seed`` and checkpointing govern it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
