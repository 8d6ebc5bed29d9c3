"""The base of all classification models here: extra tokens, positions for any grid, blocks, norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import check_pair
from ..modules import fusion, remembered
from ..modules.block import Fused
from ..modules.options import check_choice, check_options
from ..ops._common.spec import Window, grid_after
from .blocks import BLOCKS, block_stack
from .position import add_positions, resize_position_table, same_grid, sinusoid_table


def init_weights(module: nn.Module) -> None:
    """Upstream's initialisation: Linear weights truncated normal (std 0.02), biases 0, LayerNorm identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def check_model(owner: str, options: Mapping[str, Any]) -> None:
    """Check a classification model's arguments, name -> value, before anything is built.

    Raises:
        TypeError, ValueError: an option of the wrong type or value; the text begins with ``owner``.
    """
    check_options(owner, options)
    check_pair(owner, "img_size", options["img_size"], minimum=1)
    check_choice(owner, "block", options["block"], tuple(BLOCKS))
    width, heads = options["embed_dim"], options["num_heads"]
    if width % heads:
        raise ValueError(f"{owner}: num_heads must divide embed_dim, got embed_dim={width}, num_heads={heads}")


class Backbone(nn.Module):
    """A transformer on the tokens of a tokeniser; subclasses add the classifier.

    The tokeniser (performer, transformer, convolution, patch) and the block (plain, SE, ghost, dense; depth, width,
    heads) are independent choices.

    Args:
        name: attribute under which the tokeniser is kept (it prefixes the parameter names).
        tokeniser: module with ``forward(image) -> tokens``.
        windows: the tokeniser's windows, one a soft split; the token grid follows from them.
        img_size: int or (H, W) that the position table is made for.
        learned_positions: a learned table, initialised randomly, instead of the frozen sinusoid.
        distilled: a second extra token.
        others: as upstream's models.
    """

    block_classes: Mapping[str, type[nn.Module]] = BLOCKS

    def __init__(
        self,
        name: str,
        tokeniser: nn.Module,
        *,
        windows: Sequence[Window],
        img_size: int | tuple[int, int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        norm_layer: Callable[..., nn.Module],
        block: str = "plain",
        growth_rate: int = 32,
        block_config: Sequence[int] = (3, 4, 6, 3),
        learned_positions: bool = False,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.windows = windows
        self.grid_size = grid_after(windows, *check_pair(type(self).__name__, "img_size", img_size, minimum=1))
        self.extra_tokens = 2 if distilled else 1
        self.position_mode = "bicubic"
        self._tokeniser_name = name

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        entries = self.grid_size[0] * self.grid_size[1] + self.extra_tokens
        table = torch.zeros(1, entries, embed_dim) if learned_positions else sinusoid_table(entries, embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=learned_positions)
        self.add_module(name, tokeniser)
        self.pos_drop = nn.Dropout(drop_rate)
        options = dict(
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
        )
        self.blocks, self.num_features = block_stack(
            block, embed_dim, depth, drop_path_rate, growth_rate, block_config, options, self.block_classes
        )
        self.norm = norm_layer(self.num_features)

    def _initialise(self) -> None:
        """Initialise all weights; subclasses call it at the end of their constructors."""
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None and token.requires_grad:
                nn.init.trunc_normal_(token, std=0.02)
        self.apply(init_weights)

    @property
    def tokeniser(self) -> Any:
        """The module that turns an image into tokens."""
        return getattr(self, self._tokeniser_name)

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The position table for a grid (h, w), (1, extra + h*w, embed_dim).

        The stored table if the model was built for this grid. Otherwise :attr:`position_mode` decides: "bicubic" and
        "bilinear" interpolate the stored table, "sinusoid" computes the table of a new model of that size.
        """
        if same_grid(grid, self.grid_size):
            return self.pos_embed
        if self.position_mode == "sinusoid":
            table = sinusoid_table(grid[0] * grid[1] + self.extra_tokens, self.embed_dim)
            return table.to(self.pos_embed)
        return resize_position_table(self.pos_embed, self.grid_size, grid, self.extra_tokens, self.position_mode)

    def tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Tokens (B, h*w, embed_dim) of an image (B, C, H, W), and their grid (h, w).

        The tokeniser is called as a module, so its hooks and wrappers run; the grid follows from :attr:`windows`.
        """
        return self.tokeniser(x), grid_after(self.windows, *x.shape[2:])

    def encode(self, tokens: torch.Tensor, grid: tuple[int, int], kept: slice = slice(None)) -> torch.Tensor:
        """Tokens (B, h*w, embed_dim) -> normalised (B, extra + h*w, num_features), or those of them that are ``kept``.

        The others are not normalised, unless a hook could see them.
        """
        extra = self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)
        table = self.positions(grid)
        encode = partial(self._encode, tokens, extra, table, kept)
        call = self._dependencies(tokens, extra, table, kept) if remembered.replays(tokens) else None
        if call is None:
            return encode()
        found = remembered.entry(self, *call)
        if not remembered.passes(found, self._obstacle):
            return encode()
        out: torch.Tensor = remembered.forward(found, encode, call[0])
        return out

    def _encode(self, tokens: torch.Tensor, extra: torch.Tensor, table: torch.Tensor, kept: slice) -> torch.Tensor:
        x = self.pos_drop(add_positions(tokens, extra, table))
        for block in self.blocks:
            x = block(x)
        plain = fusion.layer_norm(self.norm) is None and not fusion.watched()
        return self.norm(x[:, kept]) if plain else self.norm(x)[:, kept]

    def _dependencies(self, tokens: Any, extra: Any, table: Any, kept: slice) -> remembered.Dependencies | None:
        """What the call depends on, for :func:`remembered.entry`; ``None`` if a child must be called."""
        if fusion.layer_norm(self.norm) is not None or fusion.dropout(self.pos_drop) is not None:
            return None
        tensors = [tokens, extra, table, *fusion.weights(self.norm)]
        options = [kept.start, kept.stop, kept.step, fusion.rate(self.pos_drop), self.norm.eps]
        blocks: Any = self.blocks
        for block in blocks:
            fused = isinstance(block, Fused) and type(block).forward is Fused.forward and not block.parts.called
            call = block.dependencies(tokens) if fused and fusion.difference(block, type(block)) is None else None
            if call is None:
                return None
            (_, *weights), others = call[0]
            tensors += weights
            options += others
        return tensors, tuple(options)

    def _obstacle(self) -> str | None:
        """Why a block is not fused, or ``None``, if all blocks are :class:`Fused`."""
        blocks: Any = self.blocks
        return next((why for block in blocks if (why := block.obstacle()) is not None), None)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that upstream's recipes exempt from weight decay."""
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.get_submodule("head")
