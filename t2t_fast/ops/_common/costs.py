"""The cost of each operator: bytes and FLOPs of a fused implementation, per image, from its sizes.

A cost is a list of kernels: the minimum time is the sum over kernels of the slower of their two limits. A Performer
layer forward is two of them (soft split + LayerNorm + Linear + keys; queries + token_mlp), activations of ``element``
bytes are read and written once each, statistics and key state are in float32. Weights are ignored: they do not grow
with the batch. Notation: L tokens, E width, m random features, P = C*H*W pixels of the image that is split.
"""

from typing import NamedTuple

from .spec import Window

WIDTH = 64
"""Token width inside the T2T module."""

FEATURES = 32
"""Random features of its Performer."""


class Kernel(NamedTuple):
    """Bytes moved and floating-point operations."""

    bytes: float
    flops: float


class Cost(NamedTuple):
    """Kernels of the forward and of the backward pass, and the bytes that must be saved between them.

    ``only``: the kernels of a forward pass that saves nothing, if they differ.
    """

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...] = ()
    saved: float = 0.0
    only: tuple[Kernel, ...] | None = None

    @property
    def inference(self) -> tuple[Kernel, ...]:
        """The kernels of a forward pass that saves nothing."""
        return self.forward if self.only is None else self.only

    def kernels(self, mode: str) -> tuple[Kernel, ...]:
        """The kernels of "inference" or of "training" (forward and backward)."""
        return self.inference if mode == "inference" else self.forward + self.backward

    def bytes(self, mode: str) -> float:
        return sum(kernel.bytes for kernel in self.kernels(mode))

    def flops(self, mode: str) -> float:
        return sum(kernel.flops for kernel in self.kernels(mode))

    def floor(self, mode: str, bandwidth: float, flops: float) -> float:
        """The minimum time of this design in seconds, at ``bandwidth`` bytes/s and ``flops`` FLOP/s."""
        return sum(max(kernel.bytes / bandwidth, kernel.flops / flops) for kernel in self.kernels(mode))


def chain(*costs: Cost) -> Cost:
    """The cost of several steps in sequence."""
    return Cost(
        tuple(kernel for cost in costs for kernel in cost.forward),
        tuple(kernel for cost in reversed(costs) for kernel in cost.backward),
        sum(cost.saved for cost in costs),
        tuple(kernel for cost in costs for kernel in cost.inference),
    )


def _sizes(channels: int, height: int, width: int, window: Window) -> tuple[int, int, int]:
    h, w = window.grid(height, width)
    return h * w, channels * window.taps, channels * height * width


def soft_split(channels: int, height: int, width: int, window: Window, element: int = 2) -> Cost:
    """The image is read once and the tokens are written once; backward reads tokens and writes the image."""
    length, columns, pixels = _sizes(channels, height, width, window)
    kernel = Kernel((pixels + length * columns) * element, 0)
    return Cost((kernel,), (kernel,))


def soft_composition(channels: int, height: int, width: int, window: Window, element: int = 2) -> Cost:
    """The same traffic as the soft split, with one addition per token element forward."""
    length, columns, _ = _sizes(channels, height, width, window)
    (split,) = soft_split(channels, height, width, window, element).forward
    return Cost((split._replace(flops=length * columns),), (split,))


def fused_fold_unfold(channels: int, height: int, width: int, window: Window, element: int = 2) -> Cost:
    """Tokens are read once and written once, the intermediate image is not; backward is the same pass."""
    length, columns, pixels = _sizes(channels, height, width, window)
    kernel = Kernel(2 * length * columns * element, length * columns + pixels)
    return Cost((kernel,), (kernel,))


def soft_split_linear(
    channels: int,
    height: int,
    width: int,
    window: Window,
    out: int,
    element: int = 2,
    *,
    norm: bool = True,
    image_gradient: bool = True,
) -> Cost:
    """One implicit GEMM; backward: a weight gradient and, with ``image_gradient``, an image gradient."""
    length, columns, pixels = _sizes(channels, height, width, window)
    product = 2 * length * columns * out
    traffic = (pixels + out * length) * element
    statistics = 8 * length if norm else 0
    backward = [Kernel(traffic + statistics, product)]
    if image_gradient:
        # LayerNorm's part of the gradient reads the image and two scalars a token again
        correction = pixels * element + 16 * length if norm else 0
        backward.append(Kernel(traffic + correction, product))
    return Cost((Kernel(traffic + statistics, product),), tuple(backward), pixels * element + statistics)


def _state(width: int, features: int) -> int:
    return 4 * (features * width + features)


def performer_attention(length: int, width: int = WIDTH, features: int = FEATURES, element: int = 2) -> Cost:
    """A pass over the keys and a pass over the queries, forward and backward."""
    row, state, product = width * length * element, _state(width, features), length * width * features
    return Cost(
        (Kernel(2 * row + state, 4 * product), Kernel(2 * row + state, 4 * product)),
        (Kernel(3 * row + 2 * state, 10 * product), Kernel(4 * row + 2 * state, 8 * product)),
        3 * row + state,
    )


