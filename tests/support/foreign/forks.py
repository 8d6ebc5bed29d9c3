"""Forks of upstream's T2T-ViT: dynamic inference, adaptive computation, local feed-forward, two branches, sharing."""

import math

import torch
from torch import nn

from t2t_fast import reference
from t2t_fast.reference.blocks import Attention, Mlp


class RelationAttention(Attention):
    """DVT: adds the relations of an earlier, coarser pass to its logits, and returns its own."""

    def forward(self, x, relations):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * self.scale
        logits = logits if relations is None else logits + relations
        y = self.attn_drop(logits.softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))), logits


class RelationBlock(nn.Module):
    """DVT: also concatenates features of the earlier pass before its MLP."""

    def __init__(self, dim, heads, reused=0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), RelationAttention(dim, heads)
        self.drop_path, self.norm2 = nn.Identity(), nn.LayerNorm(dim + reused)
        self.mlp = Mlp(dim + reused, 3 * dim, dim)

    def forward(self, x, features=None, relations=None):
        y, logits = self.attn(self.norm1(x), relations)
        x = x + self.drop_path(y)
        inner = x if features is None else torch.cat([x, features], 2)
        return x + self.drop_path(self.mlp(self.norm2(inner))), logits


class Dynamic(nn.Module):
    """Two T2T-ViTs on coarse and fine tokens; the second one uses the features and relations of the first."""

    def __init__(self, size=64, dim=48, depth=2, heads=3, token_dim=32, reused=8):
        super().__init__()
        self.coarse = reference.T2T_module(size, "performer", 3, dim, token_dim)
        self.coarse.soft_split0 = nn.Unfold(14, stride=8, padding=3)
        self.coarse.attention1 = reference.Token_performer(3 * 14 * 14, token_dim)
        self.coarse.num_patches = (size // 32) ** 2
        self.fine = reference.T2T_module(size, "performer", 3, dim, token_dim)
        self.blocks = nn.ModuleList(RelationBlock(dim, heads) for _ in range(depth))
        self.fine_blocks = nn.ModuleList(RelationBlock(dim, heads, reused) for _ in range(depth))
        self.reuse = nn.Linear(dim, reused)

    @staticmethod
    def _finer(x, count):
        """(B, n, C) on a square grid -> (B, count, C)."""
        image = x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))
        size = (math.isqrt(count), math.isqrt(count))
        return nn.functional.interpolate(image, size).flatten(2).transpose(1, 2)

    def forward(self, x):
        tokens, relations = self.coarse(x), []
        for block in self.blocks:
            tokens, logits = block(tokens)
            relations.append(logits)
        fine = self.fine(x)
        count = fine.shape[1]
        features = self._finer(self.reuse(tokens), count)
        for block, logits in zip(self.fine_blocks, relations, strict=True):
            batch, heads, n, _ = logits.shape
            rows = self._finer(logits.reshape(batch * heads, n, n), count)  # (B heads, count, n)
            rows = self._finer(rows.transpose(1, 2), count).unflatten(0, (batch, heads))
            fine, _ = block(fine, features, rows)
        return tokens.mean(1), fine.mean(1)


class WidthLinear(nn.Linear):
    """AdaViT: a Linear whose channels are masked."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class AdaptiveAttention(nn.Module):
    """AdaViT: separate q, k and v, and masked heads."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (WidthLinear(dim, dim) for _ in range(4))
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x, mask):
        q, k, v = (
            f(x, mask).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        weights = self.attn_drop((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2), mask)


class AdaptiveMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = WidthLinear(dim, 3 * dim), nn.GELU(), WidthLinear(3 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, mask=None):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x, mask)))))


class AdaptiveBlock(nn.Module):
    """AdaViT: decides which heads and which of its two halves an image uses, and returns the decisions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), AdaptiveAttention(dim, heads), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), AdaptiveMlp(dim)
        self.head_select, self.layer_select = nn.Linear(dim, heads), nn.Linear(dim, 2)

    def forward(self, x):
        heads = self.head_select(x[:, 0]).sigmoid()
        layers = self.layer_select(x[:, 0]).sigmoid()
        mask = heads.repeat_interleave(x.shape[2] // heads.shape[1], 1)[:, None]
        x = x + layers[:, :1, None] * self.drop_path(self.attn(self.norm1(x), mask))
        return x + layers[:, 1:, None] * self.drop_path(self.mlp(self.norm2(x))), heads, layers


class Adaptive(nn.Module):
    """Upstream's T2T module and blocks, the last ones adaptive."""

    def __init__(self, size=64, dim=48, depth=2, heads=3, token_dim=32):
        super().__init__()
        self.tokens_to_token = reference.T2T_module(size, "performer", 3, dim, token_dim)
        self.first = reference.Block(dim, heads, mlp_ratio=3.0)
        self.blocks = nn.ModuleList(AdaptiveBlock(dim, heads) for _ in range(depth - 1))

    def forward(self, x):
        x, decisions = self.first(self.tokens_to_token(x)), []
        for block in self.blocks:
            x, heads, layers = block(x)
            decisions += [heads, layers]
        return x.mean(1), decisions


