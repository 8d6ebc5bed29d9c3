"""Converts a checkpoint's tensors to a model's: names, shapes, position tables, layout, attention scale, heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...models.backbone import init_weights
from ...models.position import resize_position_table, square_grid
from . import commit as writing
from . import scale
from .entries import as_tensor
from .names import match
from .projects import layout, other_network
from .report import LoadReport, Refused

_TABLES = ("pos_embed", "pos_embedding")
_HEADS = ("head", "head_dist", "mlp_head")


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """{name: shape} of the entries of a state dict; ``None`` for entries that cannot be loaded."""
    return {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) and writing.obstacle(value) is None else None
        for name, value in state.items()
    }


class Fit:
    """The plan of a load: all values are converted and checked; nothing is written before :meth:`commit`.

    Args:
        model: an ``nn.Module``.
        state: {name: value} of the checkpoint, under its own names.
        num_classes, source_grid, grid, trained_with: as :func:`load_checkpoint`.
        transposed: the weights of Linear modules are (in, out), as PaddlePaddle has them.

    Raises:
        Refused: names or grids that fit in several ways or in none. ValueError: ``num_classes`` without a head.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        num_classes: int | None,
        source_grid: tuple[int, int] | None,
        grid: tuple[int, int] | None,
        trained_with: str | None,
        transposed: bool,
    ):
        self.model = model
        self.num_classes = num_classes
        self.source_grid, self.grid = source_grid, grid
        self.target, self.unwritable = writing.own_tensors(model)
        self.layout = layout(state)
        self.rescale = trained_with == "mmpretrain" and layout(self.target) != "mmpretrain"
        self.transposed = transposed

        values = {name: as_tensor(value) for name, value in state.items()}
        found = match(shapes(values), shapes(self.target))
        self.prefix = found.prefix
        self.state = {ours: values[theirs] for theirs, ours in found.names.items()}

        self.copies: dict[str, torch.Tensor] = {}
        self.heads: list[tuple[str, nn.Module, str, nn.Module]] = []
        self.resized: list[tuple[str, tuple[int, int], tuple[int, int]]] = []
        self.rescaled: list[tuple[str, float]] = []
        self.reinitialised: list[str] = []
        self.left_out: list[str] = []
        self.missing: list[str] = []
        self.mismatched: list[tuple[str, str, str]] = []
        self.owners = {
            f"{path}.{name}" if path else name: module
            for path, module in model.named_modules()
            for name in _TABLES
            if isinstance(getattr(module, name, None), torch.Tensor)
        }
        heads = [
            (key.removesuffix(key.rpartition(".")[2]) + name, owner, name)
            for key, owner in self.owners.items()
            for name in _HEADS
            if _is_head(owner, name)
        ]
        if num_classes is not None and not heads:
            raise ValueError("load_checkpoint: num_classes needs a model with a linear head, and this one has none")
        for head in heads:
            self._fit_head(*head)
        for name in self.target:
            if name not in self.reinitialised:
                self._fit_tensor(name)
        self._fit_tied()

        names = {theirs: found.names.get(theirs) for theirs in state}
        known = {*self.target, *self.left_out}
        over = [name for name, ours in names.items() if ours not in known]
        self.ignored = [name for name in over if not isinstance(values[name], torch.Tensor) or _is_number(state[name])]
        self.unexpected = [name for name in over if name not in self.ignored]

    def _fit_head(self, path, owner, name):
        """Decide whether the head is loaded, replaced, or newly initialised."""
        head = getattr(owner, name)
        has, width = _head_size(owner, head)
        wanted = has if self.num_classes is None else self.num_classes
        theirs = [key for key in self.state if key.startswith(path + ".")]
        shape = shapes(self.state).get(path + ".weight")
        if path + ".weight" not in self.state:
            afresh = self.num_classes is not None and not theirs
        else:
            shape = shape[::-1] if shape and self.transposed else shape
            afresh = shape is not None and len(shape) == 2 and shape[1] == width and shape[0] != wanted
        if wanted == 0 or afresh:
            self.left_out += theirs
        if wanted == has and (wanted == 0 or not afresh):
            return
        fresh = _new_head(owner, head, width, wanted)
        ours = {f"{path}.{key}": value for key, value in fresh.state_dict().items()}
        if wanted != has:
            self.heads.append((path, owner, name, fresh))
            self.target = {key: value for key, value in self.target.items() if not key.startswith(path + ".")} | ours
            self.unwritable = {key: problem for key, problem in self.unwritable.items() if key not in ours}
        if afresh:
            self.reinitialised += ours
            self.copies.update(ours)

    def _fit_tensor(self, name):
        """Convert the value for one tensor of the model, or record why there is none."""
        if name not in self.state:
            self.missing.append(name)
            return
        value, ours = self.state[name], self.target[name]
        problem = self.unwritable.get(name)
        if problem is None and isinstance(value, torch.Tensor) and writing.obstacle(value) is None:
            value = self._converted(name, value.detach(), ours)
            problem = _misfit(value, ours)
            if problem is None:
                self.copies[name] = value.to(device=ours.device, dtype=ours.dtype)
                return
        self.mismatched.append((name, writing.describe(value), problem or writing.describe(ours)))

    def _converted(self, name, value, ours):
        """The value as the model stores it: transposed, resized, rescaled."""
        path, _, leaf = name.rpartition(".")
        if self.transposed and leaf == "weight" and value.ndim == 2 and isinstance(self._module(path), nn.Linear):
            value = value.t()
        if name in self.owners and value.ndim == 3 and value.shape[::2] == ours.shape[::2]:
            value = self._fit_positions(name, value, ours)
        if self.rescale and scale.queries_of(name):
            factor = scale.factor(name, value, self._module(path.rpartition(".")[0]))
            self.rescaled.append((name, factor))
            value = scale.multiply_queries(value, factor)
        return value

    def _module(self, path):
        """The module at a path; ``None`` if the state dict's names are not those of modules."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _fit_positions(self, name, value, ours):
        """The table on the model's grid; unchanged if the number of extra tokens differs."""
        prefix = name.removesuffix(name.rpartition(".")[2])
        extra = _extra_tokens(self.target, prefix)
        if extra != _extra_tokens(self.state, prefix) or value.shape[1] <= extra:
            return value
        if value.shape == ours.shape and self.source_grid is None:
            return value
        owner = self.owners[name]
        if getattr(owner, "no_embed_class", False):  # timm: extra tokens without an entry in the table
            extra = 0
        old = self.source_grid or _square(f"the checkpoint's {name}", value.shape[1], extra, "source_grid")
        new = self.grid or _model_grid(self.model, owner, ours.shape[1], extra)
        for argument, grid, entries in (("source_grid", old, value.shape[1]), ("grid", new, ours.shape[1])):
            if extra + grid[0] * grid[1] != entries:
                raise Refused(
                    f"{argument} is {grid[0]} x {grid[1]} = {grid[0] * grid[1]}, but the table {name} "
                    f"has {extra} + {entries - extra} entries"
                )
        if old == new:
            return value
        self.resized.append((name, old, new))
        mode = "bilinear" if getattr(owner, "position_mode", None) == "bilinear" else "bicubic"
        return resize_position_table(value.to(ours), old, new, extra, mode)

    def _fit_tied(self):
        """A tied tensor that the checkpoint has under one of its names is not missing (safetensors stores it once)."""
        loaded = {writing.place(self.target[name]) for name in self.copies}
        self.tied = [
            name
            for name in self.missing
            if name not in self.unwritable and self.target[name].numel() and writing.place(self.target[name]) in loaded
        ]
        self.missing = [name for name in self.missing if name not in self.tied]

    def report(self, path: str, source: str) -> LoadReport:
        return LoadReport(
            path=path,
            source=source,
            layout=self.layout,
            loaded=len(self.copies) - len(self.reinitialised) + len(self.tied),
            total=len(self.target),
            prefix=self.prefix,
            resized=tuple(self.resized),
            rescaled=tuple(self.rescaled),
            reinitialised=tuple(self.reinitialised),
            new_modules=tuple(path for path, *_ in self.heads),
            left_out=tuple(self.left_out),
            ignored=tuple(self.ignored),
            missing=tuple(self.missing),
            unexpected=tuple(self.unexpected),
            mismatched=tuple(self.mismatched),
            notes=tuple(self._notes()),
        )

    def _notes(self):
        if self.layout == "mmpretrain" and not self.rescaled and layout(self.target) != "mmpretrain":
            yield (
                "taken for weights of upstream's code, as mmpretrain publishes them; if mmpretrain 1.2 trained them, "
                "give trained_with='mmpretrain', since its attention divides by the scale that upstream multiplies by"
            )
        if self.layout != "mmpretrain" and layout(self.target) == "mmpretrain":
            yield "mmpretrain 1.2's attention divides by its scale, so its logits differ from those of upstream's code"
        if self.layout == "paddle":
            yield "PaddleViT's LayerNorm has eps 1e-6, upstream's and this package's 1e-5"

    def hints(self, report: LoadReport) -> list[str]:
        """Lines with the probable reason why the checkpoint does not fit."""
        network = other_network(self.layout)
        if network is not None and layout(self.target) != self.layout:
            return [f"  it is a checkpoint of {self.layout}'s network; its weights fit {network} only"]
        if report.loaded == 0:
            return ["  not one tensor of it belongs to this model: is it a checkpoint of another architecture?"]
        if any(set(name.split(".")) & set(_HEADS) for name in report.missing):
            return ["  the checkpoint has no head: give num_classes to start with a new one, or 0 for none"]
        return []

    def commit(self) -> None:
        """Write all values; after an error none."""
        names = list(self.copies)
        targets = [self.target[name] for name in names]
        values = writing.separate([self.copies[name] for name in names], targets)
        wrong = writing.conflicts(dict(zip(names, zip(targets, values, strict=True), strict=True)))
        if wrong:
            raise Refused(f"the checkpoint has different values for memory that the model shares: {', '.join(wrong)}")
        attributes: list[tuple[nn.Module, str, Any]] = [(owner, name, head) for _, owner, name, head in self.heads]
        attributes += [
            (owner, "num_classes", getattr(head, "out_features", 0))
            for owner, _, head in attributes
            if hasattr(owner, "num_classes")
        ]
        writing.commit(attributes, list(zip(targets, values, strict=True)))


