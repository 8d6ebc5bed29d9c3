"""Position tables: the sinusoid that T2T-ViT freezes, and resizing to another grid, square or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from ..ops._common.transforms import active, is_exporting


def sinusoid_table(positions: int, width: int) -> torch.Tensor:
    """Sinusoidal table (1, positions, width) in float32, computed in float64.

    Entry (p, j) is sin (j even) or cos (j odd) of ``p / 10000 ** (2 * (j // 2) / width)``. Source: "Attention is all
    you need", section 3.5; upstream ``get_sinusoid_encoding``.
    """
    column = torch.arange(width, dtype=torch.float64)
    rate = torch.pow(10000.0, -2 * torch.div(column, 2, rounding_mode="floor") / width)
    angle = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * rate
    table = torch.where(column % 2 == 0, angle.sin(), angle.cos())
    return table.float().unsqueeze(0)


def same_grid(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two grids are equal; during an export with dynamic sizes, whether they are equal for all sizes."""
    sizes = (*first, *second)
    if not any(isinstance(n, torch.SymInt) for n in sizes) and not is_exporting():
        return tuple(first) == tuple(second)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def resize_position_table(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], extra: int = 1, mode: str = "bicubic"
) -> torch.Tensor:
    """A position table for another grid: the entries of extra tokens kept, the grid interpolated.

    Args:
        table: (1, extra + h*w, width).
        old_grid, new_grid: (h, w).
        extra: leading entries that are not on the grid (class and distillation token).
        mode: "bicubic" (upstream ``utils.py``, mmpretrain) or "bilinear" (upstream ``models/vit.py``).

    Returns:
        (1, extra + h'*w', width) in the table's dtype; the table itself if the grid is the same.
    """
    if same_grid(old_grid, new_grid):
        return table
    if table.shape[1] != extra + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"resize_position_table: table must have {extra} + {old_grid[0]} x {old_grid[1]} entries, "
            f"got {table.shape[1]}"
        )
    dtype = table.dtype if table.dtype == torch.float64 else torch.float32
    head, body = table[:, :extra], table[:, extra:]
    image = body.to(dtype).transpose(1, 2).unflatten(2, tuple(old_grid))
    image = F.interpolate(image, size=tuple(new_grid), mode=mode, align_corners=False)
    return torch.cat([head, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def square_grid(entries: int, extra: int = 1) -> tuple[int, int]:
    """The square grid (h, w) of a position table with ``entries`` entries.

    Raises:
        ValueError: the number of entries without the extra ones is no square.
    """
    area = entries - extra
    side = round(area**0.5)
    if side * side != area:
        raise ValueError(f"a position table of {extra} + {area} entries has no square grid; give the grid")
    return side, side


class _AddPositions(torch.autograd.Function):
    """One pass over the tokens, forward and backward."""

    @staticmethod
    def forward(tokens: torch.Tensor, extra: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        count = extra.shape[1]
        dtype = torch.promote_types(tokens.dtype, torch.promote_types(extra.dtype, table.dtype))
        shape = tokens.shape[0], count + tokens.shape[1], tokens.shape[2]
        out = torch.empty(shape, dtype=dtype, device=tokens.device)
        out[:, :count] = extra + table[:, :count]
        torch.add(tokens, table[:, count:], out=out[:, count:])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.count, ctx.dtypes = inputs[1].shape[1], [t.dtype for t in inputs]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        needed, (tokens, extra, table) = ctx.needs_input_grad, ctx.dtypes
        return (
            grad[:, ctx.count :].to(tokens) if needed[0] else None,
            grad[:, : ctx.count].sum(0, keepdim=True).to(extra) if needed[1] else None,
            grad.sum(0, keepdim=True).to(table) if needed[2] else None,
        )


def add_positions(tokens: torch.Tensor, extra: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Tokens with extra ones in front, plus a position table.

    Args:
        tokens: (B, L, D); extra: (1, E, D), the same for every sample; table: (1, E + L, D).

    Returns:
        (B, E + L, D) in the widest of the three dtypes.
    """
    if isinstance(tokens, Proxy) or torch.compiler.is_compiling() or is_exporting() or active() is not None:
        return torch.cat([extra.expand(tokens.shape[0], -1, -1), tokens], dim=1) + table
    found: torch.Tensor = _AddPositions.apply(tokens, extra, table)
    return found
