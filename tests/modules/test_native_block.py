"""A transformer block as one native call: when it is made, and that its packed weights are never stale or copied."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import t2t_fast
from support.calls import skip_unless_available
from t2t_fast import backends, models, reference
from t2t_fast.functional import clear_weight_cache
from t2t_fast.interop.swap import swap
from t2t_fast.ops._common.cached import FOLDED
from t2t_fast.ops.transformer_block import native
from t2t_fast.testing import errors

WIDTH, HEADS = 32, 4


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A list that grows with each forward call of the native operator."""
    skip_unless_available("transformer_block", "native")
    clear_weight_cache()
    made, run = [], native._run
    monkeypatch.setattr(native, "_run", lambda *arguments: made.append(None) or run(*arguments))
    return made


def pair(**options):
    """Upstream's block, and a swapped copy."""
    torch.manual_seed(0)
    plain = reference.Block(WIDTH, HEADS, mlp_ratio=2.0, **options)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    fast = copy.deepcopy(plain)
    swap(fast)
    return plain, fast


def tokens(batch=2, length=50):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def close(found, expected, allowed=1e-5):
    assert errors(found, expected)[0] <= allowed


def with_gradients(block, x, seed=0):
    """The output, the input's gradient and those of all parameters."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    torch.manual_seed(seed)
    out = block(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


# ---- when it runs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_a_block_is_one_call(training, amp, calls):
    plain, block = pair()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for _ in range(3):
            found, expected = block.train(training)(tokens()), plain.train(training)(tokens())
            close(found, expected, 1e-2 if amp else 1e-6)
    assert len(calls) == 2  # the third one is replayed


def test_each_block_of_a_model(calls):
    model = models.T2TViT(32, embed_dim=24, depth=3, num_heads=3, num_classes=5, token_dim=16).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = model(x)
        assert len(calls) == 3
        with t2t_fast.backend("aten"):
            close(found, model(x))
    assert len(calls) == 3


def _hooked(block):
    block.mlp.act.register_forward_hook(lambda *_: None)


def _recomputing(block):
    block.recompute = True


def _replaced(block):
    block.mlp.act = nn.ReLU()


OBSTACLES = {
    "dropout": lambda block: [setattr(each, "p", 0.1) for each in block.modules() if isinstance(each, nn.Dropout)],
    "attention dropout": lambda block: setattr(block.attn.attn_drop, "p", 0.1),
    "a hook": _hooked,
    "recompute": _recomputing,
    "another activation": _replaced,
    "float64": lambda block: block.double(),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_other_blocks_are_not(name, calls):
    _, block = pair()
    block.train()
    OBSTACLES[name](block)
    block(tokens().to(next(block.parameters()).dtype))
    assert not calls


def test_a_block_with_pruned_heads_is_not(calls):
    """q, k and v of one head less: narrower than the tokens."""
    _, block = pair()
    attention, kept = block.attn, 3 * WIDTH // HEADS
    with torch.no_grad():
        rows = torch.cat([attention.qkv.weight[part * WIDTH : part * WIDTH + kept] for part in range(3)])
        attention.qkv.weight = nn.Parameter(rows)
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, :kept])
    attention.qkv.out_features, attention.proj.in_features, attention.num_heads = 3 * kept, kept, HEADS - 1
    found = block(tokens())
    with t2t_fast.backend("reference"):
        close(found, block(tokens()))
    assert not calls


@pytest.mark.parametrize("heads", [1, 2])
def test_a_block_that_adds_the_values_is_not(heads, calls):
    """LANL's attention has a residual connection of its own."""
    block = models.lanl.Encoding(WIDTH, heads).eval()
    with torch.no_grad():
        found = block(tokens())
        with t2t_fast.backend("reference"):
            close(found, block(tokens()))
    assert not calls


def test_dropout_of_evaluation_is_none(calls):
    _, block = pair(drop=0.1, attn_drop=0.1)
    block.eval()(tokens())
    assert len(calls) == 1
    block.train()(tokens())
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_another_backend(name, calls, monkeypatch):
    plain, block = pair()
    with t2t_fast.backend(name):
        close(block(tokens()), plain(tokens()))
    with t2t_fast.backend(name, "transformer_block"):
        block(tokens())
    monkeypatch.setattr(backends, "_DEFAULT", name)
    block(tokens())
    assert not calls
    with t2t_fast.backend("native", "transformer_block"):
        block(tokens())
    assert len(calls) == 1


def _compiled(block):
    torch._dynamo.reset()
    return torch.compile(block, backend="aot_eager")


def _exported(block):
    return torch.export.export(block, (tokens(),)).module()


