"""PaddlePaddle's ``.pdparams``, a pickle of a dict of NumPy arrays. The reader creates nothing but arrays.

Source of the format: ``paddle.save`` in PaddlePaddle's ``python/paddle/framework/io.py``.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

from .pickles import Machine
from .report import Refused
from .torch_files import PLAIN_DTYPE

PADDLE = ".pdparams"
"""Ending of the files' names."""
_BUFFER = ("numpy.core.numeric._frombuffer", "numpy.core.multiarray._frombuffer")


def read(file: BinaryIO, size: int) -> Any:
    """{name: tensor} of the file, nested as in the file. Raises :class:`Refused`, or anything for a broken pickle."""
    return _plain(_Reader(file, size, longest=size).load(), depth=0)


def transposed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with the weights of Linear modules as PaddlePaddle has them, (in, out), or back from there.

    These are all matrices called ``weight``; the Performer's random features, a matrix ``w``, are not transposed.
    """
    return {
        name: value.t() if value.ndim == 2 and name.rpartition(".")[2] == "weight" else value
        for name, value in state.items()
    }


def write(file: BinaryIO, state: Mapping[str, torch.Tensor]) -> None:
    """Write {name: tensor} as ``paddle.save`` does; Linear weights are (in, out) in the file.

    Raises:
        Refused: a dtype that NumPy lacks (bfloat16 is written as PaddlePaddle does, as uint16).
    """
    arrays: dict[str, Any] = {}
    for name, value in transposed(state).items():
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        try:
            array = bits.contiguous().numpy()
        except TypeError as error:
            raise Refused(f"{PADDLE} files cannot hold {name} of {str(value.dtype).removeprefix('torch.')}") from error
        arrays[name] = array.view(np.uint16) if value.dtype == torch.bfloat16 else array
    # With this table paddle.load returns tensors, and set_state_dict accepts both kinds of names.
    _Pickler(file, protocol=4).dump({**arrays, "StructuredToParameterName@@": {name: name for name in arrays}})


class _Pickler(pickle.Pickler):
    """Writes arrays as calls of ``numpy.ndarray``, which every NumPy has under this name.

    NumPy 2 would write ``numpy._core...``, which NumPy 1, used with many versions of PaddlePaddle, does not have.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, value.tobytes())
        return NotImplemented


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
        if name == "numpy.ndarray" and len(args) == 3:  # what :func:`write` writes
            shape, code, data = args
            array = _Array()
            array.fill(data, _DType(code), shape, "C")
            return array
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
