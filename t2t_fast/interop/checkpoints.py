"""Checkpoints into models, all or nothing: upstream's ``.pth`` files and safetensors, other grids and class counts."""

import argparse
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError, check_pair
from ..models.backbone import init_weights
from ..models.position import resize_position_table, square_grid
from .key_maps import strip_wrappers, to_upstream

_LISTED = 20
"""How many names of a kind an error or a report spells out."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did; ``str()`` is a table.

    Attributes:
        path: the file; source: the entry of it that was read ("state_dict_ema", "state_dict", "model", "tensors").
        layout: whose names the file had, "upstream" or "mmpretrain".
        loaded, total: tensors of the model that were loaded, and all of them.
        resized: (name, old grid, new grid) of position tables.
        reinitialised: the head's tensors, if they were drawn anew.
        new_modules: heads that are new objects now; an optimizer made before does not know their parameters.
        left_out: the checkpoint's tensors of a head that was not wanted.
        missing, unexpected: names that only the model, or only the checkpoint has.
        mismatched: (name, what the checkpoint has, what the model has) where shape or kind differ.
    """

    path: str
    source: str
    layout: str
    loaded: int
    total: int
    resized: tuple[tuple[str, tuple[int, int], tuple[int, int]], ...] = ()
    reinitialised: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, str, str], ...] = ()

    @property
    def complete(self):
        """Whether every tensor of model and checkpoint is accounted for."""
        return not (self.missing or self.unexpected or self.mismatched)

    def problems(self):
        """Lines that name what is not accounted for."""
        mismatched = [f"{name} (checkpoint {theirs}, model {ours})" for name, theirs, ours in self.mismatched]
        rows = (("missing", self.missing), ("unexpected", self.unexpected), ("does not fit", mismatched))
        return [_row(label, names) for label, names in rows if names]

    def __str__(self):
        resized = [f"{name} {a} x {b} -> {c} x {d}" for name, (a, b), (c, d) in self.resized]
        rows = (
            ("resized", resized),
            ("initialised", self.reinitialised),
            ("new module", self.new_modules),
            ("left out", self.left_out),
        )
        names = "" if self.layout == "upstream" else f", {self.layout}'s names"
        lines = [f"{self.path} ({self.source}{names}): {self.loaded} of {self.total} tensors loaded"]
        lines += [_row(label, entries) for label, entries in rows if entries]
        return "\n".join(lines + self.problems())


def _row(label, names):
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {label:12} {len(names):4}  {', '.join(names[:_LISTED])}{more}"


def read_state_dict(path, *, use_ema=True):
    """The tensors of a checkpoint file, on the CPU, without ``module.`` prefixes.

    Args:
        path: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads; the only class allowed
            beside torch's own is ``argparse.Namespace``, in which upstream keeps its command line.
        use_ema: prefer ``state_dict_ema`` where the file has it.

    Returns:
        dict of name -> tensor, and the name of the entry it was found under.

    Raises:
        FileNotFoundError: no such file. CheckpointError: it is not a checkpoint, or holds something else.
        ImportError: a ``.safetensors`` file, and safetensors is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"load_checkpoint: path must be a file, {path} is a directory")
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: there is no file {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state, source = _pick(content, path, use_ema)
    stripped = strip_wrappers(state)
    if len(stripped) < len(state):
        raise CheckpointError(f"load_checkpoint: {path} has the same name with and without the prefix 'module.'")
    return stripped, source


def _read_torch(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Whatever a damaged or foreign file makes the unpickler stumble over, and that is almost any exception.
    except Exception as error:
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            reason = (
                f"it holds a pickled {refused.group(1)}, which loading with weights_only=True refuses, since it "
                "could run code; save the state dict alone, or, if you trust the file, allow the class with "
                "torch.serialization.add_safe_globals"
            )
        else:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
        raise CheckpointError(f"load_checkpoint: {path} could not be read as a checkpoint: {reason}") from error


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"load_checkpoint: {path} needs safetensors: pip install 't2t_fast[checkpoints]'") from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"load_checkpoint: {path} could not be read as safetensors: {error}") from error


def _pick(content, path, use_ema):
    """The state dict inside what a file holds, and its entry's name."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"load_checkpoint: {path} must hold a dict of tensors, alone or under 'state_dict_ema', 'state_dict' or "
            f"'model', got {type(content).__name__}"
        )
    entries = ("state_dict_ema", "state_dict", "model") if use_ema else ("state_dict", "model")
    source = next((name for name in entries if isinstance(content.get(name), dict)), "tensors")
    state = content if source == "tensors" else content[source]
    if not state:
        raise CheckpointError(f"load_checkpoint: {path} holds no tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"load_checkpoint: {path} must hold a dict of tensors, alone or under 'state_dict_ema', 'state_dict' "
                f"or 'model'; its entry {name!r} is a {type(value).__name__}"
            )
    return state, source