def _tangent(block):
    def run(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return run


TRANSFORMED = {
    "torch.compile": _compiled,
    "torch.export": _exported,
    "torch.jit.trace": lambda block: torch.jit.trace(block.eval(), tokens(), check_trace=False),
    "torch.func.grad": lambda block: torch.func.grad(lambda x: block(x).square().sum()),
    "torch.func.vmap": lambda block: lambda x: torch.func.vmap(block)(x.unsqueeze(1)).squeeze(1),
    "forward mode": _tangent,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_see_plain_operations(name, calls):
    plain, block = pair()
    transform = TRANSFORMED[name]
    close(transform(block)(tokens()), transform(plain)(tokens()))
    assert not calls


def test_a_trace_with_fake_tensors_keeps_nothing(calls):
    """Traced from real parameters, in inference; the next call computes real numbers."""
    plain, block = pair()
    x = tokens()
    with torch.no_grad():
        traced = make_fx(block, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        for call in (block, traced):
            close(call(x), plain(x))


# ---- gradients


@pytest.mark.parametrize("amp", [False, True])
def test_gradients(amp):
    plain, block = pair()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found, expected = with_gradients(block, tokens()), with_gradients(plain, tokens())
    for ours, upstream in zip(found, expected, strict=True):
        assert ours.dtype == upstream.dtype
        close(ours, upstream, 3e-2 if amp else 1e-5)


def test_masks_of_stochastic_depth_are_those_of_the_other_backends(calls):
    _, block = pair(drop_path=0.5)
    block.train()
    found = with_gradients(block, tokens(batch=16))
    assert calls
    with t2t_fast.backend("aten"):
        expected = with_gradients(block, tokens(batch=16))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("trained", ["norm1.weight", "attn.qkv.bias", "attn.proj.weight", "mlp.fc1.weight", "none"])
def test_frozen_parameters_have_no_gradient(trained, calls):
    plain, block = pair(qkv_bias=True)
    for each in (plain, block):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name == trained)
    for ours, upstream in zip(with_gradients(block, tokens()), with_gradients(plain, tokens()), strict=True):
        close(ours, upstream)
    assert calls and sum(p.grad is not None for p in block.parameters()) == (trained != "none")


def test_a_parameter_that_changes_before_backward_raises():
    _, block = pair()
    out = block(tokens()).sum()
    with torch.no_grad():
        block.mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_saved_tensors_on_the_cpu():
    _, block = pair()
    expected = with_gradients(block, tokens())
    with torch.autograd.graph.save_on_cpu():
        found = with_gradients(block, tokens())
    assert all(map(torch.equal, found, expected))


# ---- packed weights

CHANGES = {
    "in place": lambda block: block.attn.qkv.weight.detach().mul_(2),
    "of a LayerNorm": lambda block: block.norm2.bias.detach().add_(1),
    "of one number": lambda block: block.mlp.fc2.bias.detach()[3].add_(1),
    "an optimizer's step": lambda block: (block(tokens()).sum().backward(), _step(block)),
    "load_state_dict": lambda block: block.load_state_dict({k: v + 0.1 for k, v in block.state_dict().items()}),
    "another parameter": lambda block: setattr(block.mlp.fc1, "weight", nn.Parameter(block.mlp.fc1.weight * 2)),
    "another storage": lambda block: setattr(block.attn.proj.weight, "data", block.attn.proj.weight.detach() * 2),
    "data, then backward": lambda block: (_hidden(block), block(tokens()).sum().backward()),
    "data, then backward of another block": lambda block: (_hidden(block), _composed_backward()),
    "data, then clear": lambda block: (_hidden(block), clear_weight_cache()),
}


def _step(block):
    torch.optim.AdamW(block.parameters(), lr=0.1).step()


def _composed_backward():
    with t2t_fast.backend("aten"):
        pair()[1](tokens()).sum().backward()


def _hidden(block):
    """A write that no counter shows."""
    block.mlp.fc2.weight.data.mul_(2)


@pytest.mark.parametrize("name", CHANGES)
def test_packed_weights_follow_a_change(name):
    _, block = pair()
    with torch.no_grad():
        before = block(tokens())
        assert torch.equal(block(tokens()), before) and len(FOLDED) == 1
    CHANGES[name](block)
    with torch.no_grad():
        found = block(tokens())
        with t2t_fast.backend("reference"):
            close(found, block(tokens()))
    assert errors(found, before)[0] > 1e-3


def test_training_keeps_no_packed_weights():
    _, block = pair()
    out = block.train()(tokens())
    assert not len(FOLDED)
    out.sum().backward()
    assert not len(FOLDED)


def test_float32_and_bfloat16_are_packed_separately():
    _, block = pair()
    with torch.no_grad():
        expected = block(tokens())
        with torch.autocast("cpu", torch.bfloat16):
            block(tokens())
        assert len(FOLDED) == 2 and torch.equal(block(tokens()), expected)


def test_copies_and_files_contain_no_packed_weights(calls):
    _, block = pair()
    size = len(pickle.dumps(block))
    names = list(block.state_dict())
    with torch.no_grad():
        expected = block(tokens())
        assert len(FOLDED) == 1
        assert len(pickle.dumps(block)) == size and list(block.state_dict()) == names
        twin = copy.deepcopy(block)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert len(FOLDED) == 1
        for other in (twin, loaded):
            assert torch.equal(other(tokens()), expected)
            other.mlp.fc1.weight.mul_(2)
            assert not torch.equal(other(tokens()), expected)
        assert torch.equal(block(tokens()), expected)


def test_a_modules_packed_weights_are_freed_with_it():
    _, block = pair()
    with torch.no_grad():
        block(tokens())
        del block
        pair()[1](tokens())
    assert len(FOLDED) == 1


def test_many_threads_call_one_block():
    _, block = pair()
    inputs = [tokens(batch=1 + index % 3, length=10 + index) for index in range(24)]
    with torch.inference_mode():
        expected = [block(x) for x in inputs]
    clear_weight_cache()

    def call(x):
        with torch.inference_mode():
            return block(x)

    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(call, inputs), expected, strict=True):
            assert torch.equal(found, wanted)


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


def test_tensors_of_a_subclass():
    plain, block = pair()
    x = tokens().as_subclass(Named)
    found, expected = block(x), plain(x)
    assert type(found) is type(expected)
    close(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "slice"])
def test_tokens_of_any_strides(layout):
    plain, block = pair()
    x = tokens()
    x = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": x[:1].expand(3, -1, -1),
        "slice": torch.cat([x, x], 2)[:, 1::2, 3 : 3 + WIDTH],
    }[layout]
    for ours, upstream in zip(with_gradients(block, x), with_gradients(plain, x), strict=True):
        close(ours, upstream)
