"""Optional packages that are measured where they are installed."""

from importlib import import_module

from .groups import LeftOut


def load(package, module):
    """A module of an optional package.

    Raises:
        LeftOut: it is not installed, or cannot be imported, with the reason.
    """
    try:
        return import_module(module)
    except ImportError as failure:
        if failure.name == module.partition(".")[0]:
            raise LeftOut(f"the package {package} is not installed") from failure
        raise LeftOut(f"the package {package} cannot be imported ({failure})") from failure
