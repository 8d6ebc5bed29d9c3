"""The only importer of the native module ``t2t_fast._C``. That it is missing or broken is a reason, never an error."""

import importlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


@cache
def _attempt():
    """The module and ``None``, or ``None`` and why it cannot be used; tried once in a process."""
    try:
        module = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        return None, _absence()
    except (ImportError, SystemError) as error:
        return None, f"broken: {error}; reinstall t2t_fast to build it again"
    if not (hasattr(module, "build_info") and hasattr(module, "cpu_features")):
        return None, f"foreign: {module.__file__} is not the native module of t2t_fast; remove it"
    return module, None


def _absence():
    """Why Python finds no module to load."""
    binaries = [path.name for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd")]
    if binaries:
        found = ", ".join(sorted(binaries))
        return f"built for another Python: found {found}, this one loads _C{EXTENSION_SUFFIXES[0]}; reinstall t2t_fast"
    return "not built: pure-Python installation (T2T_FAST_BUILD=cpu at installation builds it, or says why it cannot)"


def load():
    """The module ``t2t_fast._C``, or ``None`` where it cannot be used (:func:`load_error` says why)."""
    return _attempt()[0]


def load_error():
    """Why the native module cannot be used, or ``None`` if it can."""
    return _attempt()[1]


def build_info():
    """How the native module was built: mode, compiler, cxx_standard, flags, cuda, architectures, commit, date.

    Returns:
        A dict, or ``None`` without the native module. ``cuda`` and ``commit`` are ``None`` where there is none.
    """
    module = load()
    return None if module is None else module.build_info()


def cpu_features():
    """Which instruction sets this CPU and its operating system offer, name -> bool; empty where not known."""
    module = load()
    return {} if module is None else module.cpu_features()
