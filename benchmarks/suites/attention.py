"""Performer attention and its peers, for sequences of up to a million tokens.

Softmax attention and causal attention compute other functions and are measured for orientation. Other packages get the
same positive features; if a package is missing, its row is left out with that reason.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.checkpoint import checkpoint

from t2t_fast import functional
from t2t_fast.ops._common.costs import FEATURES, WIDTH
from t2t_fast.reference.token_performer import at_least_float32
from t2t_fast.testing import features

from . import packages
from .costs import softmax_attention
from .groups import LeftOut

EPS = 1e-8
NORM = 2.0  # of q and k, as in a freshly initialised stage 1: eps does not matter there (docs/math.md, section 2)
# Limit for a call of softmax attention: more FLOPs take longer than a few seconds
SOFTMAX_FLOPS = {"cpu": 2e11, "cuda": 5e13}
BLOCK = 2**26  # attention weights of the float64 result in memory at a time
CHUNK = 64  # tokens that the float64 result of causal attention processes at a time


def inputs(tokens, batch, generator):
    """q, k, v (batch, tokens, 64) and the random features w."""
    q, k, v = (torch.randn(batch, tokens, WIDTH, generator=generator) for _ in range(3))
    scale = NORM * WIDTH**-0.5
    return {"q": scale * q, "k": scale * k, "v": v}, {"w": features(generator, FEATURES, WIDTH)}


def upstream(q, k, v, w):
    """The middle of upstream's ``Token_performer.single_attn``, as ``t2t_fast.reference`` writes it."""

    def prm_exp(x):
        half_norm = (x * x).sum(dim=-1, keepdim=True).repeat(1, 1, w.shape[0]) / 2
        wx = torch.einsum("bti,mi->btm", at_least_float32(x), w)
        return torch.exp(wx - half_norm) / w.shape[0] ** 0.5

    kp, qp = prm_exp(k), prm_exp(q)
    denominator = torch.einsum("bti,bi->bt", qp, kp.sum(dim=1)).unsqueeze(dim=2)
    state = torch.einsum("bin,bim->bnm", at_least_float32(v), kp)
    return torch.einsum("bti,bni->btn", qp, state) / (denominator.repeat(1, 1, v.shape[-1]) + EPS)


def sdpa(q, k, v, w):
    """Softmax attention; it ignores the features."""
    return attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def _half_square(x):
    return at_least_float32(x).square().sum(-1, keepdim=True) / 2


def two_sdpa(q, k, v, w):
    """The log-space form (docs/math.md, section 2b): features attend to tokens, then tokens to features.

    The mask of the second attention is shifted by its maximum, which reduces rounding in half types.
    """
    lz = (F.linear(k, w) - _half_square(k)).logsumexp(1)  # (B, m)
    landmarks = w.to(q.dtype).expand(q.shape[0], 1, *w.shape)
    bias = -_half_square(k).mT.unsqueeze(1).to(q.dtype).expand(-1, -1, w.shape[0], -1)  # (B, 1, m, L)
    state = attend(landmarks, k.unsqueeze(1), v.unsqueeze(1), attn_mask=bias, scale=1.0)
    shifted = (lz - lz.detach().amax(-1, keepdim=True)).to(q.dtype)
    mask = shifted[:, None, None].expand(-1, -1, q.shape[1], -1)
    y = attend(q.unsqueeze(1), landmarks, state, attn_mask=mask, scale=1.0).squeeze(1)
    logit = (F.linear(q, w) + lz.unsqueeze(1)).logsumexp(-1, keepdim=True) - _half_square(q)
    return y * torch.sigmoid(logit - math.log(w.shape[0] * EPS)).to(y.dtype)


def positive_features(x, w):
    """``exp(w x - |x|^2 / 2) / sqrt(m)``: the queries and keys of other packages."""
    return torch.exp(F.linear(at_least_float32(x), w) - _half_square(x)) / math.sqrt(w.shape[0])


def _performer_pytorch(device):
    """Its non-causal attention, which divides without eps."""
    linear_attention = packages.load("performer-pytorch", "performer_pytorch.performer_pytorch").linear_attention
    return lambda q, k, v, w: linear_attention(positive_features(q, w), positive_features(k, w), v)


def _flash_linear_attention(device):
    """The chunked form with which its layers train; all its kernels are causal."""
    chunk_linear_attn = packages.load("flash-linear-attention", "fla.ops.linear_attn").chunk_linear_attn
    if device != "cuda":
        raise LeftOut("flash-linear-attention's kernels need a GPU")

    def causal_attention(q, k, v, w):
        qp, kp = (positive_features(x, w).to(x.dtype).unsqueeze(2) for x in (q, k))
        return chunk_linear_attn(qp, kp, v.unsqueeze(2), scale=1.0, normalize=True)[0].squeeze(2)

    return causal_attention


def causal(q, k, v, w):
    """Causal linear attention with the same features, without eps; its memory grows with L, not L^2."""
    length = q.shape[1]
    missing = -length % CHUNK
    # queries of 1 in the padding avoid a division by 0
    qp = F.pad(positive_features(q, w), (0, 0, 0, missing), value=1.0).unflatten(1, (-1, CHUNK))
    kp, values = (F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK)) for x in (positive_features(k, w), v))
    values = F.pad(values, (0, 1), value=1.0)  # the last column accumulates the denominator
    states = kp.mT @ values
    sums = qp @ (states.cumsum(1) - states) + (qp @ kp.mT).tril() @ values
    return (sums[..., :-1] / sums[..., -1:]).flatten(1, 2)[:, :length]


def softmax_in_blocks(q, k, v, w):
    """:func:`sdpa` for long sequences in any dtype: a block of queries at a time, recomputed for the backward pass."""
    rows = max(1, BLOCK // (k.shape[0] * k.shape[1]))
    return torch.cat([checkpoint(sdpa, block, k, v, w, use_reentrant=False) for block in q.split(rows, dim=1)], dim=1)


# The float64 functions against which sources of another function are checked
TRUTHS = {"sdpa": softmax_in_blocks, "flash-linear-attention": causal}
# The sources that need no other package
FUNCTIONS = {"upstream": upstream, "t2t_fast": functional.performer_attention, "two-sdpa": two_sdpa, "sdpa": sdpa}
PACKAGES = {"performer-pytorch": _performer_pytorch, "flash-linear-attention": _flash_linear_attention}
SOURCES = (*FUNCTIONS, *PACKAGES)


def load(source, tokens, batch, mode, device):
    """The function of a source for a call of this size; raises :class:`LeftOut` if it cannot be measured."""
    if source in PACKAGES:
        return PACKAGES[source](device)
    flops, limit = batch * softmax_attention(tokens).flops(mode), SOFTMAX_FLOPS[device]
    if source == "sdpa" and flops > limit:
        raise LeftOut(f"its cost is quadratic: {flops:.1e} FLOPs a call, more than the limit of {limit:.0e}")
    return FUNCTIONS[source]
