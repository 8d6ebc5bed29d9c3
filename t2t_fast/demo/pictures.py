"""The report's pictures of the photograph: input, windows, tokens, and images made from tokens."""

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..functional import soft_composition, soft_split
from ..ops._common.spec import T2T_WINDOWS
from .photo import Photo, as_pixels
from .style import AFTER, INK, picture, subplots

COLOURS = ("#0a7d72", "#d9822b", "#6b4fbb", "#c8323a", "#2f6fde", "#7a8b00", "#b8478f", "#00838f", "#8d5524")
KERNEL, STRIDE, PADDING = FIRST = tuple(side for side, _ in T2T_WINDOWS[0])
"""The window of the first soft split."""
COUNT = 3
"""``COUNT`` x ``COUNT`` neighbouring windows are shown enlarged."""


def photo_figure(photo: Photo, x: torch.Tensor) -> Figure:
    """The file with the square that is used, beside the model's input."""
    figure, (left, right) = subplots(9, 4.9, 1, 2)
    width, height = photo.image.size
    picture(left, photo.image, f"{photo.name}, {width} × {height} pixels", interpolation="antialiased")
    x0, y0, x1, y1 = photo.box
    left.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=AFTER, linewidth=2))
    side = x.shape[-1]
    picture(right, as_pixels(x[0]), f"the model's input: {side} × {side}, ImageNet normalisation")
    return figure


def busiest(x: torch.Tensor, side: int) -> tuple[int, int]:
    """Top and left of a square of ``side`` pixels with much detail near the middle, on the first split's grid."""
    detail = torch.zeros_like(x[:, :1]).cpu()
    detail[..., :-1] += x.diff(dim=-1).abs().mean(1, keepdim=True).cpu()
    detail[..., :-1, :] += x.diff(dim=-2).abs().mean(1, keepdim=True).cpu()
    score = torch.nn.functional.avg_pool2d(detail, side, STRIDE)[0, 0]
    place = torch.linspace(-1, 1, score.shape[0])
    nearness = torch.exp(-2 * (place[:, None] ** 2 + place[None] ** 2))
    row, column = divmod(int((score * nearness).argmax()), score.shape[1])
    return STRIDE * row, STRIDE * column


def zoom_tokens(x: torch.Tensor) -> tuple[int, int]:
    """Token row and column of the first window that is shown enlarged."""
    top, left = busiest(x, KERNEL + STRIDE * (COUNT - 1))
    return (top + PADDING) // STRIDE, (left + PADDING) // STRIDE


