"""Models in folders and on the Hugging Face hub: ``config.json`` and ``model.safetensors``, in timm's layout.

``timm.create_model("local-dir:FOLDER")`` and ``"hf-hub:OWNER/NAME"`` read the same keys of ``config.json``.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import FLOATING, CheckpointError, check_pair
from ..models import build_model, list_models
from .checkpoints import load_checkpoint, unwrap
from .checkpoints.report import listed
from .checkpoints.writers import write
from .create import create_model

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_LIBRARY = "t2t_fast"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
_TIMM_PREFIX = "t2t_paper_"
"""Prefix of the plain ViTs' names in timm's registry, which has other models under these names (``t2t_fast.timm``)."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# Preprocessing of upstream's recipe, where timm looks for it.
_PREPROCESSING = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


def timm_name(name: str) -> str:
    """The name in timm's registry of a model of this package."""
    return name if name.startswith("t2t_") else _TIMM_PREFIX + name


def save_pretrained(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a model of :func:`create_model` to a folder that :func:`from_pretrained` reads.

    The folder gets ``config.json`` (name, options, dtype, version), ``model.safetensors`` (the weights on the CPU, in
    their dtype) and, unless it has one, a short ``README.md``. Files of the same names are replaced once all are
    written. What was set on the model after its construction, other than weights and the number of classes, is not
    saved.

    Args:
        model: built by name; its head may have another number of classes by now. Wrappers of DataParallel,
            DistributedDataParallel and torch.compile are unwrapped.
        folder: created if missing.

    Returns:
        the folder.

    Raises:
        TypeError: not a module, or an option of the model that JSON cannot hold, such as ``norm_layer``. ValueError: a
        model that was not built by name (upstream's, swapped or not: save its ``state_dict`` and use
        :func:`convert_checkpoint`), or whose tensors are not those of its name and options any more.
        ImportError: safetensors is not installed.
    """
    function = "save_pretrained"
    path = _folder(function, folder)
    model, config = _described(function, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        new = Path(scratch)
        write(new / WEIGHTS, model.state_dict())
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if not (path / CARD).exists():
            (new / CARD).write_text(_card(config), encoding="utf-8")
        path.mkdir(exist_ok=True)
        for file in new.iterdir():
            os.replace(file, path / file.name)
    return path


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload what :func:`save_pretrained` writes to a repository of the Hugging Face hub, which is created if missing.

    Args:
        model: as :func:`save_pretrained`; it is checked before anything is sent.
        repo_id: "OWNER/NAME", or "NAME" in the account of the token.
        private, token, branch, create_pr, commit_message: as huggingface_hub's ``ModelHubMixin.push_to_hub``.

    Returns:
        the address of the commit.

    Raises:
        TypeError, ValueError: as :func:`save_pretrained`. ImportError: huggingface_hub or safetensors is not installed.
        Errors of huggingface_hub: no access, no network, a bad repository name.
    """
    function = "push_to_hub"
    model, config = _described(function, model)
    try:
        from huggingface_hub import ModelHubMixin
    except ImportError as error:
        raise ImportError(f"{function} needs huggingface_hub: pip install 't2t_fast[hub]'") from error

    class Upload(ModelHubMixin):
        """The mixin's upload for a model that is not its subclass."""

        def _save_pretrained(self, save_directory: Path) -> None:
            save_pretrained(model, save_directory)

    message = f"Upload {config['architecture']}" if commit_message is None else commit_message
    commit = Upload().push_to_hub(
        repo_id, private=private, token=token, branch=branch, create_pr=create_pr, commit_message=message
    )
    return str(commit)


def from_pretrained(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """A model with its weights, from a folder of :func:`save_pretrained` or a repository of the Hugging Face hub.

    Only JSON and safetensors are read, never a pickle. The weights are loaded strictly, as by :func:`load_checkpoint`.
    Folders that timm wrote for a model of this package can be read too.

    Args:
        source: a folder, or "OWNER/NAME" on the hub, which needs huggingface_hub; an existing folder wins.
        revision, token, cache_dir, local_files_only: for the hub, as ``huggingface_hub.hf_hub_download``. The
            environment variable ``HF_HUB_OFFLINE`` works too.
        options: override the saved ones, as in :func:`create_model`: with another ``img_size`` the position table is
            resized, with another ``num_classes`` the head is newly initialised, with a warning.

    Returns:
        the model in evaluation mode, in the dtype that was saved, on the CPU.

    Raises:
        FileNotFoundError: no such folder, file or repository. CheckpointError: ``config.json`` does not describe a
        model of this package, or the weights do not fit it. TypeError, ValueError: a bad option. ImportError: a package
        is not installed.
    """
    config_path, weights = _files(source, revision, token, cache_dir, local_files_only)
    name, saved, dtype = _read_config(config_path)
    try:
        described: Any = _on_meta(name, saved)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"from_pretrained: {config_path} does not describe a model: {error}") from error
    numbers, size = sum(value.numel() for value in described.state_dict().values()), weights.stat().st_size
    if numbers > size:
        raise CheckpointError(
            f"from_pretrained: {config_path} describes a {name} of {numbers} numbers, {weights} has {size} bytes"
        )
    model = create_model(name, **{**saved, **options}).to(dtype)
    num_classes = options.get("num_classes")
    report = load_checkpoint(model, weights, num_classes=num_classes, source_grid=described.grid_size)
    if report.reinitialised:
        warnings.warn(
            f"from_pretrained: {weights} has no head of {num_classes} classes, so "
            f"{', '.join(report.reinitialised)} are newly initialised",
            stacklevel=2,
        )
    return model.eval()


def _folder(function: str, folder: Any) -> Path:
    """The folder as a path; it may not exist, but nothing else may be there."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{function}: folder must be a str or an os.PathLike, got {type(folder).__name__}")
    path = Path(os.fsdecode(folder))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{function}: folder must be a directory, {path} is a file")
    return path


def _on_meta(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return build_model(name, **options)


def _described(function: str, model: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model without wrappers, and its ``config.json``, after all checks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    built_as = getattr(model, "built_as", None)
    if built_as is None:
        raise ValueError(
            f"{function}: model must be built by t2t_fast.create_model, which remembers its name and options, got "
            f"{type(model).__name__}; to save the weights of another model of upstream's network, write its state_dict "
            "and convert the file (t2t_fast.convert_checkpoint)"
        )
    name, options = built_as
    options = {
        key: value for key, value in options.items() if key not in ("device", "dtype")
    }  # of the weights, not the model
    options["num_classes"] = _num_classes(function, model)
    for option, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{function}: {option} must be a number, a string, a sequence of them or None to be saved in {CONFIG}, "
                f"got {value!r}"
            ) from error
    ours, expected = (_table(each) for each in (model, _on_meta(name, options)))
    if ours != expected:
        different = [key for key in {**expected, **ours} if ours.get(key) != expected.get(key)]
        raise ValueError(
            f"{function}: model must have the tensors of a {name} with its options, but these are missing, unexpected "
            f"or of another shape: {listed(different)}"
        )
    if any(value.is_meta for value in model.state_dict().values()):
        raise ValueError(f"{function}: model must have memory, got tensors on the meta device")
    return model, _config(name, options, model)


def _table(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _num_classes(function: str, model: nn.Module) -> int:
    """The classes of the head that the model has now; 0 for none."""
    head = getattr(model, "head", None)
    if isinstance(head, nn.Identity):
        return 0
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{function}: model.head must be nn.Linear or nn.Identity, got {type(head).__name__}")
    return head.out_features


def _config(name: str, options: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The content of ``config.json``; timm reads all but the last three keys."""
    height, width = check_pair("save_pretrained", "img_size", options["img_size"], minimum=1)
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in model.parameters() if p.is_floating_point()))
    return {
        "architecture": timm_name(name),
        "num_classes": options["num_classes"],
        "num_features": model.num_features,
        "global_pool": options.get("global_pool", "token"),
        "model_args": options,
        "pretrained_cfg": {
            "num_classes": options["num_classes"],
            "input_size": [options["in_chans"], height, width],
            "fixed_input_size": True,  # timm then builds the model for the size of the images
            **_PREPROCESSING,
            "classifier": [key for key in ("head", "head_dist") if getattr(model, key, None) is not None],
        },
        "dtype": str(dtype).removeprefix("torch."),
        "library_name": _LIBRARY,
        "library_version": __version__,
    }


