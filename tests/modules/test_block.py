"""Fused transformer blocks: what they save, their dtypes, half precision, checkpointing, and the tokens around them."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import t2t_fast
from t2t_fast import models, reference
from t2t_fast.functional.transformer_block import native as native_block
from t2t_fast.interop.swap import swap
from t2t_fast.memory import saved_bytes
from t2t_fast.models.position import add_positions
from t2t_fast.testing import errors

WIDTH, HEADS, HIDDEN = 32, 4, 64


def pair(**options):
    """Upstream's block, and a swapped copy."""
    torch.manual_seed(0)
    plain = reference.Block(WIDTH, HEADS, mlp_ratio=2.0, **options)
    fast = copy.deepcopy(plain)
    swap(fast)
    return plain, fast


def tokens(batch=2, length=50, **options):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(**options)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_saved_for_backward(recompute, amp):
    """x, qkv, the attention's output with its log-sum-exp, the stream and fc1's output; without ``recompute``'s."""
    _, block = pair()
    block.train().recompute = recompute
    x = tokens().requires_grad_()

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return block(x)

    operand = 2 if amp else 4
    rows = 2 * 50
    expected = rows * (3 * WIDTH * operand + WIDTH * operand + HEADS * 4 + WIDTH * 4)  # x is counted as lasting
    expected += 0 if recompute else rows * HIDDEN * operand
    composed = recompute or not native_block(x)
    expected += WIDTH * WIDTH * operand if amp and composed else 0  # autocast's copy of proj.weight
    assert saved_bytes(forward, [x, *block.parameters()]) == expected


class Largest(TorchDispatchMode):
    """The largest number of values that any operation returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.values = max(self.values, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


def test_no_tensor_of_the_attention_weights_size():
    _, block = pair()
    x = tokens(1, 500).requires_grad_()
    with Largest() as largest:
        block(x).sum().backward()
    assert largest.values <= 500 * 3 * WIDTH < 500 * 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The stream stays float32, and the error is not above upstream's."""
    plain, block = pair()
    x = tokens()
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype):
        found, upstream = block(x), plain(x)
    assert found.dtype == upstream.dtype == torch.float32
    assert errors(found, exact)[0] <= 1.1 * errors(upstream, exact)[0]


def test_finite_in_float16_where_upstream_is_not():
    """Logits beyond 65504: upstream's softmax gives NaN."""
    plain, block = pair()
    with torch.no_grad():
        plain.attn.qkv.weight[: 2 * WIDTH].mul_(300)
    block.load_state_dict(plain.state_dict())
    x = 4 * tokens()
    exact = copy.deepcopy(plain).double()(x.double())
    upstream, found = plain.half()(x.half()), block.half()(x.half())
    assert upstream.isnan().any()
    assert found.isfinite().all() and errors(found, exact)[0] < 5e-3


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_checkpointing_repeats_the_masks(drop):
    _, block = pair(drop=drop, attn_drop=drop)
    block.train()
    found = []
    for around in (False, True):
        x = tokens().requires_grad_()
        torch.manual_seed(3)
        out = checkpoint(block, x, use_reentrant=False) if around else block(x)
        block.zero_grad()
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    for direct, again in zip(*found, strict=True):
        assert torch.equal(direct, again)


def test_training_mode_draws_and_eval_mode_does_not():
    _, block = pair(drop=0.3)
    block.train()
    x = tokens()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_mean_of_dropout():
    """The mean of many training outputs with dropout behind the projection and the MLP is the output in eval mode."""
    plain, _ = pair(drop=0.0)
    with torch.no_grad():
        plain.mlp.fc2.weight.zero_()  # else the second branch is no linear function of the first
    plain.attn.proj_drop.p = plain.mlp.drop.p = 0.5
    swap(plain)
    x = tokens(1, 5).expand(4000, -1, -1)
    with torch.no_grad():
        expected = plain.eval()(x[:1])[0]
        mean = plain.train()(x).mean(0)
        deviation = plain(x).std(0)
    assert ((mean - expected).abs() <= 6 * deviation / 4000**0.5 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_positions(dtype):
    """As upstream's concatenation and sum, forward and backward, also in mixed dtypes."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 7, 8), (1, 2, 8), (1, 9, 8)
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    grad = torch.randn(3, 9, 8, generator=generator)

    def run(function):
        x, extra, table = given
        out = function(x.to(dtype), extra, table)
        for t in given:
            t.grad = None
        out.backward(grad)
        return [out.detach(), *(t.grad for t in given)]

    def upstream(x, extra, table):
        return torch.cat([extra.expand(len(x), -1, -1), x], dim=1) + table

    for found, expected in zip(run(add_positions), run(upstream), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_a_hook_on_the_final_norm_sees_every_token():
    """Without one, only the class token is normalised."""
    model = models.T2TViT(32, embed_dim=24, depth=1, num_heads=3, num_classes=5, token_dim=16).eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    with Largest(), torch.no_grad():
        expected = model(x)
    model.norm.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    torch.testing.assert_close(model(x), expected)
    assert seen == [(1, 5, 24)]


def test_bytes_kept_by_a_model():
    """At most 0.6 of upstream's for T2T-ViT-14, and less with ``recompute``."""
    model, x = reference.t2t_vit_14(), torch.randn(1, 3, 224, 224)

    def kept():
        return saved_bytes(lambda: model(x), [x, *model.parameters()])

    upstream = kept()
    swap(model)
    saved = kept()
    assert saved <= 0.6 * upstream
    for block in model.blocks:
        block.recompute = True
    assert kept() <= 0.75 * saved
    assert isinstance(t2t_fast.explain(model).rows[-1][2], str)
