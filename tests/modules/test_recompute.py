"""``recompute=True``: the same numbers, without k, q and v kept for backward."""

import copy
from contextlib import ExitStack

import pytest
import torch

import t2t_fast
from t2t_fast import backends, memory, models, reference, testing
from t2t_fast.functional import performer_layer
from t2t_fast.modules import T2TModule, TokenPerformer
from t2t_fast.ops.performer_attention.triton.launch import TABLE as ATTENTION
from t2t_fast.ops.soft_split_linear.triton.launch import TABLE as SPLIT
from t2t_fast.ops.token_mlp.triton.launch import TABLE as TOKEN_MLP
from t2t_fast.testing import CASES, Case

TINY = dict(img_size=32, num_classes=4, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2.0, token_dim=16)
BY_NAME = {case.name: case for case in CASES["performer_layer"]()}
DROPOUT = BY_NAME["dropout"]
TOKENS, WIDTH = 2 * 7 * 9, 64
KQV_BYTES, STATISTICS_BYTES = TOKENS * 3 * WIDTH * 4, TOKENS * 2 * 4


@pytest.fixture(params=["aten", "native", "triton", "reference"])
def by(request, monkeypatch):
    """Each backend that runs here. Triton's kernels use large tiles."""
    reason = backends.reason("performer_layer", request.param, backends.Request("cpu", torch.float32, {}))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "triton":
        _round_products_once(monkeypatch)
    with ExitStack() as stack:
        for table in (ATTENTION, SPLIT, TOKEN_MLP):
            for name in table.passes:
                stack.enter_context(table.override(name, {"tokens": 256}))
        yield request.param


def _round_products_once(monkeypatch):
    """Make the interpreter multiply in float64 and round once. NumPy's float32 products depend on a row's position in
    the matrix, so on some CPUs two kernels that compute the same would differ."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *rest):
        product = a.data.astype("float64") @ b.data.astype("float64")
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def low(case, wants=None):
    """The same call with ``recompute=True`` and gradients for ``wants`` only."""
    wants = case.wants_gradient if wants is None else wants
    return Case(case.op, case.name, case.tensors, {**case.options, "recompute": True}, wants)


def assert_equal(found, expected):
    (out, gradients), (other, others) = found, expected
    assert torch.equal(out, other)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_are_bitwise_those_without_recompute(self, by, dtype):
        """Bit for bit, including the dropout masks."""
        case = DROPOUT.cast(dtype)
        assert_equal(low(case).run_backward(by), case.run_backward(by))

    @pytest.mark.parametrize("name", [name for name in BY_NAME if name != "dropout"])
    def test_in_other_shapes(self, name):
        case = BY_NAME[name]
        assert_equal(low(case).run_backward("aten"), case.run_backward("aten"))

    @pytest.mark.parametrize(
        "wants",
        [("x",), ("w",), ("kqv_bias",), ("fc2_weight",), ("norm1_weight", "proj_bias")],
        ids=", ".join,
    )
    def test_with_some_of_the_gradients(self, by, wants):
        _, expected = DROPOUT.run_backward(by)
        _, gradients = low(DROPOUT, wants).run_backward(by)
        assert set(gradients) == set(wants)
        for name, gradient in gradients.items():
            testing.assert_close(gradient, expected[name], "performer_layer", "backward", torch.float32, name)

    def test_without_optional_tensors(self):
        optional = ("kqv_bias", "norm1_weight", "norm1_bias", "proj_bias", "norm2_weight", "norm2_bias")
        kept = {name: t for name, t in DROPOUT.tensors.items() if name not in optional}
        missing = dict.fromkeys(("kqv_bias", "proj_bias", "norm2_weight", "norm2_bias"))
        wants = tuple(name for name in DROPOUT.wants_gradient if name in kept)
        case = Case("performer_layer", "bare", kept, {**DROPOUT.options, **missing}, wants)
        assert_equal(low(case).run_backward("aten"), case.run_backward("aten"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, by, dtype):
        with torch.autocast("cpu", dtype):
            found, expected = low(DROPOUT).run_backward(by), DROPOUT.run_backward(by)
        assert found[0].dtype == dtype and all(g.dtype == torch.float32 for g in found[1].values())
        assert_equal(found, expected)

    def test_gradcheck(self):
        """Finite differences in float64, masks fixed by the seed."""
        width, columns, m = 4, 18, 3
        shapes = dict(
            x=(2, 2, 5, 6), kqv_weight=(3 * width, columns), kqv_bias=(3 * width,), w=(m, width),
            proj_weight=(width, width), proj_bias=(width,), norm2_weight=(width,), norm2_bias=(width,),
            fc1_weight=(width, width), fc1_bias=(width,), fc2_weight=(width, width), fc2_bias=(width,),
            norm1_weight=(columns,), norm1_bias=(columns,),
        )  # fmt: skip
        options = dict(kernel_size=3, stride=2, padding=1, eps=1e-2, proj_drop=0.25, mlp_drop=0.5)
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]

        def call(*values):
            named = dict(zip(shapes, values, strict=True))
            return performer_layer(**named, **options, seed=torch.tensor(7), recompute=True, backend="aten")

        assert torch.autograd.gradcheck(call, tensors)

    def test_backward_may_run_twice(self, by):
        x = DROPOUT.tensors["x"].clone().requires_grad_()
        out = performer_layer(**{**DROPOUT.tensors, "x": x}, **DROPOUT.options, recompute=True, backend=by)
        first, again = (torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)

    def test_a_second_derivative_is_refused(self):
        x = DROPOUT.tensors["x"].clone().requires_grad_()
        out = performer_layer(**{**DROPOUT.tensors, "x": x}, **DROPOUT.options, recompute=True, backend="aten")
        upstream = torch.ones_like(out, requires_grad=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out, x, upstream, create_graph=True)


def saved(case, backend, **changes):
    """Bytes kept for backward besides the call's own tensors."""
    tensors = {
        name: t.clone().requires_grad_(name in case.wants_gradient) if t.is_floating_point() else t
        for name, t in case.tensors.items()
    }
    call = case.call
    return memory.saved_bytes(
        lambda: call(**tensors, **{**case.options, **changes}, backend=backend), list(tensors.values())
    )