def _misfit(value, ours):
    """Why a value cannot be copied into one of the model's tensors, for messages; ``None`` if it can."""
    wanted = writing.describe(ours)
    kinds = [(x.is_floating_point(), x.is_complex()) for x in (value, ours)]
    if value.shape != ours.shape or kinds[0] != kinds[1]:
        return wanted
    if value.dtype == ours.dtype:
        return None
    cast = value.to(ours.dtype)
    if any(kinds[0]):
        held = not (value.isfinite() & ~cast.isfinite()).any()
    else:
        held = torch.equal(cast.to(value.dtype), value)
    return None if held else f"{wanted} of {str(ours.dtype).removeprefix('torch.')}, whose range is too small"


def _is_number(value):
    return not isinstance(value, torch.Tensor) and getattr(value, "ndim", 0) == 0


def _extra_tokens(tensors, prefix):
    """Entries of a position table that are not on the grid."""
    names = (prefix + name for name in ("cls_token", "dist_token", "reg_token"))
    return sum(tensors[name].shape[1] for name in names if name in tensors)


def _model_grid(model, owner, entries, extra):
    """The grid of ``owner``'s table: a ``grid_size`` that agrees with the number of entries, else a square."""
    for module in (owner, *owner.children(), *model.children()):
        grid = getattr(module, "grid_size", None)
        if grid is not None and extra + grid[0] * grid[1] == entries:
            return tuple(grid)
    return _square("the model's position table", entries, extra, "grid")


