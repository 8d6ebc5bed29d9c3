"""Strides: those of fake tensors, on which the compiler relies, and those of image gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import t2t_fast
from support.calls import skip_unless_available
from t2t_fast.functional import (
    fused_fold_unfold,
    performer_attention,
    performer_layer,
    soft_composition,
    soft_split,
    soft_split_linear,
    token_mlp,
)
from t2t_fast.ops._common.windows import in_layout
from t2t_fast.ops.performer_layer.triton.launch import TABLE as LAYER
from t2t_fast.testing import CASES, errors, features, token_mlp_parameters

OPAQUE = {"native": "t2t_fast_native", "triton": "t2t_fast_triton"}
NO_TENSORS = {"cpu_instruction_set", "packed_linear_size", "scratch_bytes"}


class Compared(TorchDispatchMode):
    """Repeats every call of a namespace's operators with fake tensors and compares the metadata of the outputs."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace, self.seen = namespace, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        if function.namespace == self.namespace and name not in NO_TENSORS:
            mode = FakeTensorMode()
            fake = function(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
            for real, promised in zip(tree_leaves(found), tree_leaves(fake), strict=True):
                assert _looks(real) == _looks(promised), function
            self.seen.add(name)
        return found


def _looks(tensor):
    return tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), tensor.storage_offset()


def image(batch, channels, height, width, order="contiguous"):
    """An image of noise in one of four memory layouts."""
    x = torch.randn(batch, channels, height, width + 2)
    if order == "sliced":
        return x[..., 1:-1]
    x = x[..., 2:].contiguous()
    if order == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if order == "tokens":  # with batch 1 a size-1 dimension has an odd stride
        return x.flatten(2).mT.contiguous().mT.view(x.shape)
    return x


ORDERS = ["contiguous", "channels last", "sliced", "tokens"]
IMAGES = {
    "odd channels": (2, 3, 9, 8),
    "batch 1": (1, 5, 7, 6),
    "one channel": (2, 1, 6, 7),
    "one row": (2, 16, 1, 9),
    "one column": (1, 16, 9, 1),
    "17 channels": (1, 17, 6, 6),
}


def layer_tensors(channels, width, kernel):
    generator = torch.Generator().manual_seed(0)
    return {
        "kqv_weight": torch.randn(3 * width, channels * kernel**2, generator=generator) / 9,
        "kqv_bias": torch.randn(3 * width, generator=generator),
        "norm1_weight": 1 + torch.randn(channels * kernel**2, generator=generator) / 9,
        "norm1_bias": torch.randn(channels * kernel**2, generator=generator),
        "w": features(generator, 6, width),
        **token_mlp_parameters(generator, width, norm="norm2"),
    }


def backward(call, tensors, frozen=()):
    leaves = {n: t.detach().requires_grad_(n not in frozen) if t.is_floating_point() else t for n, t in tensors.items()}
    out = call(**leaves)
    out.backward(torch.randn_like(out))
    return {n: t.grad for n, t in leaves.items()}


def images(few):
    """(shape, layouts): all layouts for every shape, or with ``few`` one for each."""
    for number, shape in enumerate(IMAGES.values()):
        yield shape, ORDERS if not few else [ORDERS[number % len(ORDERS)]]