def windows_figure(x: torch.Tensor, first: tuple[int, int]) -> Figure:
    """The photograph with the centres of all windows, and neighbouring windows enlarged."""
    pixels, side = as_pixels(x[0]), x.shape[-1]
    top, left = (index * STRIDE - PADDING for index in first)
    extent = KERNEL + STRIDE * (COUNT - 1)
    figure, (whole, near) = subplots(9.6, 4.9, 1, 2)
    centres = torch.arange(0, side + 2 * PADDING - KERNEL + 1, STRIDE) - PADDING + KERNEL // 2
    picture(whole, pixels, f"{len(centres) ** 2:,} windows of {KERNEL} × {KERNEL}, one every {STRIDE} pixels")
    grid = torch.cartesian_prod(centres, centres).numpy()
    whole.plot(grid[:, 0], grid[:, 1], ".", color="white", markersize=1.2, alpha=0.55)
    whole.add_patch(Rectangle((left - 0.5, top - 0.5), extent, extent, fill=False, edgecolor="#ffd54a", linewidth=2.2))
    whole.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))

    picture(near, pixels, f"the yellow square: {COUNT**2} windows, neighbours share {KERNEL - STRIDE} pixels")
    halo = [withStroke(linewidth=5, foreground="white")]
    for index, colour in enumerate(COLOURS[: COUNT**2]):
        y, z = top + STRIDE * (index // COUNT), left + STRIDE * (index % COUNT)
        inset = 0.14 * (index % 3)  # keeps the edges of neighbours apart
        box = (z - 0.5 + inset, y - 0.5 + inset), KERNEL - 2 * inset, KERNEL - 2 * inset
        near.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=2.8, path_effects=halo))
        marker = dict(color=colour, markersize=9, markeredgecolor="white", markeredgewidth=1.5, zorder=5)
        near.plot(z + KERNEL // 2, y + KERNEL // 2, "o", **marker)
    near.set(xlim=(left - 1.5, left + extent + 0.5), ylim=(top + extent + 0.5, top - 1.5))
    return figure


def tokens_figure(x: torch.Tensor, first: tuple[int, int]) -> Figure:
    """The matrix of all tokens, and the tokens of the enlarged windows as patches."""
    tokens = soft_split(x, *FIRST)[0].cpu()
    across = (x.shape[-1] + 2 * PADDING - KERNEL) // STRIDE + 1
    figure = Figure(figsize=(9.6, 5.4))
    grid = figure.add_gridspec(2, COUNT**2, height_ratios=(3.2, 1))
    matrix = figure.add_subplot(grid[0, :])
    matrix.imshow(tokens.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-2.6, vmax=2.6, interpolation="antialiased")
    matrix.set_title(f"the tokens of the first soft split: {tokens.shape[0]:,} tokens, {tokens.shape[1]} values each")
    matrix.set_xlabel("token, row by row over the photograph")
    area = KERNEL**2
    for edge in (area, 2 * area):
        matrix.axhline(edge - 0.5, color=INK, linewidth=0.8)
    names = [f"{name}\n{KERNEL} × {KERNEL}" for name in ("red", "green", "blue")]
    matrix.set_yticks([area / 2, area * 3 / 2, area * 5 / 2], names)
    for index, colour in enumerate(COLOURS[: COUNT**2]):
        token = (first[0] + index // COUNT) * across + first[1] + index % COUNT
        if index % COUNT == COUNT // 2:
            matrix.plot([token], [-4], marker="v", color=INK, markersize=7, clip_on=False)
        axes = figure.add_subplot(grid[1, index])
        picture(axes, as_pixels(tokens[token].view(3, KERNEL, KERNEL)), f"{token}")
        axes.spines[:].set(color=colour, linewidth=2.6)
    matrix.set_ylim(tokens.shape[1] - 0.5, -0.5)
    return figure


def as_colours(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens (L, C) as an image (h, w, 3): their three principal components, each stretched to 0..1."""
    tokens = tokens.float().cpu()
    _, _, directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    parts = (tokens - tokens.mean(0)) @ directions[:3].T
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    parts = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))  # fewer than three tokens have fewer components
    return parts.view(*grid, 3)


def restructured_figure(x: torch.Tensor, stages: list[tuple[torch.Tensor, tuple[int, int]]]) -> Figure:
    """Soft composition of the tokens, and the tokens of the three stages as images."""
    tokens = soft_split(x, *FIRST)
    total = soft_composition(tokens, x.shape[2:], *FIRST)
    cover = soft_composition(torch.ones_like(tokens), x.shape[2:], *FIRST)[0, 0]
    image = total / cover
    error = (image - x).abs().max().item()
    corner = min(24, x.shape[-1])
    figure, axes = subplots(9.6, 6.9, 2, 3)
    title = f"windows per pixel (top left {corner} × {corner})"
    picture(axes[0, 0], cover[:corner, :corner], title, cmap="YlGnBu", vmin=0, vmax=5)
    for y in range(corner):
        for z in range(corner):
            colour = "white" if cover[y, z] > 2 else INK
            axes[0, 0].text(z, y, int(cover[y, z]), color=colour, fontsize=4.5, ha="center", va="center")
    picture(axes[0, 1], as_pixels(total[0] / cover.max()), "the sum of the tokens")
    words = "exact" if error == 0 else f"within {error:.0e}"
    picture(axes[0, 2], as_pixels(image[0]), f"sum / windows per pixel: the input, {words}")
    for index, (stage, grid) in enumerate(stages):
        title = f"stage {index + 1}: {grid[0]} × {grid[1]} tokens of {stage.shape[-1]}"
        picture(axes[1, index], as_colours(stage[0], grid), title)
    return figure
