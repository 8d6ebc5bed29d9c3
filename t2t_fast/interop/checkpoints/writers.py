"""Writes checkpoint files: the ending of the name decides the file type."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from . import paddle_files
from .paddle_files import PADDLE

State = Mapping[str, torch.Tensor]


def write(path: Path, state: State) -> None:
    """Write {name: tensor} to a file whose ending is one of :data:`WRITERS`.

    The tensors are copied to contiguous CPU memory first, so no file holds more of a storage than its tensor.

    Raises:
        Refused: the file type has no such dtype. ImportError: safetensors is not installed. OSError: of the system.
    """
    WRITERS[path.suffix.lower()](path, {name: _plain(value) for name, value in state.items()})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a new file, in a temporary folder beside ``path``, which the file replaces at the end.

    After an exception ``path`` is as before, and the new file is gone.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        yield new
        os.replace(new, path)


def _plain(value):
    return value.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _write_torch(path, state):
    torch.save(state, path)


def _write_safetensors(path, state):
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"{path.name} needs safetensors: pip install 't2t_fast[checkpoints]'") from error
    save_file(state, path, metadata={"format": "pt"})


def _write_paddle(path, state):
    with open(path, "wb") as file:
        paddle_files.write(file, state)


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    ".safetensors": _write_safetensors,
    PADDLE: _write_paddle,
    **dict.fromkeys((".pth", ".pt", ".tar", ".bin", ".ckpt"), _write_torch),
}
"""Ending of a file's name -> how the file is written. Upstream calls its checkpoints ``.pth.tar``."""