def every_call(backend, dtype):
    """Call every opaque operator of a backend, forward and backward, with its combinations of gradients."""
    for shape, orders in images(few=backend == "triton"):
        window = dict(kernel_size=3, stride=2, padding=1, backend=backend)
        for order in orders:
            x = image(*shape, order).to(dtype)
            if backend == "native":
                backward(lambda x, window=window: soft_split(x, **window), {"x": x})
            columns = 9 * shape[1]
            linear = {"x": x, "weight": torch.randn(10, columns).to(dtype), "bias": torch.randn(10).to(dtype)}
            norm = {"norm_weight": torch.ones(columns).to(dtype), "norm_bias": torch.ones(columns).to(dtype)}
            for eps, more in ((None, {}), (1e-5, norm)):
                for frozen in ((), ("x",)):
                    backward(
                        lambda eps=eps, window=window, **t: soft_split_linear(**t, **window, norm_eps=eps),
                        {**linear, **more},
                        frozen,
                    )
        if backend == "native":
            tokens = soft_split(image(*shape), 3, 2, 1).to(dtype)
            backward(
                lambda tokens, s=shape: soft_composition(tokens, s[2:], 3, 2, 1, backend=backend), {"tokens": tokens}
            )
            backward(
                lambda tokens, s=shape: fused_fold_unfold(tokens, s[2:], 3, 2, 1, backend=backend), {"tokens": tokens}
            )
    for batch, width, heads in ((1, 5, None), (2, 16, 2)):
        packed = torch.randn(batch, 7, 3, width * (heads or 1)).to(dtype)
        q, k, v = (t if heads is None else t.unflatten(-1, (heads, width)).transpose(1, 2) for t in packed.unbind(2))
        tensors = {"q": q, "k": k, "v": v, "w": features(torch.Generator().manual_seed(0), 6, width).to(dtype)}
        for frozen in ((), ("w",)):
            backward(lambda **t: performer_attention(**t, backend=backend), tensors, frozen)
        mlp = {name: t.to(dtype) for name, t in token_mlp_parameters(torch.Generator().manual_seed(0), width).items()}
        y, v = packed[:, :, 0, :width], packed[:, :, 2, :width]
        for drop in (0.0, 0.3):
            drops = dict(proj_drop=drop, mlp_drop=drop, seed=torch.tensor(1))
            backward(lambda drops=drops, **t: token_mlp(**t, **drops, backend=backend), {"y": y, "v": v, **mlp})
        backward(lambda **t: token_mlp(**t, backend=backend), {"y": y, "v": v, **mlp}, tuple(mlp))
    for shape, width, kernel in (
        ((1, 3, 9, 8), 16, 7),
        ((2, 16, 6, 5), 16, 3),
        ((1, 147, 1, 5), 16, 1),
        ((1, 5, 4, 4), 6, 1),
    ):
        tensors = {"x": image(*shape, "tokens"), **layer_tensors(shape[1], width, kernel)}
        tensors = {name: t if name == "w" else t.to(dtype) for name, t in tensors.items()}
        for fused in (0, 1):
            with LAYER.override("split_keys", {"fused": fused}), LAYER.override("read_out_mlp", {"fused": fused}):
                for recompute in (False, True):
                    options = dict(
                        kernel_size=kernel, stride=1, padding=kernel // 2, recompute=recompute, backend=backend
                    )
                    backward(lambda options=options, **t: performer_layer(**t, **options), tensors, ("w",))
                with torch.no_grad():
                    performer_layer(**tensors, **options)
            if backend == "native":
                break


def every_call_of_a_native_block(dtype):
    """Forward and backward, with products of float32 and of bfloat16, and gradients of some parameters only."""
    for case in CASES["transformer_block"]():
        tensors = {name: t.to(dtype) for name, t in case.tensors.items() if name in case.wants_gradient}
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                for frozen in ((), tuple(name for name in tensors if name[0] not in "xf")):
                    backward(lambda case=case, **t: case.call(**t, **case.options, backend="native"), tensors, frozen)
                case.call(**tensors, **case.options, backend="native")


def every_call_of_a_block(dtype):
    """Call the operators of a transformer block by their Triton backend, with and without dropout."""
    drops = dict.fromkeys(("branch_drop", "branch_path", "hidden_drop", "drop", "drop_path"), 0.3)
    for case in (*CASES["add_layer_norm"]()[1:3], *CASES["layer_norm_linear"]()[1:2], CASES["layer_norm_mlp"]()[1]):
        tensors = {name: t.to(dtype) for name, t in case.tensors.items() if name in case.wants_gradient}
        several = [case.options] if case.op != "layer_norm_mlp" else [{}, drops, {"recompute": True}]
        for options in several:
            backward(lambda case=case, options=options, **t: case.call(**t, **options, backend="triton"), tensors)


@pytest.mark.parametrize("backend", list(OPAQUE))
def test_fake_tensors_look_like_real_ones(backend):
    """Shape, dtype, strides and offset of all outputs of opaque operators, on which torch.compile relies."""
    skip_unless_available("performer_layer", backend)
    namespace = OPAQUE[backend]
    with Compared(namespace) as mode:
        every_call(backend, torch.float32)
        if backend == "triton":
            every_call_of_a_block(torch.float32)
        else:
            every_call_of_a_native_block(torch.float32)
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.partition("::")[2].partition(".")[0] for name in names if name.startswith(f"{namespace}::")}
    assert mode.seen == defined - NO_TENSORS