class TestMemory:
    @pytest.mark.parametrize(
        "wants", [DROPOUT.wants_gradient, DROPOUT.wants_gradient[1:]], ids=["with image", "without image"]
    )
    def test_kqv_and_the_statistics_are_not_kept(self, by, wants):
        case = Case(DROPOUT.op, DROPOUT.name, DROPOUT.tensors, DROPOUT.options, wants)
        fast, less = saved(case, by), saved(case, by, recompute=True)
        state = 2 * 32 * (WIDTH + 1) * 4
        if by == "reference":
            assert less == fast > KQV_BYTES
        else:
            assert less == state
            statistics = STATISTICS_BYTES // 2 if by == "aten" else STATISTICS_BYTES  # aten saves no means
            assert fast == state + (0 if by == "native" else KQV_BYTES + statistics)

    def test_inference_keeps_nothing(self, by):
        with torch.no_grad():
            assert saved(DROPOUT, by, recompute=True) == 0


@pytest.mark.slow
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("by", ["aten", "triton"], indirect=True)
    def test_one_graph_without_kqv(self, by):
        """The compiler must not save forward's kqv in place of computing it again in backward."""
        call = torch.compile(performer_layer, backend="aot_eager_decomp_partition", fullgraph=True)
        tensors = {**DROPOUT.tensors, "x": testing.natural_images(4, 16, 13, 18)}
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
        known = {**leaves, "seed": tensors["seed"]}
        out = performer_layer(**known, **DROPOUT.options, backend=by)
        expected = torch.autograd.grad(out.sum(), list(leaves.values()))
        kept = {False: set(), True: set()}
        for recompute, sizes in kept.items():
            with torch.autograd.graph.saved_tensors_hooks(lambda t, add=sizes.add: add(t.numel()) or t, lambda t: t):
                out = call(**known, **DROPOUT.options, recompute=recompute, backend=by)
            for name, found, wanted in zip(
                leaves, torch.autograd.grad(out.sum(), list(leaves.values())), expected, strict=True
            ):
                assert testing.errors(found, wanted)[0] < 1e-4, name
        kqv = 4 * 7 * 9 * 3 * WIDTH
        assert max(kept[False]) == kqv > max(kept[True])

    def test_opcheck(self, by):
        """torch.library's checks, including tracing with symbolic sizes."""
        tensors = {
            name: t.detach().requires_grad_(name in DROPOUT.wants_gradient) if t.is_floating_point() else t
            for name, t in DROPOUT.tensors.items()
        }
        arguments = performer_layer.arguments(**tensors, **DROPOUT.options, recompute=True, backend=by)
        assert arguments[-2:] == (True, by)
        torch.library.opcheck(torch.ops.t2t_fast.performer_layer.default, arguments, rtol=1e-4, atol=1e-5)

    def test_a_swapped_model(self):
        model = reference.T2T_ViT(**TINY).eval()
        t2t_fast.swap(model)
        model.tokens_to_token.recompute = True
        x = torch.randn(2, 3, 32, 32)
        with t2t_fast.backend("aten"):
            expected = model(x)
            out = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)(x)
        assert testing.errors(out, expected)[0] < 1e-5


