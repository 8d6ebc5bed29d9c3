"""layer_norm_linear in PyTorch operations."""

from ..add_layer_norm import aten as norm
from .autograd import differentiable

forward = differentiable(norm)
