"""Converts a checkpoint to another project's names and another file type, and compares the result with the original."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...models import build_model, list_models
from . import files, paddle_files, scale
from .commit import same_bits
from .fit import shapes
from .load import load_checkpoint, read_state_dict
from .names import comparable, match
from .projects import PROJECTS, UPSTREAM, layout, other_network, to_project
from .report import Refused, listed, row
from .writers import WRITERS, replacing, write

TARGETS = (UPSTREAM, *PROJECTS)
"""The projects that :func:`convert_checkpoint` writes names of."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest allowed error of the logits, relative to the largest one, where queries were rescaled and rounded."""

_WINDOW = 49
"""Pixels of the first soft split's window."""


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert_checkpoint` wrote; ``str()`` is a table.

    Attributes:
        source, entry, layout: the file that was read, the entry of it, and the project whose names it has.
        target, to: the file that was written, and the project whose names it has.
        model: name of the model with which the conversion was checked; ``None`` if only the file type changed.
        tensors: number of tensors written.
        dtypes: their dtypes.
        left_out: names in the source that were left out: a head that was not wanted.
        rescaled: (name, factor) of tensors whose queries were multiplied.
        max_abs_error, max_rel_error: largest difference of the logits in float64, and that divided by the largest
            logit; ``None`` if only the file type changed.
        notes: assumptions and restrictions.
    """

    source: str
    entry: str
    layout: str
    target: str
    to: str
    model: str | None
    tensors: int
    dtypes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    rescaled: tuple[tuple[str, float], ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self):
        lines = [
            f"{self.source} ({self.entry}, {self.layout}'s names) -> {self.target} ({self.to}'s names): "
            f"{self.tensors} tensors, {', '.join(self.dtypes)}"
        ]
        if self.left_out:
            lines.append(row("left out", self.left_out))
        if self.rescaled:
            lines.append(row("rescaled", [f"{name} x {factor:.6g}" for name, factor in self.rescaled]))
        if self.model is None:
            lines.append("  checked: the file has the same tensors, bit for bit")
        else:
            lines.append(
                f"  checked: {self.model} computes the same logits from both files, largest error "
                f"{self.max_abs_error:.1e} ({self.max_rel_error:.1e} of the largest logit)"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str | None = None,
    model: str | None = None,
    head: bool = True,
    use_ema: bool = True,
    trained_with: str | None = None,
    rescale: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> ConvertReport:
    """Write the weights of a checkpoint with the names of another project, as another file type, or both.

    The file type follows from the ending of ``target``, the names from ``to``. Values and dtypes stay as they are. The
    new file is read again, its tensors are compared bit for bit with what was to be written, and it is loaded strictly
    into a model whose logits must equal, in float64 on random images, those with the original weights. Then it gets its
    name; after any error there is no new file, and an existing one is unchanged.

    vit-pytorch's and the articles' (lanl) networks are not upstream's: their attention differs, so no other project's
    model computes the same from their weights, and only their file type can change.

    *mmpretrain* 1.2 multiplies q k by sqrt(head width), whatever its configuration says. With ``to="mmpretrain"`` the
    queries are therefore divided by the factor for which its logits equal upstream's. Such a file is loaded into other
    code with ``trained_with="mmpretrain"``. ``rescale=False`` keeps the queries, as in the files that mmpretrain
    publishes.

    Args:
        source: a file that :func:`load_checkpoint` reads.
        target: a file that ends in ``.safetensors``, ``.pdparams`` (Linear weights are transposed) or, for
            ``torch.save``, in ``.pth``, ``.pth.tar``, ``.pt``, ``.bin`` or ``.ckpt``. Its folder must exist.
        to: "upstream" (also this package's models and those it registers in timm), "mmpretrain", "paddle"
            (PaddleViT's), "timm" (its ``VisionTransformer`` with :class:`T2TEmbed`), "vit-pytorch" or "lanl".
            ``None`` keeps the names, without prefixes of wrapping modules; any model's file can be converted then.
        model: a name of :func:`list_models`; ``None``: the one whose tensors have these names and shapes. Heads and
            scales cannot be seen, so several can fit, and then the name is needed.
        head: ``False`` leaves the head out. A head that is written to mmpretrain makes a whole classifier, otherwise
            the file is one of its backbone.
        use_ema: prefer averaged weights where there are any.
        trained_with: "mmpretrain" for weights that mmpretrain 1.2 trained, as :func:`load_checkpoint`.
        rescale: see above; for mmpretrain only.
        overwrite: replace an existing ``target``; never the source itself.
        options: of the model, for one that differs from its default (``qk_scale``, ``img_size`` if not square, ...).

    Returns:
        a :class:`ConvertReport`.

    Raises:
        TypeError, ValueError: a bad argument, or several models fit. FileExistsError: ``target`` exists.
        FileNotFoundError: no source, or no folder for the target. CheckpointError: the source is not a checkpoint, it
        fits no model, the project's network does not have its tensors, or the new file differs.
        ImportError: safetensors is not installed.
    """
    old, path = _check_arguments(source, target, to, model, trained_with, overwrite)
    keep_names = to is None or other_network(to) is not None
    if keep_names and (model is not None or options or not head or trained_with):
        raise ValueError(
            "convert_checkpoint: model, head=False, trained_with and options of a model need to=PROJECT, one with "
            f"upstream's network: {', '.join(name for name in TARGETS if not other_network(name))}; got to={to!r}"
        )
    state, entry = read_state_dict(old, use_ema=use_ema)
    if files.is_transposed(old):
        state = paddle_files.transposed(state)
    project = layout(state)
    try:
        _check_plain(state)
        _check_networks(project, to)
        plan = _Plan(state) if keep_names else _planned(state, to, model, head, trained_with, rescale, options)
        with replacing(path) as new:
            write(new, plan.state)
            _check_tensors(new, plan.state)
            errors = plan.check_logits(new)
    except Refused as error:
        raise CheckpointError(f"convert_checkpoint: {old}: {error}") from error
    return ConvertReport(
        source=str(old),
        entry=entry,
        layout=project,
        target=str(path),
        to=project if to is None else to,
        model=plan.name,
        tensors=len(plan.state),
        dtypes=tuple(sorted({_name(value.dtype) for value in plan.state.values()})),
        left_out=plan.left_out,
        rescaled=plan.rescaled,
        max_abs_error=errors[0],
        max_rel_error=errors[1],
        notes=plan.notes,
    )


@dataclass(frozen=True)
class _Plan:
    """What is written, and how it is checked.

    Attributes:
        state: {name: tensor} of the new file.
        name, options: of the model that checks it; ``None``: only the tensors are compared.
        model: that model with the original weights, in float64.
        trained_with: as :func:`load_checkpoint`, for the new file.
        left_out, rescaled, notes: as :class:`ConvertReport`.
    """

    state: Mapping[str, torch.Tensor]
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    trained_with: str | None = None
    left_out: tuple[str, ...] = ()
    rescaled: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()

    @torch.no_grad()
    def check_logits(self, path: Path) -> tuple[float | None, float | None]:
        """The largest absolute and relative difference between the logits of the new file and of the original.

        Raises:
            Refused: it is too large. CheckpointError: the file does not fit the model.
        """
        if self.model is None or self.name is None:
            return None, None
        twin = build_model(self.name, **self.options).double()
        load_checkpoint(twin, path, trained_with=self.trained_with)
        height, width = self.options["img_size"]
        shape = (2, self.options["in_chans"], height, width)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ours, theirs = (model.eval()(images) for model in (self.model, twin))
        if not ours.isfinite().all():
            raise Refused("its weights give logits that are not finite, so the new file cannot be checked")
        error = torch.nan_to_num((ours - theirs).abs(), nan=torch.inf).max().item()
        relative = error / max(ours.abs().max().item(), 1e-30)
        rounded = {value.dtype for value in self.state.values()} if self.rescaled else {torch.float64}
        allowed = max(TOLERANCES.get(dtype, 0.0) for dtype in rounded)
        if not relative <= allowed:
            raise Refused(
                f"the logits of the new file differ from those of the original by {relative:.1e} of the largest logit, "
                f"allowed {allowed:.0e}; nothing was written"
            )
        return error, relative


def _check_arguments(source, target, to, model, trained_with, overwrite):
    """Source and target as paths, after all checks that need no file to be read."""
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"convert_checkpoint: {name} must be a str or an os.PathLike, got {type(value).__name__}")
    source, target = Path(os.fsdecode(source)), Path(os.fsdecode(target))
    for name, value, choices in (
        ("to", to, TARGETS),
        ("model", model, list_models()),
        ("trained_with", trained_with, ("mmpretrain",)),
    ):
        if value is not None and value not in choices:
            raise ValueError(f"convert_checkpoint: {name} must be one of {', '.join(choices)}, got {value!r}")
    if target.suffix.lower() not in WRITERS:
        raise ValueError(f"convert_checkpoint: target must end in one of {', '.join(WRITERS)}, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"convert_checkpoint: there is no folder {target.parent} for {target}")
    if target.exists():
        if source.exists() and target.samefile(source):
            raise ValueError(f"convert_checkpoint: target must be another file than source, both are {source}")
        if target.is_dir() or not overwrite:
            raise FileExistsError(f"convert_checkpoint: {target} exists; overwrite=True replaces a file")
    return source, target


def _check_plain(state):
    """Raise unless every tensor is dense numbers in memory."""
    odd = [name for name, shape in shapes(state).items() if shape is None]
    if odd:
        raise Refused(f"only dense tensors can be converted, it has others: {listed(odd)}")


def _check_networks(project, to):
    """Raise if source and target have different networks."""
    networks = [None if name is None else other_network(name) for name in (project, to)]
    if to is not None and to != project and any(networks):
        name, network = next((n, w) for n, w in zip((project, to), networks, strict=True) if w is not None)
        raise Refused(
            f"{project}'s weights cannot become {to}'s: {name}'s network ({network}) computes something else, so no "
            f"conversion keeps its logits; {name}'s files can change their file type only"
        )


def _planned(state, to, name, head, trained_with, rescale, options):
    """The plan of a conversion between projects with upstream's network.

    The model holds every value in float64, which holds the values of all other dtypes exactly.
    """
    options = {**_visible_options(shapes(state), options), **options}
    name = _only_model(shapes(state), options) if name is None else name
    if not head:
        options["num_classes"] = 0
    model = build_model(name, **options).double()
    try:
        report = load_checkpoint(model, state, num_classes=None if head else 0, trained_with=trained_with)
    except CheckpointError as error:
        raise Refused(str(error).removeprefix("load_checkpoint: state dict: ")) from error
    if report.resized or report.reinitialised:
        raise Refused(f"its sizes are not those of {name} with {_listed_options(options)}: {report}")
    names = {ours: theirs for theirs, ours in match(shapes(state), _table(model)).names.items()}
    values = dict(model.state_dict())
    rescaled, divided = dict(report.rescaled), to == "mmpretrain" and rescale
    for key in filter(scale.queries_of, values) if divided else ():
        factor = 1 / scale.factor(key, values[key], model.get_submodule(key.rsplit(".", 2)[0]))
        values[key] = scale.multiply_queries(values[key], factor)
        rescaled[key] = rescaled.get(key, 1.0) * factor
    written = to_project(values, to)
    return _Plan(
        state={written[key]: value.to(state[names[key]].dtype) for key, value in values.items()},
        name=name,
        options=options,
        model=model,
        trained_with="mmpretrain" if divided else None,
        left_out=report.left_out,
        rescaled=tuple((written[key], factor) for key, factor in rescaled.items()),
        notes=tuple(_notes(report, to, divided)),
    )


def _notes(report, to, divided):
    yield from report.notes
    if divided:
        yield (
            "the queries were divided, so that mmpretrain 1.2, whose attention multiplies by sqrt(head width), "
            "computes upstream's logits; other code loads the file with trained_with='mmpretrain'"
        )
    elif to == "mmpretrain":
        yield "the queries are upstream's; mmpretrain 1.2, whose attention scale differs, computes other logits"
    if to == "paddle":
        yield "PaddleViT's LayerNorm has eps 1e-6, upstream's and this package's 1e-5, so its logits differ slightly"


def _table(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _visible_options(theirs, given):
    """The options of a model that shapes show: classes, channels and image size; a position table must be square."""
    names = {f".{upstream}": theirs[name] for name, upstream in comparable(theirs).items()}

    def find(*ends):
        return next((shape for end in ends for name, shape in names.items() if name.endswith(f".{end}")), ())

    options = {"num_classes": next(iter(find("head.weight")), 0), "in_chans": 3, "img_size": (224, 224)}
    norm = find("tokens_to_token.attention1.norm1.weight")
    convolution = find("tokens_to_token.soft_split0.weight", "tokens_to_token.project.weight")
    if norm:
        options["in_chans"] = norm[0] // _WINDOW
    elif len(convolution) == 4:
        options["in_chans"] = convolution[1]
    table = find("pos_embed")
    if len(table) == 3 and "img_size" not in given:
        entries = table[1] - (2 if find("dist_token") else 1)
        side = isqrt(max(entries, 0))
        if side**2 != entries:
            raise Refused(f"its position table has {entries} entries, which no square grid has; give img_size=(H, W)")
        side *= given.get("patch_size", 16)
        options["img_size"] = (side, side)
    return options


def _only_model(theirs, options):
    """The name of the model whose tensors have these names and shapes."""
    found = []
    for name in list_models():
        try:
            with torch.device("meta"):
                table = _table(build_model(name, **options))
            names = match(theirs, table).names
        except (TypeError, ValueError, Refused):  # the model does not take the options, or it is another one
            continue
        if {ours: theirs[key] for key, ours in names.items()} == table:
            found.append(name)
    if len(found) > 1:
        raise ValueError(
            f"convert_checkpoint: model must be given, since the tensors fit {', '.join(found)}, which differ in their "
            "number of heads"
        )
    if not found:
        raise Refused(
            f"no model of list_models() has its tensors with {_listed_options(options)}; give model=NAME and the "
            "options that differ"
        )
    return found[0]


def _listed_options(options):
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _check_tensors(path, expected):
    """Raise unless the file has exactly these tensors, bit for bit."""
    got, _ = read_state_dict(path)
    if files.is_transposed(path):
        got = paddle_files.transposed(got)
    same = got.keys() == expected.keys() and all(
        value.shape == got[name].shape and value.dtype == got[name].dtype and same_bits(value, got[name])
        for name, value in expected.items()
    )
    if not same:
        raise Refused("the new file has other tensors than were written; nothing was written")


def _name(dtype):
    return str(dtype).removeprefix("torch.")
