"""Counter-based dropout masks: the same (seed, stream, element) gives the same bit everywhere, so none is stored.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call serves eight
elements of a contiguous tensor: counter (element // 8 as two words, stream, 0), key = the two halves of the seed,
eight 16-bit lanes, low half of each word first. An element is kept if its lane is at least ``round(65536 p)``. Masks
depend on nothing else: not on tiling, backend, device or launch.
"""

import math

import torch

ROUNDS = 7
CPU_CALLS = 2**16
"""Calls at a time in eager mode on a CPU."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(x, constant):
    """High and low word of the 64-bit product of a 32-bit word held in int64 and a constant above 2**31.

    The product of two such words overflows int64. With the constant less 2**32 it does not, and the missing
    ``x * 2**32`` belongs to the high word alone.
    """
    product = x * (constant - 2**32)
    return (product >> 32).add_(x), product.bitwise_and_(_WORD)


def philox(counter, key, rounds=ROUNDS):
    """Four random words from four counter words and two key words: int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = (high1 ^ c1).bitwise_xor_(k0), low1, (high0 ^ c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _lanes(first, last, seed, stream, threshold):
    """The bits of calls ``first`` to ``last``: (calls, 8)."""
    calls = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    # A counter word that is the same for all calls stays a scalar, which makes two of the rounds half as long.
    counter = (calls, zero) if last <= _WORD else (calls & _WORD, calls >> 32)
    words = philox((*counter, zero + stream, zero), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack([half >= threshold for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def keep_mask(seed, stream, shape, p):
    """Which elements dropout keeps: a bool tensor of ``shape``, False with probability ``p``.

    Args:
        seed: int64 scalar tensor; its device is the result's.
        stream: which mask of a layer this is; masks of different streams are independent.
        shape: of the result.
        p: probability in [0, 1), resolved to 1/65536.
    """
    count = math.prod(shape)
    calls, threshold = (count + 7) // 8, round(65536 * p)
    # Eagerly on a CPU the words of a whole tensor would leave the cache between any two of the hundred operations.
    step = calls if torch.compiler.is_compiling() or seed.device.type != "cpu" else CPU_CALLS
    if calls > step:
        parts = [_lanes(first, min(first + step, calls), seed, stream, threshold) for first in range(0, calls, step)]
        lanes = torch.cat(parts)
    else:
        lanes = _lanes(0, calls, seed, stream, threshold)
    return lanes.flatten()[:count].view(shape)


def dropout_(x, p, seed, stream):
    """Dropout in place: ``x`` times 0 or ``1 / (1 - p)``; nothing is done for ``p = 0``. Returns ``x``."""
    return x.mul_(keep_mask(seed, stream, x.shape, p)).mul_(1.0 / (1.0 - p)) if p else x


def fresh_seed(device):
    """A seed from torch's own generator, so that ``torch.manual_seed`` and checkpointing govern it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
