"""Modules whose calls are replayed, on interpreted Triton kernels: equal to modules that remember nothing."""

import copy
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import t2t_fast
from support.freed import assert_freed
from t2t_fast import backends, models, reference
from t2t_fast.models.blocks import Block
from t2t_fast.ops._common import guards, replay, triton_runtime

REASON = triton_runtime.reason(backends.Request("cpu", torch.float32, {}))
pytestmark = [pytest.mark.interpret, pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")]
KINDS = ("performer", "transformer")


@pytest.fixture(autouse=True)
def on_triton():
    with t2t_fast.backend("triton"):
        yield


@pytest.fixture
def events(monkeypatch):
    """What was "recorded" and "replayed" in order, with the reason where a record failed."""
    seen = []
    record, call = replay.record, replay.Program.__call__

    def counted(function, tensors):
        result, program, why = record(function, tensors)
        seen.append("recorded" if program is not None else why)
        return result, program, why

    def replayed(self, *tensors):
        seen.append("replayed")
        return call(self, *tensors)

    monkeypatch.setattr(replay, "record", counted)
    monkeypatch.setattr(replay.Program, "__call__", replayed)
    return seen


def module(kind="performer"):
    torch.manual_seed(0)
    made = t2t_fast.T2TModule(16, kind, embed_dim=24, token_dim=16).eval()
    for parameter in made.parameters():
        parameter.data.mul_(2)
    return made


def model(kind="performer", own=False, **options):
    """A narrow T2T-ViT: upstream's, swapped, or our own."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "token_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}
    made = (models.T2TViT if own else reference.T2T_ViT)(img_size=16, tokens_type=kind, **{**sizes, **options}).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if not own:
        t2t_fast.swap(made)
    return made


def image(size=16, seed=1, dtype=torch.float32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(fast, x, seed=0):
    """Output and gradients of a training step whose random seeds are drawn from the same state in every call."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    out = fast(x)
    leaves = [x, *(parameter for parameter in fast.parameters() if parameter.requires_grad)]
    return out.detach(), torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True)


