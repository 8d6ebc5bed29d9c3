"""Opens and reads checkpoint files."""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from . import paddle_files, torch_files
from .paddle_files import PADDLE
from .report import Refused

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def read(path: Path) -> Any:
    """The content of a file: dicts of tensors on the CPU, nested as in the file.

    Args:
        path: ``.safetensors``, ``.pdparams`` (PaddlePaddle's), or anything that ``torch.save`` writes.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a regular file, or one that is broken, hostile or changes
        while it is read. ImportError: a ``.safetensors`` file, and safetensors is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        what, reader = "safetensors", _safetensors_reader(path)
    elif suffix == PADDLE:
        what, reader = "PaddlePaddle's parameters", paddle_files.read
    else:
        what, reader = "a checkpoint", torch_files.read
    with _opened(path) as file:
        before = os.fstat(file.fileno())
        try:
            if before.st_size == 0:
                raise Refused("it is empty")
            if before.st_size > _memory():
                raise Refused(f"it has {before.st_size} bytes, more than this machine's memory")
            content = reader(file, before.st_size)
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise Refused("it changed while it was read")
        # A damaged or foreign file can cause almost any exception in a reader.
        except Exception as error:
            text = f"load_checkpoint: {path} could not be read as {what}: {_reason(error)}"
            raise CheckpointError(text) from error
    return content


def is_transposed(path: str | os.PathLike) -> bool:
    """Whether the Linear weights in the file are (in, out), as PaddlePaddle has them."""
    return Path(path).suffix.lower() == PADDLE


def _memory():
    """Bytes of the machine's memory, or infinity if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _reason(error):
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return torch_files.refused_class(refused.group(1))
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Refused):
        return line
    return f"{type(error).__name__}{': ' if line else ''}{line:.300}"


@contextmanager
def _opened(path):
    """The open file, if it is a regular one. Opening anything else could block, or act on a device."""
    try:
        _check_regular(path, os.stat(path))
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        link = f"; it is a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise FileNotFoundError(f"load_checkpoint: there is no file {path}{link}") from error
    except OSError as error:
        raise CheckpointError(f"load_checkpoint: {path} could not be opened: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        _check_regular(path, os.fstat(descriptor))
        yield file


def _check_regular(path, status):
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "of an unknown kind")
        raise CheckpointError(f"load_checkpoint: path must be a regular file, {path} is {kind}")


def _safetensors_reader(path):
    try:
        from safetensors import torch as safetensors_torch
    except ImportError as error:
        raise ImportError(f"load_checkpoint: {path} needs safetensors: pip install 't2t_fast[checkpoints]'") from error

    def read(file, size):
        """Compare the sizes in the header with the file's, then read the rest."""
        header = int.from_bytes(file.read(8), "little")
        if header > size - 8:
            raise Refused(f"its header declares {header} bytes, it has {size}")
        entries = json.loads(file.read(header))
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
        if 8 + header + end != size:
            raise Refused(f"its tensors declare {end} bytes, it has {size - 8 - header}")
        file.seek(0)
        return safetensors_torch.load(file.read())

    return read
