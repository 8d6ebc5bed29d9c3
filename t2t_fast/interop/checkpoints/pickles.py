"""Reads pickles without running them: opcodes are interpreted, no class is imported and no function called.

Subclasses of :class:`Machine` define what a call or a persistent id means: ``torch_files.py`` inspects files of
``torch.save`` before PyTorch reads them, ``paddle_files.py`` builds arrays.
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO, cast

from .report import Refused

KEY_STEPS = 1000
"""Nested entries of a tuple that may be hashed. Hashing recurses, and visits a shared part once per reference."""
TUPLE_STEPS = 10_000
"""Nested entries of any tuple of tuples."""
LINE_LENGTH = 4096
"""Longest line of a text opcode."""

# Opcodes that push their argument.
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class Global:
    """A module attribute that a pickle names; it is never resolved."""

    def __init__(self, name: str):
        self.name = name


class Tuple(tuple):
    """A tuple and the number of steps that hashing it takes."""

    steps: int

    def __new__(cls, items=()):
        self = super().__new__(cls, items)
        self.steps = 1 + sum(item.steps if isinstance(item, Tuple) else 1 for item in items)
        if self.steps > TUPLE_STEPS and any(isinstance(item, Tuple) for item in items):
            raise Refused(f"it holds nested tuples of {self.steps} entries")
        return self


def check_key(key: Any) -> None:
    """Raise unless ``key`` can be hashed in few steps."""
    if isinstance(key, Tuple) and key.steps > KEY_STEPS:
        raise Refused(f"a key in it is a tuple of {key.steps} entries")


class _Bounded:
    """Limits what a pickle may read: ``size`` bytes in total, ``longest`` at a time, lines of ``LINE_LENGTH``."""

    def __init__(self, file, size, longest):
        self._file = file
        self._left = size
        self._longest = longest

    def read(self, size):
        if size > self._left:
            raise Refused("it is truncated, or declares more bytes than it has")
        if size > self._longest:
            raise Refused(f"its pickle holds a string of {size} bytes")
        self._left -= size
        return self._file.read(size)

    def readline(self):
        line = self._file.readline(min(LINE_LENGTH, self._left))
        self._left -= len(line)
        return line


class Machine:
    """Interprets the pickles of a file, one after the other.

    Args:
        file: binary file at the first pickle.
        size: bytes that may be read.
        longest: bytes of the longest string.
    """

    def __init__(self, file: BinaryIO, size: int, longest: int):
        self._file = _Bounded(file, size, longest)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def call(self, function: Global, args: Tuple) -> Any:
        """The result of a call of ``function`` (:class:`Global`) or an object of that class, for the stack."""
        raise NotImplementedError

    def build(self, instance: Any, state: Any) -> None:
        """Give what :meth:`call` returned its state."""
        raise NotImplementedError

    def persistent(self, identity: Any) -> Any:
        """The object that a persistent id refers to."""
        raise Refused("it refers to objects outside of it")

    def load(self) -> Any:
        """The next pickle: dicts, lists, :class:`Tuple`, numbers, strings, bytes and what :meth:`call` returned."""
        self._stack, self._memo = [], {}
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, self._file)):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _items(self):
        """What was pushed since the last mark."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _step(self, name, argument):
        stack, memo = self._stack, self._memo
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "TUPLE":
            stack.append(Tuple(self._items()))
        elif name in _TUPLES:
            stack.append(Tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("SETITEM", "SETITEMS"):
            items = self._items() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            self._set_items(stack[-1], items[::2], items[1::2])
        elif name in ("APPEND", "APPENDS"):
            items = self._items() if name == "APPENDS" else [stack.pop()]
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            if not isinstance(function, Global) or not isinstance(args, Tuple):
                raise Refused("it calls something that is not a named function")
            stack.append(self.call(function, args))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"its pickle has the opcode {name}, which no checkpoint needs")

    @staticmethod
    def _set_items(target, keys, values):
        for key, value in zip(keys, values, strict=True):
            check_key(key)
            if isinstance(target, dict):
                target[key] = value


def _global(module, attribute):
    """The global under its Python 3 and NumPy 1 name, whatever version wrote the file."""
    if not (isinstance(module, str) and isinstance(attribute, str)):
        raise Refused("it names a class by something else than strings")
    module = {"__builtin__": "builtins"}.get(module, module)
    return Global(f"{module.replace('numpy._core.', 'numpy.core.')}.{attribute}")