class LocalMlp(nn.Module):
    """LocalViT: an inverted residual with a depthwise convolution, on the image of the tokens."""

    def __init__(self, dim, ratio):
        super().__init__()
        hidden = int(ratio * dim)
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x):
        return x + self.conv(x)


class LocalBlock(nn.Module):
    """LocalViT: attention on the tokens, then :class:`LocalMlp` on those of the image alone."""

    def __init__(self, dim, heads, patches, ratio=2.0):
        super().__init__()
        self.num_patches = patches
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), Attention(dim, heads), nn.Identity()
        self.conv = LocalMlp(dim, ratio)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        first, x = x.split([1, self.num_patches], 1)
        side = math.isqrt(self.num_patches)
        x = self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return torch.cat([first, x], 1)


class LocalPerformer(nn.Module):
    """LocalViT: upstream's Performer attention with :class:`LocalMlp` behind it."""

    def __init__(self, dim, in_dim):
        super().__init__()
        layer = reference.Token_performer(dim, in_dim)
        self.norm1, self.kqv, self.dp, self.proj, self.norm2 = layer.norm1, layer.kqv, layer.dp, layer.proj, layer.norm2
        self.w, self.m, self.epsilon = layer.w, layer.m, layer.epsilon
        self.conv = LocalMlp(in_dim, 1.0)

    def _features(self, x):
        return (x @ self.w.mT - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(self.m)

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        k, q = self._features(k), self._features(q)
        y = q @ (k.mT @ v) / (q @ k.sum(1)[..., None] + self.epsilon)
        x = v + self.dp(self.proj(y))
        side = math.isqrt(x.shape[1])
        return self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


class Local(nn.Module):
    def __init__(self, size=64, dim=48, depth=2, heads=3, token_dim=32):
        super().__init__()
        self.tokens_to_token = reference.T2T_module(size, "performer", 3, dim, token_dim)
        self.tokens_to_token.attention1 = LocalPerformer(147, token_dim)
        self.tokens_to_token.attention2 = LocalPerformer(9 * token_dim, token_dim)
        patches = (size // 16) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(LocalBlock(dim, heads, patches) for _ in range(depth))

    def forward(self, x):
        x = self.tokens_to_token(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class CrossAttention(nn.Module):
    """CrossViT: the class token of one branch looks at the tokens of the other."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = (f(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f, t in self._given(x))
        y = self.attn_drop((q @ k.mT * self.scale).softmax(-1)) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _given(self, x):
        return (self.wq, x[:, :1]), (self.wk, x), (self.wv, x)


class CrossBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(dim), CrossAttention(dim, heads), nn.Identity()
        self.has_mlp = False

    def forward(self, x):
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x)))


class Cross(nn.Module):
    """CrossViT: two T2T modules with other windows (tokens of 16 and of 12 pixels), whose branches exchange tokens."""

    WINDOWS = (((7, 4, 2), (3, 2, 1), (3, 2, 1)), ((7, 4, 2), (3, 3, 1), (3, 1, 1)))

    def __init__(self, size=96, dim=48, depth=2, heads=3, token_dim=32):
        super().__init__()
        self.patch_embed = nn.ModuleList()
        for windows in self.WINDOWS:
            module = reference.T2T_module(size, "transformer", 3, dim, token_dim)
            for index, (kernel, stride, padding) in enumerate(windows):
                setattr(module, f"soft_split{index}", nn.Unfold(kernel, stride=stride, padding=padding))
            self.patch_embed.append(module)
        self.blocks = nn.ModuleList(
            nn.ModuleList(reference.Block(dim, heads, mlp_ratio=3.0) for _ in range(depth)) for _ in self.WINDOWS
        )
        self.fusion = nn.ModuleList(CrossBlock(dim, heads) for _ in self.WINDOWS)

    def forward(self, x):
        branches = []
        for embed, blocks in zip(self.patch_embed, self.blocks, strict=True):
            tokens = embed(x)
            for block in blocks:
                tokens = block(tokens)
            branches.append(tokens)
        first, second = branches
        mixed = torch.cat([first[:, :1], second[:, 1:]], 1), torch.cat([second[:, :1], first[:, 1:]], 1)
        return [block(tokens)[:, 0] for block, tokens in zip(self.fusion, mixed, strict=True)]


class Shared(nn.Module):
    """Self-distillation with random depth: one block is called several times, and each call's class token is a result
    (SDViT-like)."""

    def __init__(self, size=64, dim=48, depth=2, heads=3, token_dim=32):
        super().__init__()
        self.tokens_to_token = reference.T2T_module(size, "performer", 3, dim, token_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.block, self.calls = reference.Block(dim, heads, mlp_ratio=3.0), depth
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x, results = self.tokens_to_token(x), []
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for _ in range(self.calls):
            x = self.block(x)
            results.append(self.head(self.norm(x[:, 0])))
        return results