@pytest.mark.parametrize("backend", ["reference", "aten", "native", "triton"])
@pytest.mark.parametrize("op", ["soft_split", "soft_split_linear", "soft_split_linear, LayerNorm", "performer_layer"])
def test_gradients_of_images(op, backend):
    """They have the image's memory format, with exactly the strides of torch.empty."""
    name = op.partition(",")[0]
    skip_unless_available(name, backend)
    few = name == "performer_layer"
    for shape, orders in images(few):
        for order in orders:
            x = image(*shape, order)
            for kernel, stride, padding in ((3, 2, 1),) if few else ((3, 2, 1), (1, 1, 0), (4, 3, 2)):
                taps, window = kernel**2, dict(kernel_size=kernel, stride=stride, padding=padding, backend=backend)
                if name == "soft_split":
                    call, tensors = soft_split, {}
                elif few:
                    call, tensors = performer_layer, layer_tensors(shape[1], 16, kernel)
                else:
                    call, tensors = soft_split_linear, {"weight": torch.randn(6, shape[1] * taps)}
                    if "LayerNorm" in op:
                        window["norm_eps"] = 1e-5
                seen = []
                leaf = x.detach().requires_grad_()
                view = leaf.view_as(leaf)  # autograd would change a leaf's gradient to the leaf's strides
                view.register_hook(seen.append)
                call(view, **tensors, **window).square().sum().backward()
                channels_last = x.stride(1) == 1
                order_of = torch.channels_last if channels_last else torch.contiguous_format
                assert seen[0].stride() == torch.empty(shape, memory_format=order_of).stride(), (shape, order, kernel)


@pytest.mark.parametrize("backend", ["reference", "aten", "native"])
def test_composition_has_a_standard_memory_format(backend):
    for op in ("soft_composition", "soft_split"):
        skip_unless_available(op, backend)
    for batch, channels, height, width in IMAGES.values():
        for kernel, stride, padding in ((3, 2, 1), (1, 1, 0), (4, 3, 2)):
            tokens = soft_split(image(batch, channels, height, width), kernel, stride, padding)
            found = soft_composition(tokens, (height, width), kernel, stride, padding, backend=backend)
            formats = [
                torch.empty(found.shape, memory_format=f) for f in (torch.contiguous_format, torch.channels_last)
            ]
            assert found.stride() in [each.stride() for each in formats]


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_layout(channels_last):
    """Views with odd strides in dimensions of size 1, and slices."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5), (1, 3, 1, 1), (0, 3, 4, 5)):
        for x in (image(*shape), image(*shape, "channels last"), image(*shape, "sliced"), image(*shape, "tokens")):
            odd = x.as_strided(shape, [7 if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)])
            for each in (x, odd):
                found = in_layout(each, channels_last)
                assert torch.equal(found, each) and found.stride() == torch.empty(shape, memory_format=order).stride()


CONSUMERS = {
    "BatchNorm": lambda c: nn.BatchNorm2d(c).eval(),
    "BatchNorm, training": lambda c: nn.BatchNorm2d(c),
    "GroupNorm": lambda c: nn.GroupNorm(1, c),
    "Conv": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "PReLU": lambda c: nn.PReLU(c),
    "interpolate": lambda c: lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "pool": lambda c: nn.AvgPool2d(2),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("consumer", list(CONSUMERS))
@pytest.mark.parametrize("backend", ["reference", "aten", "native", "triton"])
def test_gradients_behind_a_layer(backend, consumer, batch):
    """The layer before the split reads the image's gradient correctly, for any memory layout of the image.

    PyTorch's BatchNorm in evaluation misreads a contiguous gradient if its input has the odd strides of these tokens.
    """
    skip_unless_available("soft_split_linear", backend)
    torch.manual_seed(0)
    first, weight = CONSUMERS[consumer](16), torch.randn(8, 144)

    def gradient(leaf, backend, plain):
        x = leaf.mT.view(batch, 16, 6, 6)
        x = first(x.contiguous() if plain else x)
        out = soft_split_linear(x, weight.to(x), None, 3, 2, 1, backend=backend)
        (found,) = torch.autograd.grad(out.square().sum(), leaf)
        return found

    leaf = torch.randn(batch, 36, 16, requires_grad=True)
    assert errors(gradient(leaf, backend, False), gradient(leaf, "reference", True))[0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_layer_of_147_channels(training):
    """Inductor checks the strides of every operator's output; the operator pads 147 columns internally."""
    skip_unless_available("performer_layer", "triton")
    torch._dynamo.reset()
    layer = t2t_fast.TokenPerformer(147, 64, dp1=0.0, dp2=0.0).train(training)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 9, 147)
    found = []
    with t2t_fast.backend("triton"):
        for run in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_(training)
            torch.manual_seed(0)
            out = run(leaf)
            if training:
                out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in (leaf, *layer.parameters()) if p.grad is not None)])
    for value, wanted in zip(*found, strict=True):
        assert errors(value, wanted)[0] < 1e-5
    torch._dynamo.reset()
