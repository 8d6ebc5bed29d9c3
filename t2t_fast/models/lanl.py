"""The family of the articles "Vision Transformers, Explained", under their names: non-square images, free kernels.

Source: the ``modules`` folder of lanl/vision_transformers_explained; parameters have its names and shapes. It differs
from the official T2T-ViT in three things: the token attention's scale is that of its output width, *every* attention
adds ``v`` to its output (the backbone's too), and the window follows from the kernel: stride ``(k + 1) // 2``, padding
``(k + 1) // 4``. H and W are free at call time.
"""

import torch
from torch import nn

from ..errors import check_pair, check_tensor
from ..functional import window as make_window
from ..modules import fusion
from ..modules.attention import attend, heads, merged
from ..modules.options import check_options, check_series
from ..modules.soft_split import Unfold
from ..modules.t2t_module import stages_obstacle, walk, windows_of
from ..modules.token_transformer import TokenTransformer as _TokenTransformer
from ..ops._common.spec import grid_after, square
from .backbone import init_weights
from .position import resize_position_table, sinusoid_table


def check_image(owner, img_size):
    """``img_size`` as (C, H, W), three integers."""
    check_series(owner, "img_size", img_size, length=3)
    return tuple(img_size)


def split_window(kernel):
    """The articles' window of a kernel size k: stride ``(k + 1) // 2``, padding ``(k + 1) // 4``."""
    return make_window(kernel, (kernel + 1) // 2, (kernel + 1) // 4, function="Tokens2Token")


def count_tokens(w, h, k, s, p):
    """Grid of a soft split: (new_w, new_h, tokens). Width comes first, as in the articles."""
    new_h, new_w = make_window(k, s, p, function="count_tokens").grid(h, w)
    return new_w, new_h, new_w * new_h


class Attention(nn.Module):
    """Multi-head attention from width ``dim`` to width ``chan``, with a skip through ``v`` after the projection."""

    def __init__(self, dim, chan, num_heads=1, qkv_bias=False, qk_scale=None):
        super().__init__()
        check_options("Attention", locals())
        if chan % num_heads:
            raise ValueError(f"Attention: num_heads must divide chan, got chan={chan}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.chan = chan
        self.head_dim = chan // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, chan * 3, bias=qkv_bias)
        self.proj = nn.Linear(chan, chan)

    def mix(self, qkv):
        """Attention on packed (B, T, 3 * chan): the mixed values and the values themselves, (B, T, chan) each."""
        q, k, v = heads(qkv, self.num_heads)
        return merged(attend(q, k, v, self.scale)), merged(v)

    def forward(self, x):
        """(B, T, dim) -> (B, T, chan)."""
        y, v = self.mix(self.qkv(x))
        return v + self.proj(y)


class NeuralNet(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, in_chan, hidden_chan=None, out_chan=None, act_layer=nn.GELU):
        super().__init__()
        check_options("NeuralNet", locals())
        hidden_chan = in_chan if hidden_chan is None else hidden_chan
        self.fc1 = nn.Linear(in_chan, hidden_chan)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_chan, in_chan if out_chan is None else out_chan)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


_PARTS = {
    "norm1": fusion.layer_norm,
    "attn": fusion.container(Attention, "qkv", "proj"),
    "attn.qkv": fusion.linear,
    "attn.proj": fusion.linear,
    "norm2": fusion.layer_norm,
    "neuralnet": fusion.container(NeuralNet, "fc1", "act", "fc2"),
    "neuralnet.fc1": fusion.linear,
    "neuralnet.act": fusion.gelu,
    "neuralnet.fc2": fusion.linear,
}


class TokenTransformer(_TokenTransformer):
    """LayerNorm and attention (the width changes), then LayerNorm and MLP with a skip: (B, T, dim) -> (B, T, chan)."""

    mlp_name = "neuralnet"
    _parts = _PARTS

    def __init__(
        self,
        dim,
        chan,
        num_heads,
        hidden_chan_mul=1.0,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        nn.Module.__init__(self)
        check_options("TokenTransformer", locals())
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, chan, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.norm2 = norm_layer(chan)
        self.neuralnet = NeuralNet(chan, int(chan * hidden_chan_mul), chan, act_layer)

    def _projection_dropout(self):
        return 0.0

    def _unfused(self, x):
        x = self.attn(self.norm1(x))
        return x + self.neuralnet(self.norm2(x))


class Encoding(nn.Module):
    """Backbone block: pre-norm attention and MLP, both with skips (and the skip through ``v`` inside)."""

    def __init__(
        self,
        dim,
        num_heads=1,
        hidden_chan_mul=4.0,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        check_options("Encoding", locals())
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale)
        self.norm2 = norm_layer(dim)
        self.neuralnet = NeuralNet(dim, int(dim * hidden_chan_mul), dim, act_layer)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.neuralnet(self.norm2(x))


class Tokens2Token(nn.Module):
    """Soft splits of free kernel sizes with two token transformers between: (B, C, H, W) -> (B, tokens, token_len).

    Args:
        img_size: (C, H, W); H and W only set :attr:`num_tokens`.
        softsplit_kernels: three kernel sizes; see :func:`split_window`.
        token_chan, token_len: width of the inner and of the outgoing tokens.
        others: as the articles' class.
    """

    def __init__(
        self,
        img_size=(1, 1000, 300),
        softsplit_kernels=(7, 3, 3),
        num_heads=1,
        token_chan=64,
        token_len=768,
        hidden_chan_mul=1.0,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        check_options("Tokens2Token", locals())
        check_series("Tokens2Token", "softsplit_kernels", softsplit_kernels, length=3)
        channels, height, width = check_image("Tokens2Token", img_size)
        first, second, third = windows = tuple(split_window(k) for k in softsplit_kernels)
        self.windows = windows
        self.grid_size = grid_after(windows, height, width)
        self.num_tokens = self.grid_size[0] * self.grid_size[1]
        options = dict(
            num_heads=num_heads,
            hidden_chan_mul=hidden_chan_mul,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        self.token_chan = token_chan
        self.soft_split0, self.soft_split1, self.soft_split2 = (Unfold.of(window) for window in windows)
        self.transformer1 = TokenTransformer(channels * first.taps, token_chan, **options)
        self.transformer2 = TokenTransformer(token_chan * second.taps, token_chan, **options)
        self.project = nn.Linear(token_chan * third.taps, token_len)

    def grid(self, height, width):
        """Token grid (h, w) of an image of ``height`` x ``width``."""
        return grid_after(windows_of((self.soft_split0, self.soft_split1, self.soft_split2)), height, width)

    def obstacle(self):
        """The first reason why a soft split is not fused with the layer behind it, or ``None``."""
        return stages_obstacle(self, "transformer1", "transformer2", "project")

    def forward(self, x):
        """(B, C, H, W) -> (B, h*w, token_len)."""
        return self._stages(x)[-1][0]

    def forward_with_grid(self, x):
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        return self._stages(x)[-1]

    def _stages(self, x):
        check_tensor("Tokens2Token", "x", x, ndim=4)
        splits = (self.soft_split0, self.soft_split1, self.soft_split2)
        return walk(x, splits, (self.transformer1, self.transformer2), self.project)


class PatchTokenization(nn.Module):
    """Square, non-overlapping patches by unfold and Linear: (B, C, H, W) -> (B, tokens, token_len)."""

    def __init__(self, img_size=(1, 60, 100), patch_size=50, token_len=768):
        super().__init__()
        check_options("PatchTokenization", locals())
        channels, height, width = check_image("PatchTokenization", img_size)
        self.patch_size = patch_size
        self.grid_size = self.grid(height, width)
        self.num_tokens = self.grid_size[0] * self.grid_size[1]
        self.split = Unfold(patch_size, stride=patch_size)
        self.project = nn.Linear(channels * patch_size**2, token_len)

    def grid(self, height, width):
        """Token grid (h, w); an error unless the patch divides the image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"PatchTokenization: patch_size {self.patch_size} must divide the image, "
                f"got height {height}, width {width}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, x):
        """(B, C, H, W) -> (B, h*w, token_len)."""
        return self.forward_with_grid(x)[0]

    def forward_with_grid(self, x):
        """As :meth:`forward`, and the grid (h, w) of the tokens."""
        check_tensor("PatchTokenization", "x", x, ndim=4)
        self.grid(*x.shape[2:])
        return walk(x, (self.split,), (), self.project)[-1]


class ViTBackbone(nn.Module):
    """Class token, frozen sinusoidal positions, :class:`Encoding` blocks, norm, and a head on the class token."""

    def __init__(
        self,
        preds=1,
        token_len=768,
        grid_size=(4, 4),
        num_heads=1,
        Encoding_hidden_chan_mul=4.0,
        depth=12,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        check_options("ViTBackbone", locals())
        self.grid_size = check_pair("ViTBackbone", "grid_size", grid_size, minimum=1)
        entries = self.grid_size[0] * self.grid_size[1] + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, token_len))
        self.pos_embed = nn.Parameter(sinusoid_table(entries, token_len), requires_grad=False)
        options = dict(
            num_heads=num_heads,
            hidden_chan_mul=Encoding_hidden_chan_mul,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            act_layer=act_layer,
            norm_layer=norm_layer,
        )
        self.blocks = nn.ModuleList(Encoding(token_len, **options) for _ in range(depth))
        self.norm = norm_layer(token_len)
        self.head = nn.Linear(token_len, preds)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, tokens, grid=None):
        """Tokens (B, h*w, token_len) -> (B, preds); positions are resized if ``grid`` is not the stored one."""
        table = resize_position_table(self.pos_embed, self.grid_size, self.grid_size if grid is None else grid)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1) + table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ViTModel(nn.Module):
    """Patch tokens and :class:`ViTBackbone`: (B, C, H, W) -> (B, preds); any H and W that the patch divides."""

    def __init__(
        self,
        img_size=(1, 400, 100),
        patch_size=50,
        token_len=768,
        preds=1,
        num_heads=1,
        Encoding_hidden_chan_mul=4.0,
        depth=12,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        check_options("ViTModel", locals())
        self.patch_tokens = PatchTokenization(img_size, patch_size, token_len)
        self.windows = (square(patch_size, patch_size, 0),)
        self.backbone = ViTBackbone(
            preds,
            token_len,
            self.patch_tokens.grid_size,
            num_heads,
            Encoding_hidden_chan_mul,
            depth,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.apply(init_weights)

    def forward(self, x):
        return self.backbone(self.patch_tokens(x), grid_after(self.windows, *x.shape[2:]))


class T2TViT(nn.Module):
    """:class:`Tokens2Token` and :class:`ViTBackbone`: (B, C, H, W) -> (B, preds)."""

    def __init__(
        self,
        img_size=(1, 1700, 500),
        softsplit_kernels=(31, 3, 3),
        preds=1,
        token_len=768,
        token_chan=64,
        num_heads=1,
        T2T_hidden_chan_mul=1.0,
        Encoding_hidden_chan_mul=4.0,
        depth=12,
        qkv_bias=False,
        qk_scale=None,
        act_layer=nn.GELU,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        check_options("T2TViT", locals())
        self.tokens_to_token = Tokens2Token(
            img_size,
            softsplit_kernels,
            num_heads,
            token_chan,
            token_len,
            T2T_hidden_chan_mul,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.windows = self.tokens_to_token.windows
        self.vit_backbone = ViTBackbone(
            preds,
            token_len,
            self.tokens_to_token.grid_size,
            num_heads,
            Encoding_hidden_chan_mul,
            depth,
            qkv_bias,
            qk_scale,
            act_layer,
            norm_layer,
        )
        self.apply(init_weights)

    def forward(self, x):
        return self.vit_backbone(self.tokens_to_token(x), grid_after(self.windows, *x.shape[2:]))
