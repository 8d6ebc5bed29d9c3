"""PyTorch's program transformations handle the fused operators or run an implementation of plain operations."""

import io
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import t2t_fast
from t2t_fast import backends, functional, reference
from t2t_fast.errors import BackendUnavailable
from t2t_fast.ops._common import transforms
from t2t_fast.testing import CASES, errors

TINY = dict(img_size=32, num_classes=4, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2.0, token_dim=16)
KINDS = ("performer", "transformer")


def upstream(kind):
    torch.manual_seed(0)
    return reference.T2T_ViT(tokens_type=kind, **TINY).eval()


def swapped(kind):
    model = upstream(kind)
    t2t_fast.swap(model)
    return model


def own(kind):
    torch.manual_seed(0)
    return t2t_fast.T2TViT(tokens_type=kind, **TINY).eval()


MAKERS = pytest.mark.parametrize("make", [swapped, own])
TOKENS = pytest.mark.parametrize("kind", KINDS)


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found, expected, bound=1e-5):
    assert errors(found, expected)[0] < bound


@pytest.mark.parametrize("op", CASES)
def test_tangents_of_every_operator(op):
    """Forward mode against reverse mode: <G, J d> = <J^T G, d>."""
    case = CASES[op]()[0]
    names = [name for name, t in case.tensors.items() if t is not None and t.is_floating_point()]
    given = tuple(case.tensors[name].double() for name in names)

    def call(*tensors):
        return case.call(**{**case.tensors, **dict(zip(names, tensors, strict=True))}, **case.options)

    directions = tuple(torch.randn_like(t) for t in given)
    out, tangent = jvp(call, given, directions)
    weights = torch.randn_like(out)
    gradients = vjp(call, *given)[1](weights)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close((weights * tangent).sum(), expected, rtol=1e-9, atol=1e-9)
    assert tangent.norm() > 0


@TOKENS
@MAKERS
def test_tangents_of_a_model(make, kind):
    x, direction = images(1), images(1).flip(-1)
    expected = jvp(upstream(kind), (x,), (direction,))[1]
    close(jvp(make(kind), (x,), (direction,))[1], expected)
    with forward_ad.dual_level():
        out = make(kind)(forward_ad.make_dual(x, direction))
        close(forward_ad.unpack_dual(out).tangent, expected)


def test_jacobians_by_both_modes_agree():
    model = swapped("performer").tokens_to_token.attention1.double()
    x = torch.randn(1, 3, 147, dtype=torch.float64)
    close(jacfwd(model)(x), jacrev(model)(x), 1e-10)


@TOKENS
@MAKERS
def test_gradients_per_sample(make, kind):
    model, twin, x = make(kind), upstream(kind), images(3)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters, image):
        return functional_call(model, {**parameters, **frozen}, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for index in range(len(x)):
        twin.zero_grad()
        twin(x[index : index + 1]).square().sum().backward()
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-3, atol=1e-5)


@MAKERS
def test_vmap_without_gradients_and_in_training(make):
    x, model = torch.randn(3, 2, 3, 32, 32), make("performer")
    with torch.no_grad():
        close(vmap(model)(x), model(x.flatten(0, 1)).unflatten(0, (3, 2)))
    model.train()
    same = images(2).expand(3, -1, -1, -1, -1)
    first, second, _ = vmap(model, randomness="different")(same)
    assert not torch.equal(first, second), "each sample has masks of its own"
    first, second, _ = vmap(model, randomness="same")(same)
    torch.testing.assert_close(first, second)


def test_an_explicit_kernel_refuses_what_it_cannot_do():
    x = torch.randn(1, 1, 4, 4)
    for name in ("native", "aten"):
        if backends.reason("soft_split", name, backends.Request("cpu", torch.float32, {})) is not None:
            continue
        with pytest.raises(BackendUnavailable, match=f"  {name}: .*do(es)? not support torch.func"):
            grad(lambda z, name=name: functional.soft_split(z, 2, backend=name).sum())(x)
        with forward_ad.dual_level(), pytest.raises(BackendUnavailable, match="forward-mode derivatives"):
            functional.soft_split(forward_ad.make_dual(x, x), 2, backend=name)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend 'native' does not support forward-mode"):
        torch.ops.t2t_fast.soft_split(forward_ad.make_dual(x, x), [2, 2], [1, 1], [0, 0], "native")
    assert transforms.active() is None


