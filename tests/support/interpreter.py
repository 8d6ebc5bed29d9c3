"""Triton's interpreter without work whose results it does not use; what kernels compute stays the same."""

from dataclasses import replace
from functools import wraps


def hasten():
    """Leave out what takes half of the time of the tests of interpreted kernels (Triton 3.6, 3.8). May be called again.

    Raises:
        AttributeError: another Triton names these parts of its interpreter otherwise.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter._patch_lang, "__wrapped__"):
        _patch_language_once(interpreter)
    _check_no_overflow_in_vain(interpreter.interpreter_builder)


def _patch_language_once(interpreter):
    """A launch prepares Triton's language once for each module that its kernel's functions are in.

    The interpreter replaces every function of ``triton.language`` when a launch begins, and puts them back at its end.
    Whenever a kernel calls another function it replaces them as well, by the same ones.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
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


def _check_no_overflow_in_vain(builder):
    """Sums and products of integers are computed in 64 bits as well, and compared; only ``debug`` looks at it."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
