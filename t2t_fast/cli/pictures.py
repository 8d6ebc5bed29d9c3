"""The demo's pictures of the photograph: input, windows, tokens, what can be made of them again."""

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..functional import soft_composition, soft_split
from ..ops._common.spec import T2T_WINDOWS
from .photo import as_pixels

INK, MUTED, FAINT = "#1c2530", "#5f6b7a", "#d5dbe3"
BEFORE, AFTER, ALARM = "#a9b3c0", "#0a7d72", "#c8323a"
COLOURS = ("#0a7d72", "#d9822b", "#6b4fbb", "#c8323a", "#2f6fde", "#7a8b00", "#b8478f", "#00838f", "#8d5524")
DPI = 144
FIRST = tuple(side for side, _ in T2T_WINDOWS[0])
"""The window of the first soft split: kernel, stride, padding."""


def canvas(width, height):
    """A white figure of ``width`` x ``height`` inches."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def save(figure, path):
    """Write a PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def picture(axes, image, title, **options):
    """An image without ticks, under a title."""
    axes.imshow(image.numpy() if isinstance(image, torch.Tensor) else image, **options)
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    caption(axes, title)


def caption(axes, title, colour=INK):
    """A title in the report's style."""
    axes.set_title(title, fontsize=10, color=colour, loc="left", pad=6)


def photo_figure(photo, x):
    """The file with the square that is used, beside what the model gets."""
    figure = canvas(9, 4.9)
    left, right = figure.subplots(1, 2)
    width, height = photo.image.size
    picture(left, photo.image, f"{photo.name}, {width} × {height} pixels")
    x0, y0, x1, y1 = photo.box
    left.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=AFTER, linewidth=2))
    side = x.shape[-1]
    picture(
        right, as_pixels(x[0]), f"what the model sees: {side} × {side}, ImageNet normalisation", interpolation="none"
    )
    return figure


