"""Fused forms of other projects' modules around windows: video inpainting, outlook attention.

A fast form calls the module's children as the original does and replaces only what is between them: folds, unfolds, and
the copies that their layouts need. If a child that it skips is hooked, replaced or wrapped, the original ``forward``
runs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from ..functional import fused_fold_unfold, soft_composition, soft_split, soft_split_linear
from ..functional import window as make_window
from ..ops._common.spec import Pair, Window
from . import fusion
from .soft_split import Fold, Unfold
from .t2t_module import stage_obstacle, window_of


class Windowed(nn.Module):
    """A swapped module that runs its original ``forward`` if there is an obstacle."""

    def obstacle(self) -> str | None:
        """Why this module runs its original ``forward``, or ``None``."""
        if fusion.watched():
            return "a hook is registered for all modules"
        return self._obstacle()

    def _obstacle(self) -> str | None:
        return None

    def _unfused(self, *arguments: Any, **named: Any) -> torch.Tensor:
        raise NotImplementedError


def stored_window(module: Any, *names: str) -> Window | None:
    """The window in a module's own attributes: in a dictionary with one of the names, or one by one; else ``None``."""
    for name in names:
        numbers = getattr(module, name, None)
        if isinstance(numbers, dict):
            found = [numbers.get(each) for each in ("kernel_size", "stride", "padding")]
            return None if None in found else make_window(*found, function="swap")  # type: ignore[arg-type]
    return window_of(module)


def skipped_obstacle(module: nn.Module, name: str, kind: type[nn.Module], fast: type[nn.Module]) -> str | None:
    """Why the child ``name``, an ``nn.Fold`` or ``nn.Unfold`` or its fast form, cannot be skipped, or ``None``."""
    child = getattr(module, name)
    why = fusion.difference(child, fast if isinstance(child, fast) else kind)
    return None if why is None else f"{name} {why}"


class FusionFeedForward(Windowed):
    """MLP of video inpainting (FuseFormer, E2FGVI, ProPainter): its hidden tokens are averaged where windows overlap.

    ``second(unfold(fold(first(x)) / fold(ones)))``; between its two children runs :func:`fused_fold_unfold`.
    """

    first, second = "conv1", "conv2"

    def _obstacle(self) -> str | None:
        skipped = ("fold", nn.Fold, Fold), ("unfold", nn.Unfold, Unfold)
        found = [skipped_obstacle(self, name, kind, fast) for name, kind, fast in skipped]
        inner: Any = self
        if window_of(inner.fold) != window_of(inner.unfold):
            found.append("fold and unfold have different windows")
        return next((why for why in found if why), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, t*h*w, dim), the concatenated tokens of t frames -> the same shape."""
        if self.obstacle() is not None:
            return self._unfused(x)
        fold: Any = self.fold
        window: Any = window_of(fold)
        return self._averaged(x, fold.output_size, window)

    def _averaged(self, x: torch.Tensor, size: Pair, window: Window) -> torch.Tensor:
        hidden: torch.Tensor = getattr(self, self.first)(x)
        height, width = (size, size) if isinstance(size, int) else size
        length = prod(window.grid(height, width))
        frames = hidden.reshape(-1, length, hidden.shape[-1])
        out: torch.Tensor = getattr(self, self.second)(
            fused_fold_unfold(frames, (height, width), *window).view(hidden.shape)
        )
        return out


class FusionMlp(FusionFeedForward):
    """The same with the children ``fc1`` and ``fc2``."""

    first, second = "fc1", "fc2"


class SizedFusionFeedForward(FusionFeedForward):
    """The same for any image size, a further argument; the window is in ``t2t_params`` (E2FGVI-HQ)."""

    def _obstacle(self) -> str | None:
        return None

    def forward(self, x: torch.Tensor, output_size: Pair) -> torch.Tensor:  # type: ignore[override]
        """(B, t*h*w, dim) and the (H, W) of the image between the children -> the same shape."""
        window = stored_window(self, "t2t_params")
        if window is None or self.obstacle() is not None:
            return self._unfused(x, output_size)
        return self._averaged(x, output_size, window)


class SizedFusionMlp(SizedFusionFeedForward):
    """The same with the children ``fc1`` and ``fc2`` (ProPainter)."""

    first, second = "fc1", "fc2"


class SplitEmbedding(Windowed):
    """Soft split and Linear of t frames (``SoftSplit`` of FuseFormer): images (B*t, C, H, W) -> (B, t*h*w, dim)."""

    def _obstacle(self) -> str | None:
        names = "t2t", "embedding"
        split, layer = (getattr(self, name) for name in names)
        return stage_obstacle(split, layer, window_of(split), names)

    def forward(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """Images (b*t, C, H, W) and the batch size b -> tokens."""
        if self.obstacle() is not None:
            return self._unfused(x, b)
        inner: Any = self
        tokens = self._tokens(x)
        tokens = tokens.view(b, -1, tokens.shape[2])
        return inner.dropout(tokens) if "dropout" in self._modules else tokens

    def _tokens(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.embedding
        window: Any = window_of(self.t2t)  # type: ignore[arg-type]
        return soft_split_linear(x, layer.weight, layer.bias, *window)


class GridEmbedding(SplitEmbedding):
    """The same with the tokens on the grid that is stored as ``f_h``, ``f_w`` (E2FGVI): (B, t, h, w, dim)."""

    def forward(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """Images (b*t, C, H, W) and the batch size b -> tokens (b, t, h, w, dim)."""
        if self.obstacle() is not None:
            return self._unfused(x, b)
        inner: Any = self
        return self._tokens(x).unflatten(1, (inner.f_h, inner.f_w)).unflatten(0, (b, -1))


class SizedGridEmbedding(SplitEmbedding):
    """The same for any image size, a further argument (E2FGVI-HQ, ProPainter): (B, t, h, w, dim)."""

    def forward(self, x: torch.Tensor, b: int, output_size: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """Images (b*t, C, H, W), the batch size b and (H, W) -> tokens (b, t, h, w, dim)."""
        if self.obstacle() is not None:
            return self._unfused(x, b, output_size)
        window: Any = window_of(self.t2t)  # type: ignore[arg-type]
        return self._tokens(x).unflatten(1, window.grid(*output_size)).unflatten(0, (b, -1))


class Composition(Windowed):
    """Linear, fold and convolution (``SoftComp`` of E2FGVI-HQ, ProPainter): (B, t, h, w, dim) -> (B*t, C, H, W)."""

    def forward(self, x: torch.Tensor, t: int, output_size: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, t, h, w, dim), their number of frames t and (H, W) -> images (B*t, C, H, W)."""
        window = stored_window(self)
        if window is None or self.obstacle() is not None:
            return self._unfused(x, t, output_size)
        inner: Any = self
        tokens = inner.embedding(x.reshape(x.shape[0], -1, x.shape[-1]))
        tokens = tokens.reshape(x.shape[0] * t, -1, tokens.shape[2])
        out: torch.Tensor = inner.bias_conv(soft_composition(tokens, output_size, *window).contiguous())
        return out