def token_mlp(length: int, width: int = WIDTH, hidden: int = WIDTH, element: int = 2) -> Cost:
    """Reads y and v, writes the tokens; backward recomputes everything except the last product."""
    row, square, wide = width * length * element, width * width, width * hidden
    return Cost(
        (Kernel(3 * row, 2 * length * (square + 2 * wide)),),
        (Kernel(5 * row, 2 * length * (3 * square + 5 * wide)),),
        2 * row,
    )


def performer_layer(
    channels: int,
    height: int,
    width: int,
    window: Window,
    element: int = 2,
    *,
    image_gradient: bool = False,
    embed: int = WIDTH,
    features: int = FEATURES,
    hidden: int = WIDTH,
) -> Cost:
    """Soft split, LayerNorm, kqv and the pass over the keys in one kernel; then the queries and token_mlp in one.

    k, q and v are written once and not read for the keys; without a backward pass, k and the statistics are not
    written. The attention's output is never written. Backward: the queries with token_mlp, the keys, the soft split.
    """
    length, _, pixels = _sizes(channels, height, width, window)
    split = soft_split_linear(channels, height, width, window, 3 * embed, element, image_gradient=image_gradient)
    mlp, row = token_mlp(length, embed, hidden, element), embed * length * element
    state, product = _state(embed, features), length * embed * features
    (first,) = split.forward
    flops = first.flops + 4 * product
    queries = Kernel(3 * row + state, 4 * product + mlp.forward[0].flops)
    return Cost(
        (Kernel(first.bytes + state, flops), queries),
        (
            Kernel(5 * row + 8 * length + 2 * state, 10 * product + mlp.backward[0].flops),
            Kernel(5 * row + 16 * length + 2 * state, 8 * product),
            *split.backward,
        ),
        split.saved + 3 * row + state,
        (Kernel(pixels * element + 2 * row + state, flops), queries),
    )


STREAM = 4
"""Bytes of an element of a transformer block's stream of tokens, which stays in float32 under autocast."""


def add_layer_norm(
    length: int, width: int, element: int = 2, stream: int = STREAM, *, branch: bool = True, again: bool = False
) -> Cost:
    """Reads x and the branch, writes the stream and its LayerNorm; backward reads the stream and both gradients and
    writes those of x and of the branch, and with ``again`` the normalised tokens.
    """
    row, added = width * length, int(branch)
    forward = row * ((1 + added) * stream + (1 + added) * element)
    backward = row * (3 * stream + (1 + added + again) * element)
    return Cost((Kernel(forward, 0),), (Kernel(backward, 0),), row * stream)


def linear(length: int, inputs: int, outputs: int, element: int = 2) -> Cost:
    """A product; backward two, for its input and for its weight."""
    kernel = Kernel(length * (inputs + outputs) * element, 2 * length * inputs * outputs)
    return Cost((kernel,), (kernel, kernel), length * inputs * element)


def layer_norm_linear(length: int, width: int, outputs: int, element: int = 2, stream: int = STREAM) -> Cost:
    """LayerNorm, then a product; backward: its input, LayerNorm, which writes that input again, its weight."""
    norm = add_layer_norm(length, width, element, stream, branch=False, again=True)
    product = linear(length, width, outputs, element)
    first, last = product.backward
    return Cost(norm.forward + product.forward, (first, *norm.backward, last), norm.saved)


def layer_norm_mlp(length: int, width: int, hidden: int, element: int = 2, stream: int = STREAM) -> Cost:
    """The branch is added and normalised; fc1 with GELU, which also writes its own output for backward; fc2 with the
    stream. Backward: fc2's gradient in the products' dtype; its product with GELU's gradient, which reads fc1's output
    and writes its gradient and fc2's input; fc2's weight; fc1's input; LayerNorm; fc1's weight.
    """
    norm = add_layer_norm(length, width, element, stream, again=True)
    row, wide, flops = width * length, hidden * length * element, 2 * length * width * hidden
    operand = row * element
    fc1, fc2 = Kernel(operand + 2 * wide, flops), Kernel(wide + 2 * row * stream, flops)
    product = Kernel(operand + wide, flops)
    backward = Kernel(row * stream + operand, 0), Kernel(operand + 3 * wide, flops), product, product
    return Cost(
        (*norm.forward, fc1, fc2),
        (*backward, *norm.backward, product),
        norm.saved + wide,
        (*norm.forward, product, fc2),
    )


def attention(length: int, width: int, heads: int, element: int = 2) -> Cost:
    """Flash attention on packed q, k, v; backward rebuilds the weights from the saved logsumexp (4 bytes a head)."""
    row, sums, product = width * length * element, 4 * heads * length, 4 * length * length * width
    forward, backward = Kernel(4 * row + sums, product), Kernel(9 * row + 2 * sums, 2.5 * product)
    return Cost((forward,), (backward,), 4 * row + sums)


def block(length: int, width: int, hidden: int, heads: int, element: int = 2, stream: int = STREAM) -> Cost:
    """A transformer block: layer_norm_linear, attention, projection, layer_norm_mlp."""
    return chain(
        layer_norm_linear(length, width, 3 * width, element, stream),
        attention(length, width, heads, element),
        linear(length, width, width, element)._replace(saved=0),  # its input is the attention's output, already saved
        layer_norm_mlp(length, width, hidden, element, stream),
    )
