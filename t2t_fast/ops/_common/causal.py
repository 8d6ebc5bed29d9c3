"""Sums over all pairs of a query t and a key s <= t in log space, in chunks: the core of causal attention.

A pair has one exponent per feature, ``b_i(t) + a_i(s)``, and no exponent of a pair is above 0 (up to rounding). Weights
are ``sum_i exp(b_i(t) + a_i(s))``. An exponential of ``a`` or ``b`` alone could overflow, so a product of the two needs
a shift per feature that is right for all its pairs. A block of keys before a block of queries has one: the maximum of
``a_i`` over the keys, since each query has a pair with each key. The pairs are therefore divided as follows.

- A key with its own query: one exponential per feature.
- In a chunk of ``size`` tokens: for h = 1, 2, 4, ... ``size / 2`` the first h of each 2 h tokens as keys, the other h
  as queries.
- The queries of a chunk with all keys of earlier chunks: through the sum over those keys, (m, values) numbers, which
  runs from chunk to chunk with the maximum over the keys.

Time is linear in the length. No tensor is larger than (L, m), (L, values) or (chunks, m, values). No value of a later
token is used, so none can change the result of an earlier query.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import transforms

CHUNK = 64
"""Tokens of a chunk. On a CPU 16 to 128 take about the same time; memory is chunks times (m, values)."""

NOTHING = -1e30
"""The logarithm of an empty sum over keys: like -inf it closes the gate, but its sum with a finite score is finite."""


def _length(x: torch.Tensor) -> int:
    """The tokens of x as a constant, also in a traced program: the number of its operations depends on them."""
    return int(transforms.constant(x.shape[-2]))


def _size(length: int) -> int:
    size = 1
    while size < min(length, CHUNK):
        size *= 2
    return size


def _chunks(x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """(..., L, n) -> (..., chunks, size, n), the last chunk filled up."""
    length = _length(x)
    size = _size(length)
    missing = -length % size
    return (F.pad(x, (0, 0, 0, missing), value=fill) if missing else x).unflatten(-2, (-1, size))


def _joined(x: torch.Tensor, length: int) -> torch.Tensor:
    return x.flatten(-3, -2)[..., :length, :]


def _blocks(size: int, *tensors: torch.Tensor) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """For each h, of each tensor (..., chunks, size, n): the blocks of keys and of queries, (..., blocks, h, n)."""
    h = 1
    while h < size:
        yield [x.unflatten(-2, (-1, 2, h)).unbind(-3) for x in tensors]
        h *= 2


def largest(x: torch.Tensor) -> torch.Tensor:
    """The maximum over tokens, kept; :data:`NOTHING` where all are -inf."""
    return x.amax(-2, keepdim=True).clamp_min(NOTHING)


def _carried(x: torch.Tensor, values: torch.Tensor, backwards: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of ``exp(x) values`` over each chunk and all earlier ones, or all later ones.

    Returns:
        the maximum of x over them (..., chunks, 1, m), and the sums divided by its exponential (..., chunks, m, n).
    """
    own = largest(x)
    top = own.flip(-3).cummax(-3).values.flip(-3) if backwards else own.cummax(-3).values
    sums = (x - top).exp_().mT @ values
    order = slice(None, None, -1 if backwards else 1)
    tops, parts = top.unbind(-3)[order], sums.unbind(-3)[order]
    for i in range(1, len(parts)):
        parts[i].addcmul_(parts[i - 1], (tops[i - 1] - tops[i]).exp_().mT)
    return top, sums


def weighted_sums(a: torch.Tensor, b: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``out(t) = sum_{s <= t} sum_i exp(b_i(t) + a_i(s)) values(s)``.

    Args:
        a, b: (..., L, m); no exponent of a pair is above 0.
        values: (..., L, n).
    """
    length = _length(a)
    a, b, values = _chunks(a, -math.inf), _chunks(b, -math.inf), _chunks(values)
    out = (a + b).exp_().sum(-1, keepdim=True) * values
    for (keys, _), (_, queries), (earlier, _), (_, later) in _blocks(a.shape[-2], a, b, values, out):
        top = largest(keys)
        later.add_((queries + top).exp_() @ (keys - top).exp_().mT @ earlier)
    if a.shape[-3] > 1:
        top, sums = _carried(a[..., :-1, :, :], values[..., :-1, :, :])
        out[..., 1:, :, :].add_((b[..., 1:, :, :] + top).exp_() @ sums)
    return _joined(out, length)


def backward(
    a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, grads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For ``r_i(t, s) = exp(b_i(t) + a_i(s))`` and ``along(t, s) = grads(t) . values(s)``, with s <= t:

    Returns:
        ``sum_s r along`` (..., L, m), ``sum_t r along`` (..., L, m), and ``sum_t sum_i r grads`` (..., L, n).
    """
    length = _length(a)
    a, b, values, grads = _chunks(a, -math.inf), _chunks(b, -math.inf), _chunks(values), _chunks(grads)
    weights = (a + b).exp_()
    d_values = weights.sum(-1, keepdim=True) * grads
    d_b = weights.mul_(torch.linalg.vecdot(grads, values).unsqueeze(-1))
    d_a = d_b.clone()
    for pair in _blocks(a.shape[-2], a, b, values, grads, d_a, d_b, d_values):
        (keys, _), (_, queries), (earlier, _), (_, later), (to_keys, _), (_, to_queries), (to_earlier, _) = pair
        top = largest(keys)
        of_keys, of_queries = (keys - top).exp_(), (queries + top).exp_()
        along = later @ earlier.mT
        to_queries.addcmul_(along @ of_keys, of_queries)
        to_keys.addcmul_(along.mT @ of_queries, of_keys)
        to_earlier.add_(of_keys @ of_queries.mT @ later)
    if a.shape[-3] > 1:
        first, rest = (..., slice(None, -1), slice(None), slice(None)), (..., slice(1, None), slice(None), slice(None))
        top, sums = _carried(a[first], values[first])
        d_b[rest].addcmul_(grads[rest] @ sums.mT, (b[rest] + top).exp_())
        top, sums = _carried(b[rest], grads[rest], backwards=True)
        of_keys = (a[first] + top).exp_()
        d_values[first].add_(of_keys @ sums)
        d_a[first].addcmul_(values[first] @ sums.mT, of_keys)
    return _joined(d_b, length), _joined(d_a, length), _joined(d_values, length)
