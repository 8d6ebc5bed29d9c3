"""transformer_block as its parts in PyTorch operations: what each of them saves for backward."""

from .._common.attention import softmax_attention
from ..layer_norm_linear import aten as linear
from ..layer_norm_mlp import aten as mlp
from .autograd import composed

forward = composed(linear.forward, softmax_attention, mlp.forward)