def _square(what, entries, extra, argument):
    try:
        return square_grid(entries, extra)
    except ValueError as error:
        raise Refused(
            f"{what} has {extra} + {entries - extra} entries, which no square grid has; give {argument}=(h, w)"
        ) from error


def _is_head(owner, name):
    """Whether ``owner`` has a linear head under ``name``, or a place for one."""
    head = getattr(owner, name, None)
    return isinstance(head, nn.Linear) or (isinstance(head, nn.Identity) and hasattr(owner, "num_features"))


def _head_size(owner, head):
    """Number of classes and input width of a head; an ``nn.Identity`` has 0 classes."""
    return (
        (head.out_features, head.in_features)
        if isinstance(head, nn.Linear)
        else (0, getattr(owner, "head_hidden_size", owner.num_features))
    )


def _new_head(owner, head, width, num_classes):
    """A newly initialised head of ``num_classes``, on the owner's device; initialised on the CPU."""
    if num_classes == 0:
        return nn.Identity().train(head.training)
    linear = isinstance(head, nn.Linear)
    fresh = nn.Linear(width, num_classes, bias=not linear or head.bias is not None, device="cpu", dtype=torch.float32)
    init_weights(fresh)
    like = head.weight if linear else next(getattr(owner, name) for name in _TABLES if hasattr(owner, name))
    return fresh.to(device=like.device, dtype=like.dtype).train(head.training)
