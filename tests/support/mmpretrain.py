"""mmpretrain's T2T-ViT backbone, composed of official parts: the same network with other names and options.

It differs from the official one in its outputs, in resizing its position table for other image sizes, and in the
attention scale: mmpretrain's actual factor is the inverse of the documented one.
"""

import re

import torch
from torch import nn

import t2t_fast
from t2t_fast import reference
from t2t_fast.models.position import resize_position_table

_NAMES = [
    (r"^net\.", ""),
    (r"^blocks\.", "encoder."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]


def upstream_key(key):
    """Our name of a parameter -> mmpretrain's."""
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key


class Backbone(nn.Module):
    """``net`` is a T2T-ViT of either family; ``out_type`` and the rest are mmpretrain's options."""

    def __init__(self, net, out_type="cls_token", out_indices=None, with_cls_token=True, final_norm=True):
        super().__init__()
        self.net = net
        self.out_type = out_type
        self.out_indices = out_indices
        self.with_cls_token = with_cls_token
        if not final_norm:
            net.norm = nn.Identity()
        if not with_cls_token:
            del net.cls_token
            net.cls_token = None
            net.pos_embed = nn.Parameter(net.pos_embed[:, 1:].clone(), requires_grad=False)

    def forward(self, x):
        net = self.net
        extra = int(self.with_cls_token)
        if hasattr(net.tokens_to_token, "forward_with_grid"):
            tokens, grid = net.tokens_to_token.forward_with_grid(x)
        else:
            tokens, grid = net.tokens_to_token(x), tuple(n // 16 for n in x.shape[2:])
        side = round((net.pos_embed.shape[1] - extra) ** 0.5)
        if extra:
            tokens = torch.cat([net.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        y = tokens + resize_position_table(net.pos_embed, (side, side), grid, extra)
        outs = []
        for index, block in enumerate(net.blocks):
            y = block(y)
            last = index == len(net.blocks) - 1
            if last:
                y = net.norm(y)
            if last or (self.out_indices and index in self.out_indices):
                outs.append(self._format(y, grid, extra))
        return outs if self.out_indices else outs[-1]

    def _format(self, y, grid, extra):
        patches = y[:, extra:]
        if self.out_type == "raw":
            return y
        if self.out_type == "featmap":
            return patches.transpose(1, 2).unflatten(2, grid)
        if self.out_type == "avg_featmap":
            return patches.mean(dim=1)
        return y[:, 0]


def build(case, family):
    """The backbone of a golden case, with the attention scale that the case was computed with."""
    options = dict(case["kwargs"])
    heads, hidden = (options["layer_cfgs"][name] for name in ("num_heads", "feedforward_channels"))
    width = options["embed_dims"]
    cls = t2t_fast.T2TViT if family == "fast" else reference.T2T_ViT
    net = cls(
        img_size=options["img_size"],
        tokens_type="transformer",
        num_classes=0,
        embed_dim=width,
        depth=options["num_layers"],
        num_heads=heads,
        mlp_ratio=hidden / width,
        token_dim=options["t2t_cfg"]["token_dims"],
    )
    if case.get("post") != "scale_corrected":
        for layer in (net.tokens_to_token.attention1, net.tokens_to_token.attention2):
            layer.attn.scale = options["t2t_cfg"]["token_dims"] ** 0.5
        for block in net.blocks:
            block.attn.scale = (width // heads) ** 0.5
    rest = {
        name: options[name] for name in ("out_type", "out_indices", "with_cls_token", "final_norm") if name in options
    }
    return Backbone(net, **rest)
