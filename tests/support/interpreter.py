"""Speeds up Triton's interpreter by removing work that is repeated or unused; results are unchanged."""

import math
from dataclasses import replace
from functools import wraps


def hasten():
    """Cut the time of interpreted kernels to about a quarter (Triton 3.6, 3.8). Calling it again has no effect.

    Raises:
        AttributeError: this version of Triton has other names in its interpreter.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter._patch_lang, "__wrapped__"):
        _patch_language_once(interpreter)
        _remember_types(interpreter)
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


def _remember_types(interpreter):
    """Look up what depends only on a type or a shape; the interpreter computes it again for every value of a kernel.

    The values of a kernel share these objects, because nothing writes to them.
    """
    core = interpreter.tl.core
    np_dtype, block_type, tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    np_dtypes, shapes, sizes = {}, {}, {}

    @wraps(np_dtype)
    def known_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    @wraps(block_type)
    def known_block_type(self, element_ty, shape):
        key = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if key not in shapes:
            block_type(self, element_ty, shape)
            shapes[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = shapes[key]
        self.name = f"<{text}, {element_ty}>"

    @wraps(tensor)
    def known_tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in sizes:
            sizes[key] = core.constexpr(math.prod(key)), core.tuple([core.constexpr(size) for size in key])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes[key]

    interpreter._get_np_dtype = known_np_dtype
    core.block_type.__init__ = known_block_type
    core.tensor.__init__ = known_tensor


def _check_no_overflow_in_vain(builder):
    """Disable the overflow check, which repeats integer sums and products in 64 bits and is only used in ``debug``."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
