"""Files of ``torch.save``: inspected first, then read by ``torch.load(weights_only=True)``.

``weights_only`` prevents a file from running code, but not from exhausting memory or time, or from ending the process:
compressed records are unpacked before their size is checked, storages of the old format are allocated as declared and
grow with a view, and hashing a deep tuple overflows the stack. The inspection refuses such files.
"""

from __future__ import annotations

import argparse
import io
import re
import threading
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch

from .pickles import Global, Machine, Tuple, check_key
from .report import Refused

_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Callables that the pickle of a checkpoint may name, besides the views below and what the user has allowed.
_CALLS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "_codecs.encode",
        "argparse.Namespace",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    }
)
# Calls whose first arguments are a storage, an offset, a size and strides.
_VIEWS = frozenset(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_STATES = ("collections.OrderedDict", "argparse.Namespace")
# Bytes of an element, by kind of storage.
_ITEMSIZES = (
    dict.fromkeys(("Untyped", "Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1)
    | dict.fromkeys(("Half", "BFloat16", "Short"), 2)
    | dict.fromkeys(("Float", "Int", "QInt32"), 4)
    | dict.fromkeys(("Double", "Long", "ComplexFloat"), 8)
    | {"ComplexDouble": 16}
)
PLAIN_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
"""NumPy's names of dtypes that are numbers."""
LONGEST_STRING = 1 << 26
"""Longest string in the pickle of torch.save, which stores the tensors outside of the pickle."""
_LOADING = threading.Lock()


def read(file: BinaryIO, size: int) -> Any:
    """The content of the file, its tensors on the CPU. Raises :class:`Refused`, or what ``torch.load`` raises."""
    _inspect(file, size)
    file.seek(0)
    # The list of allowed classes is global to the process, so loads take a lock and keep the user's entries.
    with _LOADING:
        allowed = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([entry for entry in _harmless() if entry not in allowed]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def refused_class(name: str) -> str:
    """The reason why a file with a pickled class is not read."""
    return (
        f"it holds a pickled {name.removeprefix('builtins.')}, which loading with weights_only=True refuses, since it "
        "could run code; save the state dict alone, or, if you trust the file, allow the class with "
        "torch.serialization.add_safe_globals"
    )


def _harmless():
    """Classes allowed besides torch's own: upstream's saved command line, and numbers of NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    return [argparse.Namespace, np.dtype, *((scalar, name) for name in names), *dtypes]


def _inspect(file, size):
    start = file.read(len(_ZIP))
    file.seek(0)
    if start == _ZIP:
        content = _pickle_of_archive(file, size)
        _Inspector(io.BytesIO(content), len(content), size).load()
        return
    inspector = _Inspector(file, size, size)
    if start[:1] != b"\x80" or inspector.load() != _LEGACY_MAGIC:
        raise Refused("it was not written by torch.save")
    for _ in ("protocol", "system", "content", "keys of storages"):
        inspector.load()


def _pickle_of_archive(file, size):
    """The pickle in a zip file as torch.save writes it: records are not compressed, names are unique."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("it is a compressed archive, which torch.save does not write")
        if sum(max(record.file_size, record.compress_size) for record in records) > size:
            raise Refused("its records declare more bytes than it has")
        names = [record.filename.lower() for record in records]
        pickles = [record for record in records if re.fullmatch(r"[^/]+/data\.pkl", record.filename)]
        if len(pickles) != 1 or len(set(names)) < len(names):
            raise Refused("it is a zip archive, but not one of torch.save")
        return archive.read(pickles[0])


class _Storage:
    def __init__(self, numel, itemsize):
        self.numel, self.itemsize = numel, itemsize


class _Object:
    """Stands for what a call would return."""

    def __init__(self, name):
        self.name = name


class _Inspector(Machine):
    """Checks the calls, sizes and keys in a pickle of torch.save.

    Args:
        file, size: of the pickle.
        file_size: bytes of the whole file; nothing in it may be larger.
    """

    def __init__(self, file, size, file_size):
        super().__init__(file, size, LONGEST_STRING)
        self._file_size = file_size
        self._storages, self._declared = {}, 0
        self._allowed = {_normalised(entry) for entry in torch.serialization.get_safe_globals()}

    def call(self, function, args):
        name = function.name
        if name == "torch._tensor._rebuild_from_type_v2":
            return self.call(args[0], args[2])
        if name in _VIEWS:
            self._check_view(*args[:4], dtype=args[6] if name.endswith("_v3") else None)
        elif name == "numpy.dtype":
            if not (isinstance(args[0], str) and PLAIN_DTYPE.fullmatch(args[0])):
                raise Refused(f"it holds a NumPy dtype {args[0]!r:.50}, which is no number")
        elif name not in _CALLS and name not in self._allowed:
            if name.startswith("torch._utils._rebuild_"):
                raise Refused(f"it holds a tensor of a kind that no model here takes ({name})")
            raise Refused(refused_class(name))
        elif name == "builtins.bytearray" and any(isinstance(arg, int) for arg in args):
            raise Refused("it asks for a bytearray of a given size")
        for arg in args:
            for item in arg if isinstance(arg, (list, tuple)) else ():
                check_key(item[0] if isinstance(item, list) and item else item)
        return _Object(name)

    def build(self, instance, state):
        name = getattr(instance, "name", type(instance).__name__)
        if name == "numpy.dtype":
            if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<>=|"]:
                raise Refused("it holds a NumPy dtype that is no number")
        elif name in _STATES:
            if not isinstance(state, dict):
                raise Refused(f"it gives a {name} a state that is no dict")
        elif name not in self._allowed:
            raise Refused(refused_class(name))

    def persistent(self, identity):
        if not (isinstance(identity, Tuple) and len(identity) >= 5 and isinstance(identity[1], Global)):
            raise Refused("it refers to objects outside of it")
        kind, cls, key, _location, numel, *view = identity
        itemsize = _ITEMSIZES.get(cls.name.rpartition(".")[2].removesuffix("Storage"))
        if kind != "storage" or itemsize is None:
            raise Refused(refused_class(cls.name))
        if view not in ([], [None]):
            raise Refused("it has views of storages, which PyTorch has not written since 0.4")
        check_key(key)
        if key not in self._storages:
            self._storages[key] = _Storage(_count(numel), itemsize)
            self._declared += numel * itemsize
        if self._declared > self._file_size:
            raise Refused("its tensors declare more bytes than it has")
        return self._storages[key]

    def _check_view(self, storage, offset, size, stride, dtype=None):
        """Raise unless a tensor lies inside its storage and is no larger than the file."""
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise Refused("it holds a tensor without a storage")
        dtype = None if dtype is None else getattr(torch, dtype.name.removeprefix("torch."), None)
        itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else storage.itemsize
        count, end = 1, _count(offset) + 1
        for length, step in zip(size, stride, strict=True):
            count *= _count(length)
            end += (length - 1) * _count(step)
        if count and end * itemsize > storage.numel * storage.itemsize:
            raise Refused("it holds a tensor that is larger than its storage")
        if count * itemsize > self._file_size:
            raise Refused(f"it declares a tensor of {count} elements in {self._file_size} bytes")


def _count(value):
    if not isinstance(value, int) or value < 0:
        raise Refused(f"it has the size {value!r:.50}")
    return value


def _normalised(entry):
    """The name of a class that the user has allowed, as :class:`Machine` gives it."""
    name = entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
    return name.replace("numpy._core.", "numpy.core.")