def load_checkpoint(model, path, *, use_ema=True, num_classes=None, strict=True, source_grid=None, grid=None):
    """Load a checkpoint file into ``model``, in place; if anything is wrong, the model is unchanged.

    Values are copied into the model's own parameters (cast to their dtype and device), so an optimizer made before
    goes on training the same objects; only a head of another class count becomes a new module. Works on models of this
    package, on upstream's own, on swapped ones, and on timm models with :class:`T2TEmbed`.

    *Position tables* of another grid are interpolated as upstream's ``resize_pos_embed`` does (class entry kept,
    bicubic). A table of as many entries as the model's is taken to have the model's grid, any other to be square,
    unless ``source_grid`` says otherwise. The model's grid is what it (``grid_size``) or ``grid`` says, else square.

    *The head* is loaded if it has the wanted number of classes. If the checkpoint's differs, the model gets a newly
    initialised one, and the checkpoint's is left out.

    Args:
        model: an ``nn.Module``; wrappers of DataParallel, DistributedDataParallel and torch.compile are looked through.
        path: ``.pth``, ``.pth.tar``, ``.pt`` or ``.safetensors``; see :func:`read_state_dict`.
        use_ema: prefer the averaged weights, ``state_dict_ema``, where the file has them.
        num_classes: classes that the model shall have, 0 for no head. ``None``: as many as it has; then a checkpoint
            of another class count is loaded with a warning, and one without a head is an error.
        strict: raise if a tensor of either side is left over. Otherwise load what fits and list the rest.
        source_grid, grid: (h, w) of the checkpoint's and of the model's position table.

    Returns:
        a :class:`LoadReport`.

    Raises:
        FileNotFoundError: no such file. CheckpointError: the file is not a checkpoint, or it does not fit; the text
        lists every missing and unexpected name and every shape that differs. TypeError, ValueError: a bad argument.
    """
    _check_arguments(model, num_classes)
    source_grid, grid = _as_grid("source_grid", source_grid), _as_grid("grid", grid)
    state, source = read_state_dict(path, use_ema=use_ema)
    state, layout = to_upstream(state)
    fit = _Fit(unwrap(model), state, num_classes, source_grid, grid)
    report = fit.report(str(path), source, layout)
    if report.loaded == 0 or (strict and not report.complete):
        lines = [f"load_checkpoint: {path} does not fit the model", *report.problems(), *fit.hints(report)]
        raise CheckpointError("\n".join(lines))
    fit.commit()
    if report.reinitialised and num_classes is None:
        warnings.warn(
            f"load_checkpoint: {path} has a head of another class count, so {', '.join(report.reinitialised)} were "
            "newly initialised; give num_classes to say that this is meant",
            stacklevel=2,
        )
    return report


def _as_grid(name, grid):
    return None if grid is None else check_pair("load_checkpoint", name, grid, minimum=1)


def _check_arguments(model, num_classes):
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("load_checkpoint: model must have memory, got parameters on the meta device")
    if num_classes is not None:
        if not isinstance(num_classes, int) or isinstance(num_classes, bool):
            raise TypeError(f"load_checkpoint: num_classes must be an int or None, got {num_classes!r}")
        if num_classes < 0:
            raise ValueError(f"load_checkpoint: num_classes must be at least 0, got {num_classes}")


def unwrap(model):
    """The model inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _extra_tokens(tensors, prefix):
    """Entries of a position table that are not on the grid."""
    names = (prefix + name for name in ("cls_token", "dist_token", "reg_token"))
    return sum(tensors[name].shape[1] for name in names if name in tensors)


def _model_grid(model, owner, entries, extra):
    """The grid of ``owner``'s table of ``entries``: what it or a tokeniser says, if that adds up; else a square."""
    for module in (owner, *owner.children(), *model.children()):
        grid = getattr(module, "grid_size", None)
        if grid is not None and extra + grid[0] * grid[1] == entries:
            return tuple(grid)
    return _square("the model's position table", entries, extra, "grid")


def _square(what, entries, extra, argument):
    try:
        return square_grid(entries, extra)
    except ValueError as error:
        raise CheckpointError(
            f"load_checkpoint: {what} has {extra} + {entries - extra} entries, which no square grid has; "
            f"give {argument}=(h, w)"
        ) from error


