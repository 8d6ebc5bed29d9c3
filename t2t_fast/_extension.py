"""The only loader of the native code, the module ``_C`` and the operators in ``_ops.so``.

That one of them is missing or broken is a reason, never an error.
"""

import importlib
import json
import re
import struct
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "_ops.so"  # one name for every Python: it uses none
REBUILD = "reinstall t2t_fast to build it again"
COMMAND = "T2T_FAST_BUILD={} pip install --force-reinstall --no-deps ."
"""In the source folder: it builds the operators for a kind of device, or says why it cannot."""


@cache
def _record():
    """What ``setup.py`` wrote down: ``mode`` that was asked for, ``missing`` parts with reasons; empty without it."""
    try:
        found = json.loads((HERE / "_build.json").read_text())
    except (OSError, ValueError):
        return {"mode": None, "missing": {}}
    return {"mode": None, "missing": {}} | (found if isinstance(found, dict) else {})


def _not_built(part):
    """Why a part of the build ("cuda", "cpu", "t2t_fast._C") is not there."""
    if _record()["mode"] == "none":
        return "not built, as T2T_FAST_BUILD=none asked for at installation"
    reason = _record()["missing"].get(part, "T2T_FAST_BUILD=cpu at installation builds it, or says why it cannot")
    return f"not built ({reason})"


def lacking(device):
    """Why an installation without native operators for a kind of device lacks them, or ``None``: it was asked to."""
    mode = _record()["mode"]
    if mode == "none" or (mode == "cpu" and device == "cuda"):
        return None
    return operators_error() or _not_built(device)


@cache
def _attempt():
    """The module and ``None``, or ``None`` and why it cannot be used; tried once in a process."""
    for path in (HERE / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.is_file() and (damage := _damage(path)):
            return None, damage
    try:
        module = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        return None, _absence()
    except (ImportError, SystemError) as error:
        return None, f"broken: {_words(error, 'this Python')}"
    if not (hasattr(module, "build_info") and hasattr(module, "cpu_features")):
        return None, f"foreign: {module.__file__} is not the native module of t2t_fast; remove it"
    return module, None


@cache
def _attempt_operators():
    """Load the operators and return ``None``, or return why that cannot be; tried once in a process."""
    if not LIBRARY.is_file():
        return _not_built("cpu")
    if damage := _damage(LIBRARY):
        return damage
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"broken: {_words(error.__cause__ or error, f'PyTorch {torch.__version__}')}"
    if not hasattr(torch.ops.t2t_fast_native, "soft_split"):
        return f"foreign: {LIBRARY} has no operators of t2t_fast; remove it"
    return None


def _absence():
    """Why Python finds no module to load."""
    binaries = [path.name for path in HERE.glob("_C.*") if path.suffix in (".so", ".pyd")]
    if binaries:
        found = ", ".join(sorted(binaries))
        return f"built for another Python: found {found}, this one loads _C{EXTENSION_SUFFIXES[0]}; reinstall t2t_fast"
    return _not_built("t2t_fast._C")


def _damage(path):
    """What the head of a file tells to be wrong with it, or ``None``.

    The loader names no reason for a binary of another kind of processor, and it crashes on one that is cut off.
    """
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/self/exe", "rb") as file:
            own = file.read(64)
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"broken: {error}"
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return f"broken: {path} is no shared library; {REBUILD}"
    if head[4:6] != own[4:6] or head[18:20] != own[18:20]:
        return f"foreign: {path} is built for another kind of processor; {REBUILD}"
    if own[4] == 2:  # 64 bits: where the table of sections begins, its entries' size and number; it ends the file
        (begin,), (size, count) = struct.unpack_from("=Q", head, 40), struct.unpack_from("=HH", head, 58)
        if path.stat().st_size < begin + size * count:
            return f"broken: {path} is cut off; {REBUILD}"
    return None


def _words(error, host):
    """What the loader's message means; ``host`` is what the file is built for a version of."""
    if match := re.search(r"undefined symbol: (\w+)", str(error)):
        return f"{host} has no {match[1]}, the file is built for another version; {REBUILD}"
    if match := re.search(r"version [`'](\w+_[\d.]+)' not found", str(error)):
        return f"built on a newer system, this one has no {match[1]}; {REBUILD}"
    if match := re.search(r"(\S+): cannot open shared object file", str(error)):
        return f"it needs {match[1]}, which is not found; {REBUILD}"
    return f"{error}; {REBUILD}"


def load():
    """The module ``t2t_fast._C``, or ``None`` where it cannot be used (:func:`load_error` says why)."""
    return _attempt()[0]


def load_error():
    """Why the native module cannot be used, or ``None`` if it can."""
    return _attempt()[1]


def operators():
    """Whether the native operators are loaded, as ``torch.ops.t2t_fast_native``; the first call loads them."""
    return _attempt_operators() is None


def operators_error():
    """Why the native operators cannot be used, or ``None`` if they can."""
    return _attempt_operators()


def build_info():
    """How the native code was built, as the module ``_C`` tells it.

    Returns:
        A dict, or ``None`` without the module: mode; compiler, cxx_standard and flags of the C++ code; operators (what
        they are built for, of cpu and cuda), the versions of torch and cuda they are built with, CUDA architectures;
        commit, date. torch, cuda and commit are ``None`` where there is none.
    """
    module = load()
    return None if module is None else module.build_info()


def cpu_features():
    """Which instruction sets this CPU and its operating system offer, name -> bool; empty where not known."""
    module = load()
    return {} if module is None else module.cpu_features()
