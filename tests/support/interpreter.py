"""Speeds up Triton's interpreter by removing work whose results are unused; results are unchanged."""

from dataclasses import replace
from functools import wraps


def hasten():
    """Halve the time of interpreted kernels (Triton 3.6, 3.8). Calling it again has no effect.

    Raises:
        AttributeError: this version of Triton has other names in its interpreter.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter._patch_lang, "__wrapped__"):
        _patch_language_once(interpreter)
    _check_no_overflow_in_vain(interpreter.interpreter_builder)


def _patch_language_once(interpreter):
    """A launch patches Triton's language only once for each module of its kernel's functions.

    The interpreter replaces every function of ``triton.language`` when a launch begins and restores them at its end.
    It repeats the same replacement whenever a kernel calls another function.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared = set()  # by this launch

    @wraps(patch)
    def patch_once(function):
        module = id(function.__globals__)
        if module in prepared:
            return None  # a call inside a kernel ignores the result
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
    """Disable the overflow check, which repeats integer sums and products in 64 bits and is only used in ``debug``."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