class SplitLayer(Windowed):
    """Soft split and a Performer or Transformer layer behind it (``SWT4`` of PTNet), fused as in a T2T module."""

    def _obstacle(self) -> str | None:
        names = "sw", "transformer"
        split, layer = (getattr(self, name) for name in names)
        return stage_obstacle(split, layer, window_of(split), names)

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """(B, C, H, W) -> tokens (B, h*w, dim); with other arguments the original ``forward`` runs."""
        if others or named or self.obstacle() is not None:
            return self._unfused(x, *others, **named)
        inner: Any = self
        out: torch.Tensor = inner.transformer(x, window=window_of(inner.sw))
        return out


class OutlookAttention(Windowed):
    """Outlook attention (VOLO, Yuan et al., 2021): weights of each k x k window from its centre alone.

    The windows of ``v`` stay tokens, so neither they, nor the weights, nor the result are copied into another layout.
    """

    def _obstacle(self) -> str | None:
        why = fusion.dropout(self.attn_drop)
        return f"attn_drop {why}" if why else skipped_obstacle(self, "unfold", nn.Unfold, Unfold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) -> the same shape."""
        if x.ndim != 4 or self.obstacle() is not None:
            return self._unfused(x)
        inner: Any = self
        batch, height, width, _ = x.shape
        window: Any = window_of(inner.unfold)
        heads, taps = inner.num_heads, window.taps
        v = soft_split(inner.v(x).flatten(1, 2), *window, grid=(height, width))
        v = v.view(batch, v.shape[1], heads, -1, taps)
        weights = inner.attn(inner.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        weights = weights.reshape(batch, v.shape[1], heads, taps, taps) * inner.scale
        weights = inner.attn_drop(weights.softmax(-1))
        tokens = (v @ weights.mT).flatten(2)
        image = soft_composition(tokens, (height, width), *window)
        out: torch.Tensor = inner.proj_drop(inner.proj(image.permute(0, 2, 3, 1)))
        return out