class _Fit:
    """The plan of a load: what is copied where, which head is replaced, what is left over. Changes nothing itself."""

    def __init__(self, model, state, num_classes, source_grid, grid):
        self.model = model
        self.state = state
        self.num_classes = num_classes
        self.source_grid = source_grid
        self.grid = grid
        self.target = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        self.copies, self.heads = {}, []
        self.resized, self.reinitialised, self.left_out, self.missing, self.mismatched = [], [], [], [], []
        self.owners = {
            f"{path}.pos_embed" if path else "pos_embed": module
            for path, module in model.named_modules()
            if isinstance(getattr(module, "pos_embed", None), torch.Tensor)
        }
        heads = [
            (key.removesuffix("pos_embed") + name, owner, name)
            for key, owner in self.owners.items()
            for name in ("head", "head_dist")
            if _is_head(owner, name)
        ]
        if num_classes is not None and not heads:
            raise ValueError("load_checkpoint: num_classes needs a model with a linear head, and this one has none")
        for head in heads:
            self._fit_head(*head)
        for name in self.target:
            if name not in self.reinitialised:
                self._fit_tensor(name)
        self.unexpected = [name for name in state if name not in self.target and name not in self.left_out]

    def _fit_head(self, path, owner, name):
        """Decide whether the head stays, is replaced, or starts afresh."""
        head = getattr(owner, name)
        has, width = _head_size(owner, head)
        wanted = has if self.num_classes is None else self.num_classes
        theirs = [key for key in self.state if key.startswith(path + ".")]
        weight = self.state.get(path + ".weight")
        if weight is None:
            afresh = self.num_classes is not None and not theirs
        else:
            afresh = weight.ndim == 2 and weight.shape[1] == width and weight.shape[0] != wanted
        if wanted == 0 or afresh:
            self.left_out += theirs
        if wanted == has and (wanted == 0 or not afresh):
            return
        fresh = _new_head(owner, head, width, wanted)
        ours = {f"{path}.{key}": value for key, value in fresh.state_dict().items()}
        if wanted != has:
            self.heads.append((path, owner, name, fresh))
            self.target = {key: value for key, value in self.target.items() if not key.startswith(path + ".")} | ours
        if afresh:
            self.reinitialised += ours
            self.copies.update(ours)

    def _fit_tensor(self, name):
        value, ours = self.state.get(name), self.target[name]
        if value is None:
            self.missing.append(name)
            return
        if name in self.owners and value.ndim == 3 and value.shape[::2] == ours.shape[::2]:
            value = self._fit_positions(name, value, ours)
        if value.shape != ours.shape or value.is_floating_point() != ours.is_floating_point():
            self.mismatched.append((name, _describe(value), _describe(ours)))
            return
        self.copies[name] = value.to(ours)

    def _fit_positions(self, name, value, ours):
        """The table on the model's grid; unchanged where extra tokens differ, which no interpolation mends."""
        prefix = name.removesuffix("pos_embed")
        extra = _extra_tokens(self.target, prefix)
        if extra != _extra_tokens(self.state, prefix) or value.shape[1] <= extra:
            return value
        if value.shape == ours.shape and self.source_grid is None:
            return value
        owner = self.owners[name]
        if getattr(owner, "no_embed_class", False):  # timm: extra tokens without a place in the table
            extra = 0
        old = self.source_grid or _square(f"the checkpoint's {name}", value.shape[1], extra, "source_grid")
        new = self.grid or _model_grid(self.model, owner, ours.shape[1], extra)
        for argument, grid, entries in (("source_grid", old, value.shape[1]), ("grid", new, ours.shape[1])):
            if extra + grid[0] * grid[1] != entries:
                raise CheckpointError(
                    f"load_checkpoint: {argument} is {grid[0]} x {grid[1]} = {grid[0] * grid[1]}, but the table {name} "
                    f"has {extra} + {entries - extra} entries"
                )
        if old == new:
            return value
        self.resized.append((name, old, new))
        mode = "bilinear" if getattr(owner, "position_mode", None) == "bilinear" else "bicubic"
        return resize_position_table(value.to(ours), old, new, extra, mode)

    def report(self, path, source, layout):
        return LoadReport(
            path=path,
            source=source,
            layout=layout,
            loaded=len(self.copies) - len(self.reinitialised),
            total=len(self.target),
            resized=tuple(self.resized),
            reinitialised=tuple(self.reinitialised),
            new_modules=tuple(path for path, *_ in self.heads),
            left_out=tuple(self.left_out),
            missing=tuple(self.missing),
            unexpected=tuple(self.unexpected),
            mismatched=tuple(self.mismatched),
        )

    def hints(self, report):
        if report.loaded == 0:
            return ["  not one tensor of it belongs to this model: is it a checkpoint of another architecture?"]
        if any("head" in name.split(".") for name in report.missing):
            return ["  the checkpoint has no head: give num_classes to start with a new one, or 0 for none"]
        return []

    @torch.no_grad()
    def commit(self):
        for _, owner, name, head in self.heads:
            setattr(owner, name, head)
            if hasattr(owner, "num_classes"):
                owner.num_classes = head.out_features if isinstance(head, nn.Linear) else 0
        for name, value in self.copies.items():
            self.target[name].copy_(value)


def _is_head(owner, name):
    """Whether ``owner`` has a linear head under ``name``, or a place for one."""
    head = getattr(owner, name, None)
    return isinstance(head, nn.Linear) or (isinstance(head, nn.Identity) and hasattr(owner, "num_features"))


def _head_size(owner, head):
    """Classes and input width of a head; an ``nn.Identity`` has none of the first."""
    return (head.out_features, head.in_features) if isinstance(head, nn.Linear) else (0, owner.num_features)


def _new_head(owner, head, width, num_classes):
    """A newly initialised head of ``num_classes``, where the owner's parameters live."""
    if num_classes == 0:
        return nn.Identity().train(head.training)
    bias = not isinstance(head, nn.Linear) or head.bias is not None
    fresh = nn.Linear(width, num_classes, bias=bias).to(owner.pos_embed)
    init_weights(fresh)
    return fresh.train(head.training)


def _describe(tensor):
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