def step(model, x):
    """Output and gradients of a step whose masks are drawn with seed 3."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = model(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class TestModules:
    def test_layer(self, by):
        layer = TokenPerformer(27, 16)
        x = torch.randn(2, 9, 27)
        with t2t_fast.backend(by):
            expected = step(layer, x)
            layer.recompute = True
            assert_equal(step(layer, x), expected)

    def test_module_keeps_less(self):
        module = T2TModule(64, embed_dim=24, token_dim=16, recompute=True)
        assert module.recompute and module.attention1.recompute and module.attention2.recompute
        x = torch.randn(2, 3, 64, 64)
        with t2t_fast.backend("aten"):
            found = step(module, x)
            less = memory.saved_bytes(lambda: module(x), module.parameters())
            module.recompute = False
            assert_equal(found, step(module, x))
            fast = memory.saved_bytes(lambda: module(x), module.parameters())
        tokens = 2 * (16 * 16 + 8 * 8)
        assert fast - less == tokens * (3 * 16 + 1) * 4

    def test_a_swapped_model_and_back(self):
        model = reference.T2T_ViT(**TINY)
        before = copy.deepcopy(model.state_dict())
        t2t_fast.swap(model)
        module = model.tokens_to_token
        assert module.recompute is False
        x = torch.randn(2, 3, 32, 32)
        with t2t_fast.backend("aten"):
            fast = memory.saved_bytes(lambda: module(x), module.parameters())
            expected = step(model, x)
            module.recompute = True
            assert module.attention1.recompute and module.attention2.recompute
            assert memory.saved_bytes(lambda: module(x), module.parameters()) < fast
            assert_equal(step(model, x), expected)
        assert list(model.state_dict()) == list(before)
        t2t_fast.unswap(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model(x).shape == (2, 4)

    def test_a_module_with_one_fast_layer(self):
        model = reference.T2T_ViT(**TINY)
        t2t_fast.swap(model, include="tokens_to_token.attention2")
        assert not isinstance(model.tokens_to_token, T2TModule)
        model.tokens_to_token.attention2.recompute = True
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)

    def test_copies_and_checkpoints(self):
        model = models.T2TViT(**TINY)
        model.tokens_to_token.recompute = True
        assert copy.deepcopy(model).tokens_to_token.recompute
        models.T2TViT(**TINY).load_state_dict(model.state_dict())

    @pytest.mark.parametrize("tokens_type", ["transformer", "convolution"])
    def test_other_token_types_have_one_mode(self, tokens_type):
        assert T2TModule(32, tokens_type, embed_dim=24, token_dim=16).recompute is False
        with pytest.raises(ValueError, match="T2TModule: recompute must be False without a Performer layer"):
            T2TModule(32, tokens_type, embed_dim=24, token_dim=16, recompute=True)

    def test_unknown_modes_are_refused(self):
        text = "recompute must be True or False, got 1"
        with pytest.raises(TypeError, match=f"performer_layer: {text}"):
            performer_layer(**DROPOUT.tensors, **DROPOUT.options, recompute=1)
        module = T2TModule(32, embed_dim=24, token_dim=16, recompute=True)
        with pytest.raises(TypeError, match=f"T2TModule: {text}"):
            module.recompute = 1
        assert module.recompute and module.attention2.recompute
        module.attention1.recompute = 1
        with pytest.raises(TypeError, match=f"performer_layer: {text}"):
            module(torch.randn(1, 3, 32, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    """A training step of a T2T module: bitwise the same numbers with less memory."""
    module, x = T2TModule(224).cuda(), testing.natural_images(8, 3, 224, 224).cuda()
    kept, found = {}, {}
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        for recompute in (False, True):
            module.recompute = recompute
            found[recompute] = step(module, x)
            kept[recompute] = memory.saved_bytes(lambda: module(x), module.parameters())
    assert_equal(found[True], found[False])
    assert kept[False] - kept[True] >= 8 * (56 * 56 + 28 * 28) * 3 * 64 * x.new_empty(0, dtype=dtype).element_size()
