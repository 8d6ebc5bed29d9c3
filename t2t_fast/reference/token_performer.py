"""Upstream-shaped eager Performer layer: the oracle of the tests and the "before" of every benchmark.

Source: ``models/token_performer.py`` of yitu-opensource/T2T-ViT (section 3.1 of the T2T-ViT paper;
random features of Choromanski et al., "Rethinking Attention with Performers", lemma 1).
"""

import math

import torch
from torch import nn


def at_least_float32(x):
    """Upcast half types to float32 as upstream does; leave float64 alone so that the oracle can run in it."""
    return x if x.dtype == torch.float64 else x.float()


class Token_performer(nn.Module):
    """LayerNorm, random-feature attention with a skip through ``v``, then LayerNorm and MLP with a skip.

    Args:
        dim: width of the incoming (unfolded) tokens.
        in_dim: width of the outgoing tokens, per head.
        head_cnt: only widens the tokens to ``in_dim * head_cnt``; upstream never splits heads.
        kernel_ratio: random features per channel, ``m = int(in_dim * head_cnt * kernel_ratio)``.
        dp1, dp2: dropout after the projection and after the MLP, active in training mode by default.
    """

    def __init__(self, dim, in_dim, head_cnt=1, kernel_ratio=0.5, dp1=0.1, dp2=0.1):
        super().__init__()
        self.emb = in_dim * head_cnt
        self.kqv = nn.Linear(dim, 3 * self.emb)
        self.dp = nn.Dropout(dp1)
        self.proj = nn.Linear(self.emb, self.emb)
        self.head_cnt = head_cnt
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(self.emb)
        self.epsilon = 1e-8
        self.mlp = nn.Sequential(
            nn.Linear(self.emb, self.emb), nn.GELU(), nn.Linear(self.emb, self.emb), nn.Dropout(dp2)
        )
        self.m = int(self.emb * kernel_ratio)
        directions = nn.init.orthogonal_(torch.randn(self.m, self.emb))
        self.w = nn.Parameter(directions * math.sqrt(self.m), requires_grad=False)

    def prm_exp(self, x):
        """Positive random features ``exp(w x - |x|^2 / 2) / sqrt(m)``: (B, T, E) -> (B, T, m)."""
        half_norm = (x * x).sum(dim=-1, keepdim=True).repeat(1, 1, self.m) / 2
        wx = torch.einsum("bti,mi->btm", at_least_float32(x), self.w)
        return torch.exp(wx - half_norm) / math.sqrt(self.m)

    def single_attn(self, x):
        k, q, v = torch.split(self.kqv(x), self.emb, dim=-1)
        kp, qp = self.prm_exp(k), self.prm_exp(q)
        denominator = torch.einsum("bti,bi->bt", qp, kp.sum(dim=1)).unsqueeze(dim=2)
        state = torch.einsum("bin,bim->bnm", at_least_float32(v), kp)
        y = torch.einsum("bti,bni->btn", qp, state) / (denominator.repeat(1, 1, self.emb) + self.epsilon)
        return v + self.dp(self.proj(y))

    def forward(self, x):
        """(B, T, dim) -> (B, T, in_dim * head_cnt)."""
        x = self.single_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