def busiest(x, side):
    """Top and left of a square of ``side`` pixels with much detail near the middle, on the first split's grid."""
    stride = FIRST[1]
    detail = torch.zeros_like(x[:, :1]).cpu()
    detail[..., :-1] += x.diff(dim=-1).abs().mean(1, keepdim=True).cpu()
    detail[..., :-1, :] += x.diff(dim=-2).abs().mean(1, keepdim=True).cpu()
    score = torch.nn.functional.avg_pool2d(detail, side, stride)[0, 0]
    place = torch.linspace(-1, 1, score.shape[0])
    nearness = torch.exp(-2 * (place[:, None] ** 2 + place[None] ** 2))
    index = int((score * nearness).argmax())
    return stride * (index // score.shape[1]), stride * (index % score.shape[1])


def zoom_tokens(x, count=3):
    """Token row and column of the first of the ``count`` x ``count`` windows that are shown enlarged."""
    kernel, stride, padding = FIRST
    top, left = busiest(x, kernel + stride * (count - 1))
    return (top + padding) // stride, (left + padding) // stride


def windows_figure(x, first, count=3):
    """The photograph with all windows' centres, and ``count`` x ``count`` neighbouring windows enlarged."""
    kernel, stride, padding = FIRST
    pixels = as_pixels(x[0])
    side = x.shape[-1]
    row, column = first
    top, left = row * stride - padding, column * stride - padding
    extent = kernel + stride * (count - 1)
    figure = canvas(9.6, 4.9)
    whole, near = figure.subplots(1, 2)
    tokens = ((side + 2 * padding - kernel) // stride + 1) ** 2
    picture(
        whole, pixels, f"{tokens:,} windows of {kernel} × {kernel}, one every {stride} pixels", interpolation="none"
    )
    centres = torch.arange(0, side + 2 * padding - kernel + 1, stride) - padding + kernel // 2
    ys, xs = torch.meshgrid(centres, centres, indexing="ij")
    whole.plot(xs.flatten().numpy(), ys.flatten().numpy(), ".", color="white", markersize=1.2, alpha=0.55)
    whole.add_patch(Rectangle((left - 0.5, top - 0.5), extent, extent, fill=False, edgecolor="#ffd54a", linewidth=2.2))
    whole.set_xlim(-0.5, side - 0.5)
    whole.set_ylim(side - 0.5, -0.5)

    title = f"the yellow square: {count * count} windows, neighbours share {kernel - stride} pixels"
    picture(near, pixels, title, interpolation="none")
    halo = [withStroke(linewidth=5, foreground="white")]
    for index in range(count * count):
        y, z = top + stride * (index // count), left + stride * (index % count)
        inset = 0.14 * (index % 3)  # so that neighbours' edges stay apart
        colour = COLOURS[index % len(COLOURS)]
        box = (z - 0.5 + inset, y - 0.5 + inset), kernel - 2 * inset, kernel - 2 * inset
        near.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=2.8, path_effects=halo))
        centre = z + kernel // 2, y + kernel // 2
        near.plot(*centre, "o", color=colour, markersize=9, markeredgecolor="white", markeredgewidth=1.5, zorder=5)
    near.set_xlim(left - 1.5, left + extent + 0.5)
    near.set_ylim(top + extent + 0.5, top - 1.5)
    return figure


def tokens_figure(x, first, count=3):
    """The matrix of all tokens, and the tokens of the enlarged windows as the patches they hold."""
    kernel, stride, padding = FIRST
    tokens = soft_split(x, *FIRST)[0].cpu()
    across = (x.shape[-1] + 2 * padding - kernel) // stride + 1
    figure = canvas(9.6, 5.4)
    grid = figure.add_gridspec(2, count * count, height_ratios=(3.2, 1))
    matrix = figure.add_subplot(grid[0, :])
    matrix.imshow(tokens.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-2.6, vmax=2.6, interpolation="antialiased")
    caption(matrix, f"the tokens of the first soft split: {tokens.shape[0]:,} tokens, {tokens.shape[1]} values each")
    matrix.set_xlabel("token, row by row over the photograph", fontsize=9, color=MUTED)
    bands = [channel * kernel**2 for channel in range(3)]
    for edge in bands[1:]:
        matrix.axhline(edge - 0.5, color=INK, linewidth=0.8)
    matrix.set_yticks(
        [band + kernel**2 / 2 for band in bands], [f"{name}\n{kernel} × {kernel}" for name in ("red", "green", "blue")]
    )
    matrix.tick_params(labelsize=9, colors=MUTED, length=0)
    for index in range(count * count):
        token = (first[0] + index // count) * across + first[1] + index % count
        colour = COLOURS[index % len(COLOURS)]
        if index % count == count // 2:
            matrix.plot([token], [-4], marker="v", color=INK, markersize=7, clip_on=False)
        axes = figure.add_subplot(grid[1, index])
        picture(axes, as_pixels(tokens[token].view(3, kernel, kernel)), f"{token}", interpolation="none")
        for spine in axes.spines.values():
            spine.set_color(colour)
            spine.set_linewidth(2.6)
    matrix.set_ylim(tokens.shape[1] - 0.5, -0.5)
    return figure


def as_colours(tokens, grid):
    """Tokens (L, C) as an image: their three principal components, each stretched to 0..1."""
    centred = tokens.float().cpu() - tokens.float().cpu().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    parts = centred @ directions[:3].T
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    parts = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    if parts.shape[1] < 3:  # a single token has no components
        parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[1]))
    return parts.view(*grid, 3).numpy()


def restructured(x):
    """Tokens composed again and divided by how many windows cover each pixel: the image, the count, the error."""
    size = x.shape[2:]
    tokens = soft_split(x, *FIRST)
    total = soft_composition(tokens, size, *FIRST)
    count = soft_composition(torch.ones_like(tokens), size, *FIRST)
    image = total / count
    return image, count[0, 0], (image - x).abs().max().item()


def restructured_figure(x, stages):
    """Soft composition of the tokens, and the tokens of the three stages seen as images."""
    image, count, error = restructured(x)
    total = image * count
    corner = min(24, x.shape[-1])
    figure = canvas(9.6, 6.9)
    axes = figure.subplots(2, 3)
    title = f"windows per pixel (top left {corner} × {corner})"
    picture(axes[0, 0], count[:corner, :corner].cpu(), title, cmap="YlGnBu", vmin=0, vmax=5, interpolation="none")
    for y in range(corner):
        for z in range(corner):
            colour = "white" if count[y, z] > 2 else INK
            axes[0, 0].text(z, y, int(count[y, z]), color=colour, fontsize=4.5, ha="center", va="center")
    picture(axes[0, 1], as_pixels(total[0] / count.max()), "the tokens added up again", interpolation="none")
    words = "exact" if error == 0 else f"within {error:.0e}"
    picture(axes[0, 2], as_pixels(image[0]), f"divided by the cover: the input, {words}", interpolation="none")
    for index, (tokens, grid) in enumerate(stages):
        title = f"stage {index + 1}: {grid[0]} × {grid[1]} tokens of {tokens.shape[-1]}"
        picture(axes[1, index], as_colours(tokens[0], grid), title, interpolation="none")
    return figure
