"""The base of all classification models here: extra tokens, positions for any grid, blocks, norm, pooling, head.

It has the methods that timm's tools call, but does not need timm; ``t2t_fast.timm`` registers the models there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from ..errors import as_size, check_bool, check_pair
from ..modules import fusion, remembered
from ..modules.block import Fused
from ..modules.options import check_choice, check_options
from ..modules.t2t_module import Stage
from ..ops._common.spec import Window, grid_after
from ..ops._common.windows import as_image
from .blocks import BLOCKS, block_stack
from .position import add_positions, resize_position_table, same_grid, sinusoid_table

POOLS = ("token", "avg", "")
FORMATS = ("NCHW", "NLC")


def init_weights(module: nn.Module) -> None:
    """Upstream's initialisation: Linear weights truncated normal (std 0.02), biases 0, LayerNorm identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def check_pool(owner: str, global_pool: str, distilled: bool) -> None:
    """Raise unless ``global_pool`` is one of a model with, or without, a distillation token."""
    check_choice(owner, "global_pool", global_pool, POOLS)
    if distilled and global_pool == "avg":
        raise ValueError(
            f"{owner}: global_pool must be 'token' or '' with distilled, whose heads read one token each, got 'avg'"
        )


def check_model(owner: str, options: Mapping[str, Any]) -> None:
    """Check a classification model's arguments, name -> value, before anything is built.

    Raises:
        TypeError, ValueError: an option of the wrong type or value; the text begins with ``owner``.
    """
    check_options(owner, options)
    check_pair(owner, "img_size", options["img_size"], minimum=1)
    check_choice(owner, "block", options["block"], tuple(BLOCKS))
    check_pool(owner, options["global_pool"], options.get("distilled", False))
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
        stages: module name and width of the tokens after each window but the last.
        in_chans, num_classes: channels of the image; classes, 0 for no head.
        global_pool: what the head gets: "token", the class token; "avg", the mean of the grid's tokens; "", all tokens.
        learned_positions: a learned table, initialised randomly, instead of the frozen sinusoid.
        distilled: a second extra token.
        others: as upstream's models.

    Attributes:
        num_features: width of :meth:`forward_features`; head_hidden_size: width of the head's input.
        feature_info: of each intermediate (:meth:`forward_intermediates`) its ``num_chs``, ``reduction`` (stride) and
            ``module``.
        grad_checkpointing: see :meth:`set_grad_checkpointing`.
    """

    block_classes: Mapping[str, type[nn.Module]] = BLOCKS
    dynamic_img_size = True
    """Images of any size are accepted (timm's attribute)."""
    head: nn.Module
    heads: tuple[str, ...] = ("head",)
    """Names of the classifiers."""

    def __init__(
        self,
        name: str,
        tokeniser: nn.Module,
        *,
        windows: Sequence[Window],
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
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
        stages: Sequence[tuple[str, int]] = (),
        global_pool: str = "token",
        learned_positions: bool = False,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.grad_checkpointing = False
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
        self.blocks, widths = block_stack(
            block, embed_dim, depth, drop_path_rate, growth_rate, block_config, options, self.block_classes
        )
        self.num_features = self.head_hidden_size = widths[-1] if widths else embed_dim
        self.norm = norm_layer(self.num_features)
        strides = list(accumulate((max(window.stride) for window in windows), mul))
        places = [*stages, *((f"blocks.{index}", width) for index, width in enumerate(widths))]
        strides += strides[-1:] * len(widths)
        self._first = len(stages)  # number of the first block's output among the intermediates
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": module}
            for (module, width), stride in zip(places, strides, strict=False)
        ]

    def _initialise(self) -> None:
        """Initialise all weights; subclasses call it at the end of their constructors."""
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None and token.requires_grad:
                nn.init.trunc_normal_(token, std=0.02)
        self.apply(init_weights)

    def _make_head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.num_classes) if self.num_classes > 0 else nn.Identity()

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

        The tokeniser is called as a module, so its hooks and wrappers run; the grid follows from :attr:`windows`. A
        trace of torch.fx, which knows no sizes, gets the grid of :attr:`grid_size`.
        """
        tokens = self.tokeniser(x)
        return tokens, self.grid_size if isinstance(x, Proxy) else grid_after(self.windows, *x.shape[2:])

    def _extra(self) -> torch.Tensor:
        """The extra tokens, (1, extra, embed_dim)."""
        return self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)

    def encode(self, tokens: torch.Tensor, grid: tuple[int, int], kept: slice = slice(None)) -> torch.Tensor:
        """Tokens (B, h*w, embed_dim) -> normalised (B, extra + h*w, num_features), or those of them that are ``kept``.

        The others are not normalised, unless a hook could see them.
        """
        extra = self._extra()
        table = self.positions(grid)
        encode = partial(self._encode, tokens, extra, table, kept)
        if isinstance(tokens, Proxy) or not remembered.replays(tokens):
            return encode()
        call = self._dependencies(tokens, extra, table, kept)
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
            x = self._run(block, x)
        plain = fusion.layer_norm(self.norm) is None and not fusion.watched()
        return self.norm(x[:, kept]) if plain else self.norm(x)[:, kept]

    def _run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A block's output; with :attr:`grad_checkpointing` its intermediate tensors are computed again in backward."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not isinstance(x, Proxy):
            again: torch.Tensor = checkpoint(block, x, use_reentrant=False)
            return again
        return block(x)

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

    def stages(self, x: torch.Tensor) -> list[Stage]:
        """Tokens and grid after each window: a list of ((B, L, C), (h, w))."""
        if len(self.windows) == 1:
            return [self.tokens(x)]
        found: list[Stage] = self.tokeniser(x, stages=True)
        return found

    def forward_stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps for dense prediction: a list of (B, C, h, w), for a T2T module at strides 4, 8 and 16.

        All but the last are the T2T module's tokens (token_dim channels), the last is the backbone's normalised tokens
        (num_features channels). A patch tokeniser has only the last.
        """
        *early, (tokens, grid) = self.stages(x)
        last = self.encode(tokens, grid, slice(self.extra_tokens, None)), grid
        return [as_image(tokens, grid) for tokens, grid in (*early, last)]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The features and intermediate feature maps of an image (B, in_chans, H, W).

        Intermediates are numbered by depth: the tokens after each soft split but the last (of a T2T module two, at
        strides 4 and 8; of a patch tokeniser none), then the output of each of ``blocks``. :attr:`feature_info`
        describes them in this order.

        Args:
            indices: numbers of intermediates, negative ones from the end; an int: the last n; ``None``: all.
            return_prefix_tokens: pairs of a map and the class (and distillation) tokens (B, extra, C) with it; tokens
                of soft splits have none, (B, 0, C).
            norm: apply the final norm to the blocks' outputs; only to those of its width (a dense model has others).
            stop_early: do not compute what lies behind the last intermediate; only with ``intermediates_only``.
            output_fmt: "NCHW": maps (B, C, h, w); "NLC": tokens (B, h*w, C).
            intermediates_only: return the intermediates alone.
            output_dict: return a dict with ``image_intermediates``, and, if asked for, ``image_features`` and
                ``image_intermediates_prefix``.

        Returns:
            (features, intermediates), features as :meth:`forward_features`; a list of intermediates, in the order of
            ``indices``; or a dict.

        Raises:
            TypeError, ValueError: a bad index or format, or a norm that does not fit.
        """
        owner = f"{type(self).__name__}.forward_intermediates"
        check_choice(owner, "output_fmt", output_fmt, FORMATS)
        taken = self._taken(owner, indices)
        first = self._first
        if norm:
            self._check_norm(owner, [index for index in taken if index >= first])
        stages = self.stages(x)
        features: torch.Tensor | None = None
        maps: dict[int, tuple[torch.Tensor, tuple[int, int]]] = dict(enumerate(stages[:-1]))
        prefixes = {index: tokens[:, :0] for index, (tokens, _) in maps.items()}
        behind = max(taken) + 1 - first if stop_early and intermediates_only else len(self.blocks)
        if behind > 0 or not intermediates_only:
            tokens, grid = stages[-1]
            x = self.pos_drop(add_positions(tokens, self._extra(), self.positions(grid)))
            for index, block in enumerate(self.blocks[: max(0, behind)], start=first):
                x = self._run(block, x)
                if index in taken:
                    out = self.norm(x) if norm else x
                    prefixes[index], maps[index] = out[:, : self.extra_tokens], (out[:, self.extra_tokens :], grid)
            features = None if intermediates_only else self.norm(x)
        found = [as_image(*maps[index]) if output_fmt == "NCHW" else maps[index][0] for index in taken]
        before = [prefixes[index] for index in taken]
        if output_dict:
            results: dict[str, Any] = {"image_intermediates": found}
            if return_prefix_tokens:
                results["image_intermediates_prefix"] = before
            return results if intermediates_only else {**results, "image_features": features}
        result: list[Any] = list(zip(found, before, strict=True)) if return_prefix_tokens else found
        return result if intermediates_only else (features, result)

    def _taken(self, owner: str, indices: int | Sequence[int] | None) -> list[int]:
        """The numbers of intermediates from the beginning, for ``indices`` of :meth:`forward_intermediates`."""
        total = self._first + len(self.blocks)
        if indices is None:
            return list(range(total))
        count = as_size(indices)
        if count is not None:
            if not 0 < count <= total:
                raise ValueError(f"{owner}: indices must be from 1 to {total} if it is one number, got {indices}")
            return list(range(total - count, total))
        if not isinstance(indices, Sequence) or not indices or any(as_size(each) is None for each in indices):
            raise TypeError(f"{owner}: indices must be an int, a sequence of ints or None, got {indices!r}")
        for each in indices:
            if not -total <= each < total:
                raise ValueError(f"{owner}: indices must be from {-total} to {total - 1}, got {each}")
        return [each % total for each in indices]

    def _check_norm(self, owner: str, indices: Sequence[int]) -> None:
        if isinstance(self.norm, nn.Identity):
            raise ValueError(f"{owner}: norm must be False, since the model's norm was pruned")
        for index in indices:
            info = self.feature_info[index]
            if info["num_chs"] != self.num_features:
                raise ValueError(
                    f"{owner}: norm must be False for {info['module']} (index {index}), which has {info['num_chs']} "
                    f"channels; the norm has {self.num_features}"
                )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what :meth:`forward_intermediates` does not need for these ``indices``: later blocks, norm, head.

        Returns:
            the indices as numbers from the beginning, which stay valid.
        """
        taken = self._taken(f"{type(self).__name__}.prune_intermediate_layers", indices)
        self.blocks = self.blocks[: max(0, max(taken) + 1 - self._first)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """All normalised tokens of an image (B, in_chans, H, W): (B, extra + h*w, num_features), extra ones first.

        Upstream's method of this name returns the class token alone, here ``forward_head(..., pre_logits=True)``.
        """
        return self.encode(*self.tokens(x))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, extra + h*w, C) as :attr:`global_pool` says: (B, C), or all of them."""
        if self.global_pool == "token":
            return x[:, 0]
        return x[:, self.extra_tokens :].mean(1) if self.global_pool == "avg" else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> Any:
        """(B, extra + h*w, num_features) -> logits, or, with ``pre_logits``, the head's input."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes); without pooling (B, extra + h*w, num_classes)."""
        kept = slice(self.extra_tokens) if self.global_pool == "token" else slice(None)
        return self.forward_head(self.encode(*self.tokens(x), kept))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head for ``num_classes``; 0 leaves the head out.

        Args:
            global_pool: another :attr:`global_pool`; ``None`` keeps it.
        """
        owner = type(self).__name__
        check_options(owner, {"num_classes": num_classes})
        if global_pool is not None:
            check_pool(owner, global_pool, self.dist_token is not None)
            self.global_pool = global_pool
        self.num_classes = num_classes
        for name in self.heads:
            if getattr(self, name) is not None:
                head = self._make_head(self.head_hidden_size)
                init_weights(head)
                setattr(self, name, head.to(self.cls_token).train(self.training))

    def get_classifier(self) -> Any:
        """The classifier; a tuple if there are several."""
        return self.get_submodule("head")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the grid's, :attr:`extra_tokens` under timm's name."""
        return self.extra_tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the blocks' inputs and computes the rest again in backward (not the tokeniser's;
        see ``recompute`` of :class:`T2TModule`).
        """
        check_bool(f"{type(self).__name__}.set_grad_checkpointing", "enable", enable)
        self.grad_checkpointing = enable

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Store the position table for another image size, as :meth:`positions` computes it for calls of that size.

        The table is a new parameter: make the optimizer afterwards.

        Args:
            img_size: int or (H, W); ``None`` changes nothing.
            patch_size: the product of the windows' strides, which cannot change; another one is a ``ValueError``.
        """
        owner = f"{type(self).__name__}.set_input_size"
        if patch_size is not None:
            height, width = (tuple(accumulate((w.stride[axis] for w in self.windows), mul))[-1] for axis in (0, 1))
            if check_pair(owner, "patch_size", patch_size, minimum=1) != (height, width):
                raise ValueError(f"{owner}: patch_size must stay {height} x {width}, got {patch_size!r}")
        if img_size is None:
            return
        size = check_pair(owner, "img_size", img_size, minimum=1)
        grid = self.tokeniser.grid(*size)
        with torch.no_grad():
            table = self.positions(grid).clone()
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid
        self.tokeniser.img_size = size
        for name in ("_traits", "_model_args"):  # timm's records of how to prepare images and to build the model again
            record = getattr(self, name, None)
            if record is not None:
                setattr(self, name, {**record, "img_size": size})

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for timm's layer-wise learning rates.

        The tokeniser, the extra tokens and the positions are the first group, then each block with the next number;
        ``norm`` belongs to the last block. What is not matched (the heads) is the last group.
        """
        return {
            "stem": rf"^cls_token|^dist_token|^pos_embed|^{self._tokeniser_name}\.",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that upstream's recipes exempt from weight decay."""
        return {"cls_token"}