@pytest.mark.slow
@TOKENS
def test_transforms_inside_and_around_compiled_code(kind):
    """Without forward mode, under which PyTorch cannot compile LayerNorm."""
    torch._dynamo.reset()
    model, x = swapped(kind), images(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x))
    expected = grad(lambda y: upstream(kind)(y).sum())(x)
    close(torch.compile(lambda z: grad(lambda y: model(y).sum())(z), backend="eager", fullgraph=True)(x), expected)
    close(grad(lambda y: compiled(y).sum())(x), expected)


@pytest.mark.parametrize("backend", ["native", "aten", "triton"])
@pytest.mark.parametrize("op", CASES)
def test_flops_are_counted(op, backend):
    """Forward has as many as the reference; backward has more, for recomputation."""
    case = CASES[op]()[0]
    if (reason := backends.reason(op, backend, backends.Request("cpu", torch.float32, {}))) is not None:
        pytest.skip(f"{backend}: {reason}")
    if (op, backend) == ("transformer_block", "aten"):
        pytest.skip("PyTorch's counter has no formula for its own attention on a CPU")
    counted = {}
    for name in ("reference", backend):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # shapes are enough to count
            tensors = {
                key: fake.from_tensor(t.float()).requires_grad_() if t is not None and t.is_floating_point() else t
                for key, t in case.tensors.items()
            }
            with FlopCounterMode(display=False) as forward:
                out = case.call(**tensors, **case.options, backend=name)
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
        counted[name] = forward.get_total_flops(), backward.get_total_flops()
    (forward, backward), (expected, expected_backward) = counted[backend], counted["reference"]
    if op in (
        "soft_split",
        "soft_composition",
        "fused_fold_unfold",
        "add_layer_norm",
    ):  # additions, which are not counted in the reference
        assert expected == 0
    else:
        # aten's convolution has two more channels than the image, which has at least 3
        most = 5 / 3 if backend == "aten" and op in ("soft_split_linear", "performer_layer") else 1
        assert 0.99 < forward / expected < 1.01 * most
        assert 0.99 < backward / expected_backward < 2 * most


def test_flops_of_a_block_with_frozen_weights():
    """Backward counts the products for the weights that need a gradient."""
    case, counted = CASES["transformer_block"]()[0], []
    if (reason := backends.reason(case.op, "native", backends.Request("cpu", torch.float32, {}))) is not None:
        pytest.skip(f"native: {reason}")
    everything = [name for name in case.wants_gradient if "norm" not in name]
    for wants in (everything, ("x", "proj_weight"), ("x", "fc2_bias")):
        tensors = {name: t.detach().requires_grad_(name in wants) for name, t in case.tensors.items() if name != "seed"}
        out = case.call(**tensors, **case.options, backend="native")
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counted.append(counter.get_total_flops())
    batch, length, width = case.tensors["x"].shape
    product = 2 * batch * length * width * width
    assert counted[0] - counted[1] == 7 * product and counted[0] - counted[2] == 6 * product


