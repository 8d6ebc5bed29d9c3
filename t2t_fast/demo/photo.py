"""A photograph as a model's input: image files of any mode."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ..errors import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = "grace_hopper.jpg"
SAMPLE_CREDIT = "Grace Hopper, official portrait of the US Navy, from the sample data of Matplotlib"

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation, as in upstream's evaluation."""


@dataclass(frozen=True)
class Photo:
    """An RGB photograph, its central square (the model's input), its file name and its credit line."""

    image: "Image"
    box: tuple[int, int, int, int]
    name: str
    credit: str


def load_photo(path: str | Path | None = None) -> Photo:
    """Read an image file of any mode as RGB; Matplotlib's sample photograph if no path is given.

    Raises:
        CommandError: the file cannot be read as an image, or Matplotlib's sample data is not installed.
    """
    from PIL import Image, ImageOps

    path, credit = (_sample(), SAMPLE_CREDIT) if path is None else (Path(path), "")
    try:
        with Image.open(path) as file:
            file.load()
            image = _as_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"--photo: {path} cannot be read as an image: {error}") from error
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return Photo(image, (left, top, left + side, top + side), path.name, credit)


def _sample() -> Path:
    from matplotlib import cbook

    try:
        return Path(cbook.get_sample_data(SAMPLE, asfileobj=False))
    except (FileNotFoundError, ValueError) as error:
        raise CommandError("Matplotlib is installed without its sample data; use --photo with an image file") from error


def _as_rgb(image: "Image") -> "Image":
    """Any mode to RGB: transparency on white, grey levels of more than 8 bits scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = numpy.asarray(image, dtype=numpy.float64)
        image = Image.fromarray((255 * (values - values.min()) / max(numpy.ptp(values), 1e-12)).astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_tensor(image: "Image") -> torch.Tensor:
    """An RGB image as (1, 3, H, W) in float32, normalised."""
    x = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float().div(255)
    return ((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).unsqueeze(0)


def as_pixels(x: torch.Tensor) -> Any:
    """(3, H, W) normalised back to an (H, W, 3) NumPy array in 0..1."""
    x = x.float().cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return x.clamp(0, 1).permute(1, 2, 0).numpy()


def batch(photo: Photo, size: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size): the model's view of the photograph, then random crops and flips of the photograph."""
    from PIL import Image, ImageOps

    generator = torch.Generator().manual_seed(seed)
    views = [photo.image.resize((size, size), Image.Resampling.BICUBIC, box=photo.box)]
    width, height = photo.image.size
    while len(views) < count:
        share, across, down, flip = torch.rand(4, generator=generator).tolist()
        side = max(1.0, (0.4 + 0.6 * share) * min(width, height))
        left, top = across * (width - side), down * (height - side)
        view = photo.image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        views.append(ImageOps.mirror(view) if flip < 0.5 else view)
    return torch.cat([as_tensor(view) for view in views[:count]])