def _card(config: Mapping[str, Any]) -> str:
    """A model card: what the folder holds, and how to load it."""
    channels, height, width = config["pretrained_cfg"]["input_size"]
    return f"""---
library_name: {_LIBRARY}
pipeline_tag: image-classification
tags:
- image-classification
- t2t-vit
---

# {config["architecture"]}

A Tokens-to-Token vision transformer of the Python package {_LIBRARY} {config["library_version"]}.

| | |
|---|---|
| architecture | {config["architecture"]} |
| input | {channels} x {height} x {width}; other sizes work |
| classes | {config["num_classes"]} |
| dtype | {config["dtype"]} |

```python
import t2t_fast

model = t2t_fast.from_pretrained("FOLDER or OWNER/NAME")
```

Training data, metrics and license are not recorded by {_LIBRARY}; please add them here.
"""


def _files(source: Any, revision: Any, token: Any, cache_dir: Any, local_files_only: bool) -> tuple[Path, Path]:
    """The paths of ``config.json`` and of the weights, downloaded if ``source`` is no folder."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"from_pretrained: source must be a str or an os.PathLike, got {type(source).__name__}")
    folder = Path(os.fsdecode(source))
    if folder.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"from_pretrained: {folder} must have {CONFIG} and {WEIGHTS}, it lacks {' and '.join(missing)}"
            )
        return folder / CONFIG, folder / WEIGHTS
    if folder.exists():
        raise ValueError(
            f"from_pretrained: source must be a folder, {folder} is a file; "
            "create_model(NAME, checkpoint=FILE) takes it"
        )
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        raise FileNotFoundError(f"from_pretrained: there is no folder {folder}, and it is no OWNER/NAME of the hub")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: there is no folder {folder}, and the hub needs huggingface_hub: "
            "pip install 't2t_fast[hub]'"
        ) from error
    options: dict[str, Any] = dict(
        revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, library_name=_LIBRARY
    )
    try:
        return Path(hf_hub_download(source, CONFIG, **options)), Path(hf_hub_download(source, WEIGHTS, **options))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"from_pretrained: there is no folder {folder}, and the hub did not provide {CONFIG} and {WEIGHTS} of "
            f"{source}: {error}"
        ) from error


def _read_config(path: Path) -> tuple[str, dict[str, Any], torch.dtype]:
    """Name, options and dtype of a ``config.json``, this package's or timm's."""

    def refused(text: str) -> CheckpointError:
        return CheckpointError(f"from_pretrained: {path}: {text}")

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refused(f"it is not JSON: {error}") from error
    name = config.get("architecture") if isinstance(config, dict) else None
    name = name.removeprefix(_TIMM_PREFIX) if isinstance(name, str) else name
    if name not in list_models():
        raise refused(f"architecture must be one of t2t_fast.list_models(), got {name!r:.100}")
    options, timm = config.get("model_args", {}), config.get("pretrained_cfg", {})
    if not isinstance(options, dict) or not isinstance(timm, dict):
        raise refused("model_args and pretrained_cfg must be objects")
    defaults: dict[str, Any] = {}
    size = timm.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        defaults = {"in_chans": size[0], "img_size": size[1:]}
    if "num_classes" in config:
        defaults["num_classes"] = config["num_classes"]
    dtype = config.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise refused(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.100}")
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in {**defaults, **options}.items()}
    return name, options, _DTYPES[dtype]
