"""Swapped transformer blocks: upstream's, forks' and relatives'; what leaves them unfused; stochastic depth."""

import copy
import pickle

import pytest
import torch
from torch import nn

import t2t_fast
from support import blocks, vit_pytorch
from support.blocks import HEADS, WIDTH
from t2t_fast import reference
from t2t_fast.interop.swap import explain, swap, unswap
from t2t_fast.modules import block as fused
from t2t_fast.testing import errors

CASES = {
    "plain": (lambda: reference.Block(WIDTH, HEADS, mlp_ratio=2.0), fused.FusedBlock),
    "qkv bias, qk_scale": (lambda: reference.Block(WIDTH, HEADS, 2.0, qkv_bias=True, qk_scale=0.3), fused.FusedBlock),
    "squeeze and excitation": (lambda: reference.BlockSE(WIDTH, HEADS, mlp_ratio=2.0), fused.FusedBlockSE),
    "dense": (lambda: reference.BlockDense(8, WIDTH, HEADS, mlp_ratio=2.0), fused.FusedBlockDense),
    "ghost": (lambda: reference.BlockGhost(WIDTH, HEADS, mlp_ratio=3.0), fused.FusedResidual),
    "stochastic depth of another project": (lambda: with_drop_path(0.1), fused.FusedBlock),
    "the articles'": (lambda: reference.lanl.Encoding(WIDTH, HEADS), fused.FusedBlock),
    "mmpretrain": (blocks.MmBlock, fused.FusedBlock),
    "mmpretrain, qk_scale": (lambda: blocks.MmBlock(0.35), fused.FusedBlock),
    "timm": (blocks.TimmBlock, fused.FusedBlock),
    "attention alone": (lambda: reference.blocks.Attention(WIDTH, HEADS), fused.FusedAttention),
    "MLP alone": (lambda: reference.layers.Mlp(WIDTH, 40, WIDTH), fused.FusedMlp),
    "vit-pytorch's attention": (lambda: vit_pytorch.Attention(WIDTH, HEADS, 8), fused.FusedAttention),
    "vit-pytorch's, one head": (lambda: vit_pytorch.Attention(WIDTH, 1, WIDTH), fused.FusedAttention),
    "vit-pytorch's MLP": (lambda: vit_pytorch.FeedForward(WIDTH, 40), fused.FusedMlp),
    "attention maps": (blocks.with_maps, fused.FusedResidual),
}


def with_drop_path(rate, **options):
    block = reference.Block(WIDTH, HEADS, mlp_ratio=2.0, **options)
    block.drop_path = blocks.DropPath(rate)
    return block


