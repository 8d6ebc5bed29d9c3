"""Models by name, with weights from a file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import check_pair
from ..models import build_model
from .checkpoints import load_checkpoint


def create_model(
    name: str,
    *,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    checkpoint: str | os.PathLike | Mapping | None = None,
    **options: Any,
) -> nn.Module:
    """A model by name, randomly initialised or with the weights of a checkpoint file.

    Args:
        name: one of :func:`list_models`.
        img_size: int or (H, W): the size whose token grid the stored position table has. Other sizes work at call time.
        in_chans, num_classes: channels of the image; classes, 0 for no head.
        checkpoint: path of a file that :func:`load_checkpoint` reads, or a state dict. Its position table is resized to
            ``img_size``; if its class count differs (or it has no head), the head is newly initialised, with a warning.
        options: other arguments of the model's class, such as ``drop_path_rate``, ``qk_scale``, ``norm_layer``.

    Returns:
        the model, in training mode.

    Raises:
        ValueError: unknown name or bad value. TypeError: unknown option, or ``pretrained=True``, which in upstream's
        factories changes the attention scale and loads nothing. FileNotFoundError, CheckpointError: as
        :func:`load_checkpoint`.
    """
    if options.pop("pretrained", False):
        raise TypeError(
            "create_model: pretrained=True is not supported, give checkpoint=PATH to load weights. (Upstream's "
            "pretrained=True loads nothing and changes qk_scale; for a checkpoint trained that way give "
            "qk_scale=embed_dim ** -0.5 as well.)"
        )
    img_size = check_pair("create_model", "img_size", img_size, minimum=1)
    model: Any = build_model(name, img_size=img_size, in_chans=in_chans, num_classes=num_classes, **options)
    model.built_as = (name, {"img_size": img_size, "in_chans": in_chans, **options})  # save_pretrained writes it
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint, num_classes=num_classes)
        if report.reinitialised:
            warnings.warn(
                f"create_model: {report.path} has no head of {num_classes} classes, so "
                f"{', '.join(report.reinitialised)} are newly initialised",
                stacklevel=2,
            )
    return model
