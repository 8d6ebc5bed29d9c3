"""Triton's interpreter without the work that it does again and again."""

from functools import wraps
from importlib.util import find_spec


def patch_language_once():
    """A launch prepares Triton's language for each module of its kernel's functions once, not at every call of one.

    The interpreter replaces every function of ``triton.language`` when a launch begins, and puts them back at its end.
    Whenever a kernel calls another function it replaces them as well, by the same ones: half of the time of such tests.
    """
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if hasattr(patch, "__wrapped__"):
        return
    prepared = set()  # by this launch

    @wraps(patch)
    def patch_once(function):
        module = id(function.__globals__)
        if module in prepared:
            return None  # asked for by a call, which ignores it
        scope = patch(function)
        prepared.add(module)
        return scope

    @wraps(launch)
    def launch_afresh(self, *arguments, **named):
        prepared.clear()
        try:
            return launch(self, *arguments, **named)
        finally:
            prepared.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
