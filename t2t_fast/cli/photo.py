"""A photograph as a model's input, whatever the file holds."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .common import CommandError, UsageError

SAMPLE = "grace_hopper.jpg"
SAMPLE_CREDIT = "Grace Hopper, official portrait of the US Navy, from the sample data of Matplotlib"

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, which upstream's evaluation uses."""


@dataclass(frozen=True)
class Photo:
    """An RGB photograph, the central square that the model gets, and where it comes from."""

    image: object
    box: tuple[int, int, int, int]
    name: str
    credit: str


def load_photo(path=None):
    """Read an image file of any mode as RGB; Matplotlib's sample photograph if no path is given.

    Raises:
        UsageError: there is no such file. CommandError: it is not an image, or the sample is not installed.
    """
    if path is None:
        path, credit = _sample(), SAMPLE_CREDIT
    else:
        path, credit = Path(path), ""
        if not path.is_file():
            raise UsageError(f"--photo: there is no file {path}")
    image = _read(path)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return Photo(image, (left, top, left + side, top + side), path.name, credit)


def _sample():
    from matplotlib import cbook

    try:
        return Path(cbook.get_sample_data(SAMPLE, asfileobj=False))
    except (FileNotFoundError, ValueError) as error:
        raise CommandError("Matplotlib is installed without its sample data; give a photograph with --photo") from error


def _read(path):
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            return _as_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"--photo: {path} cannot be read as an image: {error}") from error


def _as_rgb(image):
    """Any mode to RGB: transparent on white, deep grey levels scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        low, high = image.getextrema()
        scale = 255 / (high - low) if high > low else 0.0
        image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_tensor(image):
    """An RGB image as (1, 3, H, W) in float32, normalised."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    x = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float().div(255)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def as_pixels(x):
    """(3, H, W) normalised back to an (H, W, 3) array in 0..1."""
    x = x.float().cpu() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return x.clamp(0, 1).permute(1, 2, 0).numpy()


def batch(photo, size, count, seed=0):
    """(count, 3, size, size): the photograph as the model sees it, then random crops and flips of it."""
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