@TOKENS
def test_flops_of_a_model(kind):
    """The counter's hooks make the layers run unfused, child by child, so the count is upstream's."""
    totals = []
    for model in (upstream(kind), swapped(kind)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.tokens_to_token(images())
        totals.append(counter.get_total_flops())
    assert 0.9 < totals[1] / totals[0] < 1.1


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (swapped, "performer"),
        (own, "transformer"),
        pytest.param(swapped, "transformer", marks=pytest.mark.slow),
        pytest.param(own, "performer", marks=pytest.mark.slow),
    ],
)
def test_a_jit_trace_runs_without_the_package_for_other_sizes(make, kind, tmp_path):
    model = make(kind)
    with torch.no_grad():
        torch.jit.trace(model, images(), check_trace=False).save(str(tmp_path / "model.pt"))
        torch.jit.trace(model.tokens_to_token, images(), check_trace=False).save(str(tmp_path / "module.pt"))
    x = torch.randn(3, 3, 48, 80)
    torch.save((images(5), x), tmp_path / "inputs.pt")
    code = (
        "import torch, sys; a, b = torch.load('inputs.pt'); "
        "torch.save((torch.jit.load('model.pt')(a), torch.jit.load('module.pt')(b)), 'outputs.pt'); "
        "assert 't2t_fast' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    whole, tokens = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        close(whole, model(images(5)))
        close(tokens, model.tokens_to_token(x))


@MAKERS
def test_a_jit_trace_has_gradients_and_autocast(make):
    model, x = make("performer"), images()
    weight = model.tokens_to_token.attention1.kqv.weight
    model(x).sum().backward()
    expected, weight.grad = weight.grad, None
    traced = torch.jit.trace(model, x, check_trace=False)
    traced(x).sum().backward()
    close(weight.grad, expected, 1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        traced, expected = torch.jit.trace(model, x, check_trace=False), model(x)
    assert traced(x).dtype == expected.dtype == torch.bfloat16
    close(traced(x).float(), expected.float(), 3e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@TOKENS
@MAKERS
def test_onnx_by_the_older_exporter(make, kind):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    model, file = make(kind), io.BytesIO()
    options = dict(dynamo=False, opset_version=17, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    torch.onnx.export(model, (images(),), file, **options)
    kinds = {node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node}
    session = runtime.InferenceSession(file.getvalue())
    with torch.no_grad():
        close(torch.from_numpy(session.run(None, {"x": images(3).numpy()})[0]), model(images(3)))
    assert "Einsum" not in kinds


@pytest.mark.slow
@TOKENS
@MAKERS
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_free_batch_height_and_width(make, kind, strict):
    from torch.export import Dim, export

    module = make(kind)
    module = module if make is own else module.tokens_to_token  # upstream's model accepts a single size
    sizes = {0: Dim("batch", max=64), 2: Dim("height", min=20, max=256), 3: Dim("width", min=20, max=256)}
    program = export(module, (images(),), dynamic_shapes=(sizes,), strict=strict).module()
    for shape in [(2, 32, 32), (3, 48, 32), (5, 21, 77)]:
        x = torch.randn(shape[0], 3, *shape[1:])
        close(program(x), module(x))


@TOKENS
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(kind, mode):
    module = swapped(kind).tokens_to_token.requires_grad_(False)
    parameters = dict(module.named_parameters())
    graph = make_fx(lambda p, x: functional_call(module, p, (x,)), tracing_mode=mode)(parameters, images())
    x = images() if mode == "real" else torch.randn(3, 3, 48, 80)
    close(graph(parameters, x), module(x))


@MAKERS
def test_dynamic_quantisation(make):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no engine for quantised layers")
    for kind in KINDS:
        model = torch.ao.quantization.quantize_dynamic(make(kind), {nn.Linear})
        assert model.tokens_to_token.attention1.obstacle() is not None
        close(model(images()), upstream(kind)(images()), 0.3)


class Scaled(torch.Tensor):
    """A weight stored as numbers and a scale, like torchao's quantised tensors."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        if not str(func).startswith("aten."):
            raise NotImplementedError(f"{func} takes no Scaled")
        plain = [a.numbers * a.scale if isinstance(a, Scaled) else a for a in args]
        return func(*plain, **(kwargs or {}))


@TOKENS
@MAKERS
def test_weights_of_a_tensor_subclass(make, kind):
    """The layers run unfused, child by child, since the fused operators do not accept such weights."""
    model = make(kind)
    for path, linear in model.tokens_to_token.named_modules():
        if isinstance(linear, nn.Linear):
            scale = linear.weight.detach().abs().max() / 127
            numbers = (linear.weight.detach() / scale).round()
            linear.weight = nn.Parameter(Scaled(numbers, scale), requires_grad=False)
            assert type(linear.weight.data) is Scaled, path
    assert "weight is a Scaled" in model.tokens_to_token.attention1.obstacle()
    with torch.no_grad():
        close(model(images()), upstream(kind)(images()), 0.1)


def test_blocks_of_backend_in_threads_and_tasks():
    """Each thread and each asyncio task has its own selection."""
    import asyncio

    def chosen():
        return t2t_fast.explain("soft_split", device="cpu").chosen("soft_split")

    default, seen = chosen(), []
    with t2t_fast.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "reference" and seen == [default]

    async def task(name, ready, go):
        with t2t_fast.backend(name):
            ready.set()
            await go.wait()
            return chosen()

    async def both():
        first, second, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        tasks = [asyncio.ensure_future(task(n, e, go)) for n, e in (("reference", first), ("aten", second))]
        await first.wait()
        await second.wait()
        go.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == ["reference", "aten"] and chosen() == default


def test_blocks_of_backend_that_overlap():
    def chosen(op="soft_split"):
        return t2t_fast.explain(op, device="cpu").chosen(op)

    default = chosen()
    first, second, third = (t2t_fast.backend(*each) for each in (("reference",), ("aten",), ("reference", "token_mlp")))
    first.__enter__()
    second.__enter__()
    third.__enter__()
    assert chosen() == "aten" and chosen("token_mlp") == "reference"
    first.__exit__(None, None, None)
    assert chosen() == "aten"
    second.__exit__(None, None, None)
    assert chosen() == default and chosen("token_mlp") == "reference"
    third.__exit__(None, None, None)
    assert chosen("token_mlp") == default and backends._open.get() == ()