def assert_same(found, expected):
    """Bit for bit: a replay makes the same launches and calls."""
    (out, grads), (exact, exact_grads) = found, expected
    assert torch.equal(out, exact)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert (grad is None) == (exact_grad is None)
        assert grad is None or torch.equal(grad, exact_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_in_inference(kind, events):
    """From the third call on the whole module is one program, for any values in the image."""
    t2t = module(kind)
    with torch.no_grad():
        t2t(image())
        assert not events
        t2t(image())
        assert events == ["recorded"]
        events.clear()
        for seed in range(3):
            x = image(seed=seed)
            found = t2t(x)
            assert events.pop() == "replayed" and not events
            with guards.suspended():
                assert torch.equal(found, t2t(x)) and not events


@pytest.mark.parametrize("autocast", [None, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_training(kind, autocast, events):
    """With dropouts and drop-path. The masks are drawn anew in each replay."""
    fast = model(kind, drop_rate=0.1, drop_path_rate=0.3, attn_drop_rate=0.0).train()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        with guards.suspended():
            expected = [step(fast, image(seed=index), index) for index in range(2)]
        assert not events
        step(fast, image()), step(fast, image())
        assert "recorded" in events and "replayed" not in events
        step(fast, image())  # records backward
        events.clear()
        assert_same(step(fast, image(seed=0), 0), expected[0])
        assert_same(step(fast, image(seed=1), 1), expected[1])
        assert set(events) == {"replayed"}
        assert not torch.equal(step(fast, image(seed=0), 1)[0], expected[0][0])


def test_recompute_and_frozen_parameters(events):
    fast = model().train()
    fast.tokens_to_token.recompute = True
    for block in fast.blocks:
        block.recompute = True
    fast.tokens_to_token.attention1.requires_grad_(False)
    fast.blocks[0].norm1.bias.requires_grad_(False)
    fast.blocks[0].mlp.fc2.requires_grad_(False)
    with guards.suspended():
        expected = step(fast, image())
    for _ in range(3):
        step(fast, image())
    events.clear()
    assert_same(step(fast, image()), expected)
    assert set(events) == {"replayed"}


@pytest.mark.parametrize("distilled", [False, True])
def test_the_blocks_of_our_own_models_are_one_program(distilled, events):
    """In inference; stages have other tokens normalised, and other image sizes other positions."""
    if distilled:
        fast = models.ViT(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, distilled=True).eval()
    else:
        fast = model(own=True, depth=2)
    with torch.no_grad():
        for size in (16, 32):
            with guards.suspended():
                expected = fast(image(size)), fast.forward_stages(image(size))[-1]
            for _ in range(3):
                fast(image(size)), fast.forward_stages(image(size))
            events.clear()
            assert torch.equal(torch.stack(list(fast(image(size)))), torch.stack(list(expected[0])))
            programs = events.count("replayed")
            assert programs == (1 if distilled else 2) and len(events) == programs, "T2T module and blocks"
            assert torch.equal(fast.forward_stages(image(size))[-1], expected[1])


MODEL_CHANGES = {
    "block": lambda fast: setattr(fast.blocks, "1", model(own=True, num_heads=3).blocks[0]),
    "fewer blocks": lambda fast: fast.blocks.pop(-1),
    "hook of a block": lambda fast: fast.blocks[0].register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "hook of the norm": lambda fast: fast.norm.register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "hook inside": lambda fast: fast.blocks[1].mlp.fc1.register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "forward of a block": lambda fast: setattr(fast.blocks[0], "forward", torch.abs),
    "class of a block": lambda fast: setattr(fast.blocks[0], "__class__", Doubling),
    "eps": lambda fast: setattr(fast.norm, "eps", 2.0),
    "scale": lambda fast: setattr(fast.blocks[1].attn, "scale", 3.0),
    "dropout": lambda fast: setattr(fast.pos_drop.train(), "p", 1.0),
    "positions": lambda fast: fast.pos_embed.data.mul_(3),
    "class token": lambda fast: setattr(fast, "cls_token", nn.Parameter(fast.cls_token.flip(2) * 9)),
    "weights": lambda fast: fast.blocks[1].mlp.fc2.weight.data.mul_(2),
}


class Doubling(Block):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_change_of_our_own_model(name):
    """The replayed model against a copy, which begins without remembered calls."""
    fast, x = model(own=True, depth=2), image()
    with torch.no_grad():
        before = [fast(x) for _ in range(3)][-1]
        MODEL_CHANGES[name](fast)
        twin = copy.deepcopy(fast)
        found, expected = fast(x), twin(x)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)


CHANGES = {
    "scale": lambda block: setattr(block.attn, "scale", 3.0),
    "heads": lambda block: setattr(block.attn, "num_heads", 4),
    "dropout of the attention": lambda block: setattr(block.attn.attn_drop.train(), "p", 1.0),
    "dropout of the projection": lambda block: setattr(block.attn.proj_drop.train(), "p", 1.0),
    "eps": lambda block: setattr(block.norm2, "eps", 2.0),
    "activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "hook": lambda block: block.mlp.fc1.register_forward_hook(lambda module, inputs, out: 0.5 * out),
    "hook on the attention weights": lambda block: block.attn.attn_drop.register_forward_hook(lambda *_: None),
    "branch": lambda block: setattr(block, "mlp", nn.Identity()),
    "weights": lambda block: block.mlp.fc2.weight.data.mul_(2),
    "no bias": lambda block: block.attn.qkv.register_parameter("bias", None),
    "wider": lambda block: setattr(block, "mlp", reference.Block(24, 2, mlp_ratio=4.0).mlp),
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_block(name, training):
    """The replayed block against a copy, which begins without remembered calls."""
    block = model(qkv_bias=True).blocks[0]
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
    with torch.set_grad_enabled(training):
        before = [block(x).detach() for _ in range(3)]
        assert torch.equal(before[0], before[2])
        torch.manual_seed(5)
        CHANGES[name](block)
        twin = copy.deepcopy(block)
        found, expected = block(x), twin(x)
    assert torch.equal(found, expected)
    if name == "hook on the attention weights":  # they are computed for it
        torch.testing.assert_close(found, before[0])
    else:
        assert not torch.allclose(found, before[0], rtol=1e-3, atol=1e-3)


def test_the_attention_follows_the_kernels_that_are_allowed(events):
    block = model().blocks[0]
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        usual = [block(x) for _ in range(3)][-1]
        for _ in range(2):
            events.clear()
            with sdpa_kernel(SDPBackend.MATH):
                math = [block(x) for _ in range(3)]
            assert torch.equal(math[0], math[2])
            torch.testing.assert_close(math[2], usual)
        assert torch.equal(block(x), usual) and set(events) == {"replayed"}


def test_autograd_around_a_replayed_module(events):
    """Checkpointing, hooks on saved tensors, a second backward pass, a second derivative, anomaly detection."""
    t2t = module()
    x = image().requires_grad_()

    def gradient(out):
        return torch.autograd.grad(out.square().sum(), x)[0]

    expected = [gradient(t2t(x)) for _ in range(3)][-1]
    events.clear()
    for reentrant in (False, True):
        out = checkpoint(t2t, x, use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(x.grad, expected)
        x.grad = None
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(gradient(t2t(x)), expected)
    out = t2t(x)
    loss = out.square().sum()
    loss.backward(retain_graph=True), loss.backward()
    assert torch.equal(x.grad, 2 * expected)
    assert "replayed" in events
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly detection warns that it is on
        with torch.autograd.detect_anomaly():
            assert torch.equal(gradient(t2t(x)), expected)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(torch.autograd.grad(t2t(x).square().sum(), x, create_graph=True)[0].sum(), x)


def test_inference_mode_and_no_grad():
    t2t, x = module(), image()
    results = []
    for _ in range(3):
        with torch.inference_mode():
            results.append(t2t(x))
        with torch.no_grad():
            results.append(t2t(x))
    assert [each.is_inference() for each in results] == 3 * [True, False]
    assert all(torch.equal(each, results[0]) for each in results)


def test_the_profiler_sees_the_operators():
    """They are called through PyTorch's dispatcher, with their names."""
    t2t, x = module(), image()
    with torch.no_grad():
        t2t(x), t2t(x), t2t(x)
        with torch.autograd.profiler.profile() as profile:
            t2t(x)
    assert sum("t2t_fast::performer_layer" in event.name for event in profile.function_events) >= 2


def test_a_compiled_module_after_replays():
    t2t, x = module(), image()
    with torch.no_grad():
        expected = [t2t(x) for _ in range(3)][-1]
        found = torch.compile(t2t, backend="eager", fullgraph=True)(x)
        assert torch.equal(found, expected) and torch.equal(t2t(x), expected)


def test_threads(monkeypatch):
    """Two threads call the same module with images of different sizes."""
    from triton.runtime.interpreter import GridExecutor

    t2t, results, lock, launch = module(), {}, threading.Lock(), GridExecutor.__call__

    def alone(*arguments, **named):  # Triton's interpreter runs in one thread at a time
        with lock:
            launch(*arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", alone)
    with torch.no_grad(), guards.suspended():
        expected = {size: t2t(image(size)) for size in (16, 24)}

    def work(size):
        with t2t_fast.backend("triton"), torch.no_grad():
            results[size] = [t2t(image(size)) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(size,)) for size in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size, exact in expected.items():
        assert len(results[size]) == 4 and all(torch.equal(each, exact) for each in results[size])


def test_no_tensor_is_kept(events):
    t2t = module()
    for _ in range(3):
        x = image().requires_grad_()
        out = t2t(x)
        out.sum().backward()
        with torch.no_grad():
            t2t(x.detach())
    assert "replayed" in events
    refs, owned = [weakref.ref(x), weakref.ref(out)], [t2t]
    del x, out, t2t
    assert_freed(owned, refs)


def test_an_error_in_a_recorded_call(monkeypatch):
    """Such as too little memory: later calls are not affected."""
    t2t, x, launched = module(), image(), []
    launch = replay.launch

    def failing(kernel, grid, *arguments, **constants):
        launched.append(kernel)
        if len(launched) == 2:
            raise torch.OutOfMemoryError("no memory")
        launch(kernel, grid, *arguments, **constants)

    with torch.no_grad():
        expected = t2t(x)
        monkeypatch.setattr(replay, "launch", failing)
        with pytest.raises(torch.OutOfMemoryError):
            t2t(x)
        assert replay.recording() is None and not torch._C._len_torch_function_stack()
        for _ in range(3):
            assert torch.equal(t2t(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_of_a_replayed_model(kind, own):
    """Captured after its calls are remembered, and again for an image whose calls are not."""
    fast = model(kind, own).cuda()
    for size in (16, 16, 24):
        x = image(size).cuda()
        with torch.no_grad():
            expected = [fast(x) for _ in range(3 if size == 16 else 1)][-1]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = fast(x)
            graph.replay()
        torch.testing.assert_close(out, expected)
