"""torch.compile without graph breaks: forward and backward of a swapped model, masks, backends, few recompilations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import t2t_fast
from t2t_fast import functional, reference
from t2t_fast.interop.swap import swap
from t2t_fast.ops._common.philox import keep_masks
from t2t_fast.testing import CASES, assert_close, errors

pytestmark = pytest.mark.slow
TINY = dict(img_size=32, num_classes=4, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2.0, token_dim=16)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def by(fused):
    """Run the test with a fused backend as the choice of ``auto``."""
    with t2t_fast.backend("auto" if fused == "native" else fused):
        yield fused


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_swapped_model_forward_and_backward(tokens_type):
    """fullgraph through Inductor; same logits and gradients as eager."""
    model = reference.T2T_ViT(tokens_type=tokens_type, **TINY).eval()
    swap(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    expected.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    out = torch.compile(model, fullgraph=True)(x)
    out.sum().backward()
    assert errors(out, expected)[0] < 1e-5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert errors(parameter.grad, gradients[name])[0] < 1e-4, name


def test_training_mode_with_dropout_compiles(by):
    """aten is compiled without Inductor, which takes a minute; the test above compiles it with Inductor."""
    model = reference.T2T_ViT(**TINY).train()
    swap(model)
    backend = "aot_eager_decomp_partition" if by == "aten" else "inductor"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    first, second = compiled(x), compiled(x)
    first.sum().backward()
    assert not torch.equal(first, second) and first.isfinite().all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_masks_are_the_same_compiled_and_eager():
    seed = torch.tensor(-987654321)
    compiled = torch.compile(lambda s: keep_masks(s, (3, 1000), 0.3, 0.1), fullgraph=True)
    for mask, expected in zip(compiled(seed), keep_masks(seed, (3, 1000), 0.3, 0.1), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("op", ["soft_split", "soft_composition"])
def test_copy_operators(op):
    case = CASES[op]()[1]
    call = torch.compile(lambda **t: case.call(**t, **case.options), fullgraph=True)
    assert_close(call(**case.tensors), case.run(), op, "forward", torch.float32)


def test_backend_context_is_seen_and_guarded():
    """A graph compiled for one backend is not reused for another."""
    graphs = []

    def spy(graph, _inputs):
        graphs.append(graph.code)
        return graph

    call = torch.compile(lambda x: functional.soft_split(x, 3, 2, 1), backend=spy, fullgraph=True)
    x = torch.randn(1, 2, 8, 8)
    expected = functional.soft_split(x, 3, 2, 1)
    assert torch.equal(call(x), expected)
    with t2t_fast.backend("reference"):
        assert torch.equal(call(x), expected)
    assert torch.equal(call(x), expected)
    chosen = t2t_fast.explain("soft_split", device="cpu").chosen("soft_split")
    assert f"'{chosen}'" in graphs[0] and "'reference'" in graphs[1] and len(graphs) == 2


@pytest.mark.usefixtures("by")
def test_few_recompilations():
    """New batch and image sizes: one static graph, then dynamic ones; the last new shape compiles nothing."""
    counter = CompileCounterWithBackend("eager")
    module = t2t_fast.T2TModule(32, embed_dim=24, token_dim=16).eval()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for shape in [(1, 3, 32, 32), (2, 3, 32, 32), (2, 3, 48, 64), (3, 3, 64, 80)]:
            assert compiled(torch.randn(shape)).shape[0] == shape[0]
        before = counter.frame_count
        assert before <= 3
        compiled(torch.randn(5, 3, 80, 96))
        assert counter.frame_count == before
