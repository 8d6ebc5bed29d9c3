"""swap: what it matches, keeps and rejects, and unswap."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from t2t_fast import backends, models, reference
from t2t_fast.errors import NothingToSwap
from t2t_fast.interop.swap import swap, swapped, unswap
from t2t_fast.interop.swap.rules import RULES
from t2t_fast.models.lanl.layers import FusedEncoding
from t2t_fast.modules import Fold, T2TModule, TokenPerformer, TokenTransformer, Unfold
from t2t_fast.modules.block import FusedBlock
from t2t_fast.testing import errors

DEFAULT = backends.explain("performer_layer", device="cpu").chosen("performer_layer")
TINY = dict(img_size=64, num_classes=10, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, token_dim=32)


def tiny(tokens_type="performer", **options):
    return reference.T2T_ViT(tokens_type=tokens_type, **{**TINY, **options})


def articles():
    return reference.lanl.T2T_ViT((1, 60, 100), (7, 3, 3), token_len=48, token_chan=32, depth=2, num_heads=2)


MODELS = {
    "performer": (tiny, (2, 3, 64, 64)),
    "transformer": (lambda: tiny("transformer"), (2, 3, 64, 64)),
    "one channel": (lambda: tiny(in_chans=1), (2, 1, 64, 64)),
    "se": (lambda: reference.T2T_ViT_SE(**TINY), (2, 3, 64, 64)),
    "ghost": (lambda: reference.T2T_ViT_Ghost(**{**TINY, "mlp_ratio": 3.0}), (2, 3, 64, 64)),
    "articles": (articles, (2, 1, 60, 100)),
    "T2T module alone": (lambda: reference.T2T_module(64, "performer", 3, 48, 32), (2, 3, 64, 64)),
    "Performer layer alone": (lambda: reference.Token_performer(27, 16), (2, 9, 27)),
    "Performer layer, two heads": (lambda: reference.Token_performer(27, 16, head_cnt=2), (2, 9, 27)),
    "Transformer layer alone": (
        lambda: reference.Token_transformer(27, 16, 1, qkv_bias=True, qk_scale=0.3),
        (2, 9, 27),
    ),
}


def randomised(model):
    """Randomise biases and norms too, so that exchanged parameters are noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients_of(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(torch.ones_like(out))
    return out.detach(), {**{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "input": x.grad}


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_gradients(name):
    """Equal in float64, where rounding is negligible; after unswap the output is bit-identical."""
    make, shape = MODELS[name]
    model = randomised(make()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    # the eager Performer casts to float32, but leaves float64 as it is
    before, before_gradients = gradients_of(model, x)
    report = swap(model)
    assert report.swapped and not report.left
    after, after_gradients = gradients_of(model, x)
    assert errors(after, before)[1] < 1e-10
    assert before_gradients.keys() == after_gradients.keys()
    for key, gradient in before_gradients.items():
        assert errors(after_gradients[key], gradient)[0] < 1e-9, key
    unswap(model)
    assert torch.equal(gradients_of(model, x)[0], before)


@pytest.mark.parametrize("name", MODELS)
def test_everything_stays_but_the_class(name):
    make, _ = MODELS[name]
    model = make()
    ids = {path: id(m) for path, m in model.named_modules()}
    parameters = {path: id(p) for path, p in model.named_parameters()}
    classes = {path: type(m) for path, m in model.named_modules()}
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    keys = list(model.state_dict())
    swap(model)
    assert {path: id(m) for path, m in model.named_modules()} == ids
    assert {path: id(p) for path, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert {path: type(m) for path, m in model.named_modules()} != classes
    unswap(model)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert {path: set(m.__dict__) for path, m in model.named_modules()} == attributes


def test_report_is_a_table():
    report = swap(tiny())
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "from", "to", "backend", "reason"]
    assert lines[1].split() == ["tokens_to_token", "T2T_module", "T2TModule", DEFAULT]
    assert lines[2].split() == ["tokens_to_token.soft_split0", "Unfold", "(fused)", "-", "with", "attention1"]
    assert lines[-2].split() == ["blocks.1", "Block", "FusedBlock", "aten"]
    assert lines[-1] == "5 modules swapped, 0 left"
    assert report.swapped == [
        *("tokens_to_token", "tokens_to_token.attention1", "tokens_to_token.attention2"),
        *("blocks.0", "blocks.1"),
    ]


def test_dry_run_changes_nothing():
    model = tiny()
    report = swap(model, dry_run=True)
    assert "would be swapped" in str(report) and len(report.swapped) == 5
    assert type(model.tokens_to_token) is reference.T2T_module
    assert type(model.blocks[0]) is reference.Block
    assert not unswap(model).rows


def test_any_image_size_after_the_swap():
    """Upstream's module takes square images only; the swapped one takes any size and returns the grid."""
    model = tiny("performer")
    swap(model)
    tokens, grid = model.tokens_to_token.forward_with_grid(torch.randn(1, 3, 48, 80))
    assert grid == (3, 5) and tokens.shape == (1, 15, 48)
    assert isinstance(model.tokens_to_token, T2TModule) and model.tokens_to_token.num_patches == 16


def test_include_and_exclude():
    model = tiny()
    report = swap(model, exclude="*.attention1")
    assert type(model.tokens_to_token.attention1) is reference.Token_performer
    assert isinstance(model.tokens_to_token.attention2, TokenPerformer)
    assert report.left == {"tokens_to_token.attention1": "not selected by include and exclude"}
    x = torch.randn(1, 3, 64, 64)
    model.eval()
    mixed = model(x)
    unswap(model)
    torch.testing.assert_close(mixed, model(x), rtol=1e-4, atol=1e-5)

    swap(model, include=["*.attention2"])
    assert type(model.tokens_to_token) is reference.T2T_module
    assert type(model.tokens_to_token.attention1) is reference.Token_performer
    assert isinstance(model.tokens_to_token.attention2, TokenPerformer)
    with pytest.raises(TypeError, match="swap: include must be a pattern or patterns"):
        swap(tiny(), include=3)


def test_nothing_to_swap_lists_what_was_looked_for():
    with pytest.raises(NothingToSwap) as caught:
        swap(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    text = str(caught.value)
    assert "nothing to swap in Sequential" in text
    assert {rule.name for rule in RULES} >= {"T2T_module", "Tokens2Token", "Token_performer", "nn.Unfold", "nn.Fold"}
    for rule in RULES:
        assert f"{rule.name}: {rule.structure}" in text and rule.operator in ("", *backends.operators())
    with pytest.raises(NothingToSwap, match="not selected"):
        swap(tiny(), include="no.such.path")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        swap(3)


def test_swapping_twice_and_native_models():
    model = tiny()
    swap(model)
    again = swap(model)
    assert not again.swapped and set(again.left.values()) == {"is fast already"}
    assert not swap(models.T2TViT(**TINY)).swapped
    unswap(model)
    assert type(model.tokens_to_token) is reference.T2T_module


def test_optimizer_built_before_still_trains():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.tokens_to_token.attention1.kqv.weight
    before = weight.detach().clone()
    swap(model)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert model.tokens_to_token.attention1.w.grad is None, "upstream freezes w"


@pytest.mark.parametrize(
    "path",
    ["tokens_to_token", "tokens_to_token.attention1", "tokens_to_token.attention2.kqv", "tokens_to_token.soft_split1"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire_with_upstreams_inputs_and_outputs(path, when):
    """On the module, on a layer, and deep inside a layer: a layer with hooks runs unfused."""
    model = tiny().double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    seen = []

    def register():
        hook = lambda _m, inputs, out: seen.append((inputs[0].detach(), out.detach()))  # noqa: E731
        return model.get_submodule(path).register_forward_hook(hook)

    handle = register()
    model(x)
    if when == "after":
        handle.remove()
    swap(model)
    if when == "after":
        handle = register()
    model(x)
    assert len(seen) == 2
    for ours, theirs in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_training_flag_dtype_and_requires_grad_stay():
    model = tiny().half()
    model.tokens_to_token.attention1.kqv.weight.requires_grad_(False)
    model.tokens_to_token.eval()
    swap(model)
    assert model.training and not model.tokens_to_token.training
    assert model.tokens_to_token.attention1.kqv.weight.dtype == torch.float16
    assert not model.tokens_to_token.attention1.kqv.weight.requires_grad


def test_state_dict_goes_both_ways():
    model, twin = tiny().eval(), tiny().eval()
    swap(model)
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_of_a_swapped_model():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    swap(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        unswap(twin)
        assert type(twin.tokens_to_token) is reference.T2T_module
    assert isinstance(model.tokens_to_token, T2TModule)


def test_context_manager():
    model = tiny()
    with swapped(model) as report:
        assert len(report.swapped) == 5 and isinstance(model.tokens_to_token, T2TModule)
    assert type(model.tokens_to_token) is reference.T2T_module
    with pytest.raises(KeyError), swapped(model):
        raise KeyError
    assert type(model.tokens_to_token) is reference.T2T_module
    swap(model, include="*.attention1")
    with swapped(model):
        assert isinstance(model.tokens_to_token, T2TModule)
    assert type(model.tokens_to_token) is reference.T2T_module
    assert isinstance(model.tokens_to_token.attention1, TokenPerformer), "what was swapped before the block stays"


class OtherForward(reference.Token_performer):
    """A fork with the same children whose forward computes something else."""

    def forward(self, x):
        return super().forward(x) * 1.01


class OtherActivation(reference.Token_performer):
    def __init__(self, dim, in_dim):
        super().__init__(dim, in_dim)
        self.mlp[1] = nn.ReLU()


def test_a_fork_with_another_forward_is_left_with_the_reason():
    model = nn.ModuleDict({"fork": OtherForward(27, 16), "same": reference.Token_performer(27, 16)})
    report = swap(model)
    assert report.swapped == ["same"]
    assert "computes something else: on a probe the results differ by" in report.left["fork"]
    assert type(model["fork"]) is OtherForward


def test_another_activation_runs_unfused_with_the_same_numbers():
    layer = OtherActivation(27, 16).eval()
    x = torch.randn(2, 5, 27)
    expected = layer(x)
    swap(layer)
    assert isinstance(layer, TokenPerformer) and layer.obstacle() == "mlp.1 is ReLU"
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_what_almost_matches_is_left_with_the_reason():
    dilated = reference.T2T_module(64, token_dim=16, embed_dim=24)
    dilated.soft_split1 = nn.Unfold(3, dilation=2, padding=2, stride=2)
    heads = reference.Token_transformer(27, 16, num_heads=1)
    heads.attn.num_heads = 2
    short = reference.Token_performer(27, 16)
    short.mlp = short.mlp[:3]
    model = nn.ModuleDict({"dilated": dilated, "heads": heads, "short": short})
    left = swap(model).left
    assert "dilation" in left["dilated"] and "attn.num_heads is 2" in left["heads"]
    assert "mlp has 3 layers" in left["short"]


def test_meta_parameters_cannot_be_proved():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(NothingToSwap, match="meta device"):
        swap(model)


class Custom(nn.Module):
    """A soft split in front of something unknown."""

    def __init__(self):
        super().__init__()
        self.soft_split0 = nn.Unfold(7, stride=4, padding=2)
        self.unfold = nn.Unfold(3)
        self.linear = nn.Linear(147, 8)

    def forward(self, x):
        return self.linear(self.soft_split0(x).transpose(1, 2))


def test_a_bare_unfold():
    model = Custom()
    x = torch.randn(2, 3, 32, 40)
    expected = model(x)
    with pytest.raises(NothingToSwap, match=r"left: soft_split0 \(Unfold\): .*name it in include"):
        swap(model)  # its name does not tell how its output is used
    report = swap(model, include="soft_split0")
    assert report.swapped == ["soft_split0"] and isinstance(model.soft_split0, Unfold)
    assert type(model.unfold) is nn.Unfold
    assert model.soft_split0(x).transpose(1, 2).is_contiguous()
    torch.testing.assert_close(model(x), expected)
    unswap(model)
    assert type(model.soft_split0) is nn.Unfold


class Video(nn.Module):
    """A soft split and a soft composition under other names, as video inpainting has them."""

    def __init__(self, dilation=1):
        super().__init__()
        self.t2t = nn.Unfold(3, stride=2, padding=1)
        self.embed = nn.Conv1d(18, 27, 1)
        self.compose = nn.Fold((8, 10), 3, dilation=dilation, stride=2, padding=dilation)

    def forward(self, x):
        return self.compose(self.embed(self.t2t(x)))


def test_a_bare_fold():
    """A Fold of any name is swapped, since its output has upstream's memory layout for all strides of the input."""
    model = Video().double()
    x = torch.randn(2, 2, 8, 10, dtype=torch.float64)
    expected, expected_gradients = gradients_of(model, x)
    report = swap(model)
    assert report.swapped == ["compose"] and isinstance(model.compose, Fold)
    assert list(report.left) == ["t2t"] and "1 module swapped, 1 left" in str(report)
    result, gradients = gradients_of(model, x)
    assert errors(result, expected)[1] < 1e-13
    for key, gradient in expected_gradients.items():
        assert errors(gradients[key], gradient)[0] < 1e-13, key
    fold = model.compose
    tokens = torch.randn(2, 27, 20, dtype=torch.float64)
    for given in (tokens, tokens.mT.contiguous().mT, tokens[0]):
        upstream = nn.functional.fold(given, (8, 10), 3, stride=2, padding=1)
        assert fold(given).is_contiguous() and errors(fold(given), upstream)[1] < 1e-13
    assert pickle.loads(pickle.dumps(model)).compose.output_size == (8, 10)
    unswap(model)
    assert type(model.compose) is nn.Fold


def test_an_unfold_is_swapped_if_include_names_it():
    """A pattern that selects the model around it is not enough."""
    model = nn.ModuleDict({"video": Video()})
    report = swap(model, include="video")
    assert report.swapped == ["video.compose"] and list(report.left) == ["video.t2t"]
    unswap(model)
    report = swap(model, include=["*.t2t"])
    assert report.swapped == ["video.t2t"] and isinstance(model["video"].t2t, Unfold)
    assert report.left == {"video.compose": "not selected by include and exclude"}
    x = torch.randn(2, 2, 8, 10)
    upstream = nn.Unfold(3, stride=2, padding=1)
    for given in (x, x[0]):
        torch.testing.assert_close(model["video"].t2t(given), upstream(given))
    with pytest.raises(NothingToSwap, match=r"left: t2t \(Unfold\): .*name it in include"):
        swap(nn.Sequential(OrderedDict(t2t=nn.Unfold(3))))


def test_a_dilated_fold_is_left_with_the_reason():
    model = Video(dilation=2)
    model.t2t = nn.Unfold(3, stride=2, padding=1)
    with pytest.raises(NothingToSwap, match=r"left: compose \(Fold\): dilation 2"):
        swap(model)


def test_backbone_blocks_are_not_token_layers():
    """A backbone block has the same children as a token layer, but a skip connection around its attention."""
    model = tiny("transformer")
    swap(model)
    assert all(isinstance(block, FusedBlock) for block in model.blocks)
    assert isinstance(model.tokens_to_token.attention1, TokenTransformer)
    model = articles()
    swap(model)
    assert all(isinstance(block, FusedEncoding) for block in model.vit_backbone.blocks)


def test_the_probe_leaves_no_trace():
    model = tiny().train()
    calls = []
    model.tokens_to_token.attention1.kqv.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    swap(model)
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
