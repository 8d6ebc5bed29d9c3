"""Loading checkpoints, completely or not at all: other projects' files, other grids, other class counts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ...errors import CheckpointError, check_pair
from . import files
from .commit import own_tensors
from .entries import as_tensor, choose
from .fit import Fit, shapes
from .names import check_distinct, match, without_wrappers
from .report import LoadReport, Refused


def read_state_dict(path: str | os.PathLike | Mapping, *, use_ema: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a checkpoint file, on the CPU, under the file's names without prefixes of wrapping modules.

    Args:
        path: ``.safetensors``, PaddlePaddle's ``.pdparams``, or anything that ``torch.load(weights_only=True)`` reads;
            besides torch's own classes, only ``argparse.Namespace`` (upstream stores its command line in one) and
            NumPy's numbers are allowed.
        use_ema: prefer averaged weights (``state_dict_ema``, ``model_ema``) where the file has them.

    Returns:
        dict of name -> tensor, and the name of the entry that it was found in, which is the one with most tensors.

    Raises:
        FileNotFoundError: no such file. CheckpointError: the file is not a checkpoint.
        ImportError: the file is a ``.safetensors`` file, and safetensors is not installed.
    """
    content, name, _ = _content(path)
    try:
        state, source = choose(content, use_ema=use_ema, rate=len)
        state = {key: as_tensor(value) for key, value in state.items()}
        state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        check_distinct(state)
        return {short: state[key] for key, short in without_wrappers(state).items()}, source
    except Refused as error:
        raise CheckpointError(f"load_checkpoint: {name}: {error}") from error


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike | Mapping,
    *,
    use_ema: bool = True,
    num_classes: int | None = None,
    strict: bool = True,
    source_grid: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    trained_with: str | None = None,
) -> LoadReport:
    """Load a checkpoint into ``model``, in place; after any error the model is unchanged.

    All values are converted and checked before the first is written, and an interrupted write is rolled back. Values
    are copied into the model's own parameters (cast to their dtype and device), so an existing optimizer continues to
    train the same objects; only a head with another class count becomes a new module. The model may be one of this
    package, of upstream, mmpretrain, vit-pytorch or the families in ``models.FAMILIES``, a swapped model, or a timm
    model with :class:`T2TEmbed`.

    *The entry* that is loaded is the one whose names fit the model best (``state_dict``, ``model``,
    ``model_state_dict``, ``net``, ...).

    *Names* of mmpretrain, PaddleViT and timm models with :class:`T2TEmbed` are translated to upstream's; prefixes of
    wrapping modules (``module.``, ``_orig_mod.``) are ignored; a prefix that only one side has (``model.``,
    ``backbone.``, ``encoder.``) is added or removed if the names fit then.

    *Position tables* of another grid are interpolated as upstream's ``resize_pos_embed`` does (class entry kept,
    bicubic). A table with as many entries as the model's is assumed to have the model's grid, any other to be square,
    unless ``source_grid`` is given. The model's grid is ``grid`` or its ``grid_size``, else square.

    *The head* is loaded if it has the requested number of classes. Otherwise the model gets a newly initialised head,
    and the checkpoint's is skipped.

    *mmpretrain* publishes upstream's weights under its own names; these need no option. But mmpretrain 1.2 divides by
    its attention scale where upstream multiplies: for weights that it trained, ``trained_with="mmpretrain"`` multiplies
    the queries by the factor for which this model's logits equal mmpretrain's.

    Args:
        model: an ``nn.Module``; wrappers of DataParallel, DistributedDataParallel and torch.compile are unwrapped.
        path: a file: ``.pth``, ``.pth.tar``, ``.pt``, ``.safetensors`` or ``.pdparams`` (see :func:`read_state_dict`);
            or a state dict, or a dict that contains one. Its tensors must be dense, not sparse, nested or quantised.
        use_ema: prefer averaged weights (``state_dict_ema``, ``model_ema``) where there are any.
        num_classes: number of classes of the model after the load, 0 for no head. ``None``: the model's own; then a
            checkpoint with another class count is loaded with a warning, and one without a head is an error.
        strict: raise if model or checkpoint has a tensor without counterpart. Otherwise load the others and report it.
        source_grid, grid: (h, w) of the checkpoint's and of the model's position table.
        trained_with: "mmpretrain" for weights that mmpretrain 1.2 trained; ``None`` for those of any other code.

    Returns:
        a :class:`LoadReport`.

    Raises:
        FileNotFoundError: no such file. CheckpointError: the file is not a checkpoint, or it does not fit; the text
        lists every missing and unexpected name and every shape that differs. TypeError, ValueError: a bad argument.
        ImportError: as :func:`read_state_dict`.
    """
    _check_arguments(model, num_classes, trained_with)
    source_grid, grid = _as_grid("source_grid", source_grid), _as_grid("grid", grid)
    content, name, transposed = _content(path)
    model = unwrap(model)
    random_state = torch.get_rng_state()
    try:
        target = shapes(own_tensors(model)[0])
        state, source = choose(content, use_ema=use_ema, rate=lambda entry: _rate(entry, target))
        fit = Fit(
            model,
            state,
            num_classes=num_classes,
            source_grid=source_grid,
            grid=grid,
            trained_with=trained_with,
            transposed=transposed,
        )
        report = fit.report(name, source)
        if report.loaded == 0 or (strict and not report.complete):
            raise Refused("\n".join(["it does not fit the model", *report.problems(), *fit.hints(report)]))
        if report.reinitialised and num_classes is None:
            warnings.warn(
                f"load_checkpoint: {name} has a head of another class count, so {', '.join(report.reinitialised)} were "
                "newly initialised; give num_classes to say that this is meant",
                stacklevel=2,
            )
        fit.commit()
    except BaseException as error:
        torch.set_rng_state(random_state)
        if isinstance(error, (ValueError, Warning)) or not isinstance(error, Exception):
            raise
        kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        raise CheckpointError(f"load_checkpoint: {name}: {kind}{error}") from error
    return report


def _content(path):
    """The content of a path or a state dict, its name for messages, and whether its matrices are transposed."""
    if isinstance(path, Mapping):
        return path, "state dict", False
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"load_checkpoint: path must be a str, an os.PathLike or a state dict, got {type(path).__name__}"
        )
    path = Path(os.fsdecode(path))
    return files.read(path), str(path), files.is_transposed(path)


def _rate(entry, target):
    """How many names of the model an entry has, plus how many with equal shapes; 0 for an ambiguous entry."""
    entry = {name: as_tensor(value) for name, value in entry.items()}
    try:
        return sum(match(shapes(entry), target).score)
    except Refused:
        return 0


def _as_grid(name, grid):
    return None if grid is None else check_pair("load_checkpoint", name, grid, minimum=1)


def _check_arguments(model, num_classes, trained_with):
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("load_checkpoint: model must have memory, got parameters on the meta device")
    if num_classes is not None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"load_checkpoint: num_classes must be an int or None, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"load_checkpoint: num_classes must be at least 0, got {num_classes}")
    if trained_with not in (None, "mmpretrain"):
        raise ValueError(f"load_checkpoint: trained_with must be None or 'mmpretrain', got {trained_with!r}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
