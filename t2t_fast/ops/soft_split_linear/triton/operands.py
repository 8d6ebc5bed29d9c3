"""The kernels' operands made of a call's parameters: LayerNorm folded in, packed, cached between inference calls."""

from ..._common import replay
from ..._common import triton_runtime as runtime
from ..._common.cached import FOLDED
from .call import Folded
from .layout import operand_shapes


def _operands(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype, pixels, turned):
    """The :class:`layout.Operands` of a call."""
    norm, sizes = norm_eps is not None, [runtime.fixed(size) for size in weight.shape]
    found = runtime.operators.soft_split_linear_fold(
        weight, bias, norm_weight, norm_bias, norm, channels, *window, dtype, pixels, turned
    )
    return operand_shapes(*sizes, norm, channels, window, bool(pixels), turned).filled(found)


def packed(*parameters, channels, window, dtype, pixels):
    """The parameters (four tensors and ``norm_eps``) for a forward kernel, a :class:`Folded`; and scale and shift of
    every column for an image of bytes (``ops/pixels.py``), ``None`` for values.
    """
    return folded_of(_operands(*parameters, channels, window, dtype, pixels, False))


def folded_of(found):
    """:class:`layout.Operands` as :func:`packed` returns them."""
    columns = None if found.scale is None else [found.scale, found.shift]
    return Folded(found.weight, found.used, found.row_sums, found.offset), columns


def packed_taps(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype):
    """The parameters for the image's gradient: weight, offset (``None`` without LayerNorm)."""
    found = _operands(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype, (), True)
    return found.weight, None if norm_eps is None else found.offset


def operands(x, weight, bias, norm_weight, norm_bias, norm_eps, window, dtype, pixels, keep):
    """A forward kernel's operands other than the image: :func:`packed`.

    keep: whether to cache them for the next call with the same parameters.
    """
    parameters, channels = (weight, bias, norm_weight, norm_bias), runtime.fixed(x.shape[1])
    if keep:
        return _kept(*parameters, norm_eps, channels, window, dtype, pixels)
    return packed(*parameters, norm_eps, channels=channels, window=window, dtype=dtype, pixels=pixels)


@replay.atomic
def _kept(weight, bias, norm_weight, norm_bias, norm_eps, channels, window, dtype, pixels):
    tensors = weight, bias, norm_weight, norm_bias

    def make():
        return packed(*tensors, norm_eps, channels=channels, window=window, dtype=dtype, pixels=pixels)

    return FOLDED.get(tensors, (norm_eps is not None, channels, window, dtype, *pixels), make)
