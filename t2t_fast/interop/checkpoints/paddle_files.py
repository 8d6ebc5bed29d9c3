"""Reads PaddlePaddle's ``.pdparams``, a pickle of a dict of NumPy arrays; only arrays are created.

Source of the format: ``paddle.save`` in PaddlePaddle's ``python/paddle/framework/io.py``.
"""

from __future__ import annotations

import math
from typing import Any, BinaryIO

import numpy as np
import torch

from .pickles import Machine
from .report import Refused
from .torch_files import PLAIN_DTYPE

_BUFFER = ("numpy.core.numeric._frombuffer", "numpy.core.multiarray._frombuffer")


def read(file: BinaryIO, size: int) -> Any:
    """{name: tensor} of the file, nested as in the file. Raises :class:`Refused`, or anything for a broken pickle."""
    return _plain(_Reader(file, size, longest=size).load(), depth=0)


def _plain(value, depth):
    """The value with its arrays as tensors, down to the depth at which ``entries.py`` looks for a state dict."""
    if isinstance(value, dict) and depth < 3:
        return {name: _plain(entry, depth + 1) for name, entry in value.items()}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        value = value[1]  # PaddlePaddle pickles a single tensor as (name, array)
    return value.tensor() if isinstance(value, _Array) else value


class _DType:
    def __init__(self, code):
        if not (isinstance(code, str) and PLAIN_DTYPE.fullmatch(code)):
            raise Refused(f"it holds an array of dtype {code!r:.50}, which is no number")
        self.numpy = np.dtype(code)

    def set(self, state):
        order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        if order not in ("<", ">", "=", "|") or state[2:] != (None, None, None, -1, -1, 0):
            raise Refused("it holds an array whose dtype is no number")
        self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """An array under construction: first empty, then with shape, dtype and bytes."""

    def __init__(self):
        self.numpy = np.empty(0)

    def set(self, state):
        _version, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")
        return self

    def fill(self, data, dtype, shape, order):
        if not (isinstance(data, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)):
            raise Refused("it holds an array of something else than bytes")
        if math.prod(shape) * dtype.numpy.itemsize != len(data):
            raise Refused(f"it holds an array of shape {tuple(shape)} in {len(data)} bytes")
        self.numpy = np.frombuffer(data, dtype.numpy).reshape(shape, order=order)

    def tensor(self):
        """A copy as a tensor. uint16 is bfloat16, which NumPy lacks; PaddlePaddle has no uint16 tensors."""
        array = np.array(self.numpy, dtype=self.numpy.dtype.newbyteorder("="), order="C")
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


class _Reader(Machine):
    def call(self, function, args):
        name = function.name
        if name == "numpy.core.multiarray._reconstruct":
            return _Array()
        if name in _BUFFER:
            array = _Array()
            array.fill(*args)
            return array
        if name == "numpy.core.multiarray.scalar":
            array = _Array()
            array.fill(args[1], args[0], (), "C")
            return array
        if name == "numpy.dtype":
            return _DType(args[0])
        if name == "_codecs.encode" and args[1:] in ((), ("latin1",), ("latin-1",)):
            return args[0].encode("latin-1")
        if name == "collections.OrderedDict" and not args:
            return {}
        if name == "builtins.tuple" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        raise Refused(
            f"it holds a pickled {name.removeprefix('builtins.')}; only dicts of arrays are read, as anything "
            "else could run code"
        )

    def build(self, instance, state):
        if not isinstance(instance, (_Array, _DType)):
            raise Refused(f"it gives a {type(instance).__name__} a state")
        instance.set(state)