def made(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": CASES[name][0]()}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def evaluated(module, x):
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.fixture
def x():
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_and_gradients(name, x):
    """As before the swap, in float64, and exactly so after its end; the fused path runs."""
    model = made(name).eval()
    inner = model["inner"]
    before = evaluated(inner, x)
    report = swap(model)
    assert "inner" in report.swapped and isinstance(inner, CASES[name][1]) and inner.obstacle() is None
    for found, expected in zip(evaluated(inner, x), before, strict=True):
        assert errors(found, expected)[0] < 1e-12
    unswap(model)
    assert type(inner) is type(CASES[name][0]())
    for found, expected in zip(evaluated(inner, x), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["plain", "mmpretrain", "timm", "vit-pytorch's MLP"])
def test_copies_and_pickles(name, x):
    model = made(name).eval()
    swap(model)
    expected = model["inner"](x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin["inner"](x), expected)
        unswap(twin)
        assert not isinstance(twin["inner"], fused.Fused)


def test_maps_stay():
    """Attention that stores its maps is called; the sum, the norm and the MLP around it are fused."""
    model = nn.ModuleDict({"block": blocks.with_maps()}).eval()
    report = swap(model)
    assert report.swapped == ["block", "block.mlp"]
    assert report.left["block.attn"] == "its forward stores attention_map, which the fast form does not"
    model["block"](torch.randn(2, 9, WIDTH))
    assert model["block"].attn.attention_map.shape == (2, HEADS, 9, 9)


@pytest.mark.parametrize("after", [False, True])
def test_a_hook_on_the_weights_keeps_them(after, x):
    """Before or after the swap: the block's original forward runs, and the hook sees the N x N weights."""
    model, maps = made("plain").eval(), []
    expected = model["inner"](x)
    if after:
        swap(model)
    handle = model["inner"].attn.attn_drop.register_forward_hook(lambda module, inputs, out: maps.append(out))
    if not after:
        assert swap(model).rows[0].backend == "unfused: attn.attn_drop has hooks"
    assert torch.equal(model["inner"](x), expected) and maps[0].shape == (2, HEADS, 9, 9)
    assert "unfused: attn.attn_drop has hooks" in str(explain(model))
    handle.remove()
    assert errors(model["inner"](x), expected)[0] < 1e-12 and len(maps) == 1


def _adapter(block):
    block.mlp.adapter = nn.Linear(3, 3)


def _replaced(block):
    block.mlp = nn.Sequential(nn.GELU())


OBSTACLES = {
    "a hook on the attention": (
        lambda block: block.attn.register_forward_hook(lambda *_: None),
        "attn has hooks",
    ),
    "another child": (_adapter, "mlp has the child adapter"),
    "another MLP": (_replaced, "mlp is Sequential"),
    "a parametrised weight": (
        lambda block: nn.utils.parametrizations.weight_norm(block.attn.qkv),
        "attn.qkv is parametrised",
    ),
    "forward on the instance": (lambda block: vars(block.mlp).update(forward=lambda x: 2 * x), "mlp overrides forward"),
    "a norm of another class": (lambda block: setattr(block, "norm2", nn.Identity()), "norm2 is Identity"),
    "a tanh GELU": (lambda block: setattr(block.mlp, "act", nn.GELU("tanh")), "mlp.act is GELU(approximate='tanh')"),
}


@pytest.mark.parametrize("name", OBSTACLES)
@pytest.mark.parametrize("own", [False, True], ids=["swapped", "own"])
def test_what_prevents_the_fusion(name, own, x):
    """The same change before and after the swap gives the same numbers, and the reason is reported."""
    change, reason = OBSTACLES[name]
    plain = made("plain").eval()["inner"]
    if own:
        block = t2t_fast.models.blocks.Block(WIDTH, HEADS, mlp_ratio=2.0).double().eval()
        block.load_state_dict(plain.state_dict())
    else:
        block = copy.deepcopy(plain)
        swap(block)
    assert block.obstacle() is None
    for each in (plain, block):
        change(each)
    assert block.obstacle() == reason
    assert errors(block(x), plain(x))[0] < 1e-12


def test_patterns():
    model = reference.T2T_ViT(img_size=32, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5)
    report = swap(model, exclude="blocks.*")
    assert not any(path.startswith("blocks") for path in report.swapped)
    assert report.left["blocks.0"] == "not selected by include and exclude"
    assert swap(model, include="blocks.1").swapped == ["blocks.1"]
    assert type(model.blocks[0]) is reference.Block
    unswap(model)
    report = swap(model, include="blocks.*", exclude="*.attn")  # a block would skip the attention
    assert report.swapped == ["blocks.0.mlp", "blocks.1.mlp"]


def test_other_arguments_run_the_original(x):
    model = made("timm").eval()["inner"]
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    expected = model(x, attn_mask=mask)
    swap(model)
    assert torch.equal(model(x, attn_mask=mask), expected)
    assert not torch.allclose(model(x), expected)


class Unusual(nn.Module):
    """What a check of stochastic depth must refuse: another scale, noise in eval mode, elements instead of samples."""

    def __init__(self, kind, drop_prob=0.1):
        super().__init__()
        self.kind, self.drop_prob = kind, drop_prob

    def forward(self, x):
        if not self.training:
            return x * 2 if self.kind == "eval" else x
        shape = x.shape if self.kind == "elements" else (len(x), 1, 1)
        kept = x * (torch.rand(shape) >= self.drop_prob)
        return kept if self.kind == "scale" else kept / (1 - self.drop_prob)


@pytest.mark.parametrize("kind", ["scale", "eval", "elements"])
def test_another_stochastic_depth_is_left(kind):
    cls = type(f"Unusual_{kind}", (Unusual,), {})  # the check is cached by class
    block = with_drop_path(0.1)
    block.drop_path = cls(kind)
    model = nn.ModuleDict({"block": block})
    swap(model)
    assert not isinstance(model["block"], fused.FusedBlock)


def test_swap_proves_equal_blocks_once(monkeypatch):
    from t2t_fast.interop.swap import apply

    calls, prove = [], apply.prove
    monkeypatch.setattr(apply, "prove", lambda module, *rest: calls.append(module) or prove(module, *rest))
    model = nn.ModuleList(reference.Block(WIDTH, HEADS, mlp_ratio=2.0) for _ in range(4))
    model[2].attn.scale = 0.5
    assert len(swap(model).swapped) == 4 and len(calls) == 2


def test_statistics_of_dropout_and_stochastic_depth():
    """In training the mean of many draws is the output of eval mode where the block is linear in its branches, and
    each sample's branches are dropped at their rates."""
    torch.manual_seed(0)
    block = with_drop_path(0.25, drop=0.0).train()
    swap(block)
    assert block.obstacle() is None
    x = torch.randn(1, 5, WIDTH).expand(4000, -1, -1)
    with torch.no_grad():
        out = block(x)
        first = block.attn(block.norm1(x[:1]))
        second = [block.mlp(block.norm2(t)) for t in (x[:1], x[:1] + first / 0.75)]
        outcomes = torch.cat([
            x[:1],
            x[:1] + second[0] / 0.75,
            x[:1] + first / 0.75,
            x[:1] + first / 0.75 + second[1] / 0.75,
        ])  # fmt: skip
    distance = (out.unsqueeze(1) - outcomes).flatten(2).norm(dim=2)
    assert distance.min(dim=1).values.max() < 1e-4
    shares = distance.argmin(dim=1).bincount(minlength=4) / len(x)
    expected = torch.tensor([0.25 * 0.25, 0.25 * 0.75, 0.75 * 0.25, 0.75 * 0.75])
    assert (shares - expected).abs().max() < 5 * (0.25 / len(x)) ** 0.5
