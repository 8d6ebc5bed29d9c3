"""Other projects' models, from stubs of their structure: what is swapped, what is left and why, and equal results."""

import copy
import pickle

import pytest
import torch
from torch import nn

from support import families, golden
from support.foreign import FOREIGN, grids, inpainting, saliency
from support.swapping import flat
from t2t_fast import explain, reference
from t2t_fast.interop.swap import swap, unswap
from t2t_fast.modules import windowed
from t2t_fast.testing import errors


def module(path, layer="TokenPerformer"):
    """The rows of a whole T2T module."""
    return {path: "T2TModule", f"{path}.attention1": layer, f"{path}.attention2": layer}


def blocks(path, count=2, name="FusedBlock"):
    return {f"{path}.{index}": name for index in range(count)}


VIEW = "its result would be a transposed view"
PERFORMER = module("tokens_to_token")
TRANSFORMER = module("tokens_to_token", "TokenTransformer")
FEED_FORWARD = {f"transformer.{index}.ffn": "FusionFeedForward" for index in range(2)}
SWAPPED = {
    "T2T-ViT": {**PERFORMER, **blocks("blocks")},
    "DVT": {
        **module("coarse"),
        **module("fine"),
        **{f"{path}.{index}.mlp": "FusedMlp" for path in ("blocks", "fine_blocks") for index in range(2)},
    },
    "AdaViT": {**PERFORMER, "first": "FusedBlock"},
    "LocalViT": {"tokens_to_token": "T2TModule", **{f"blocks.{index}.attn": "TimmAttention" for index in range(2)}},
    "CrossViT": {
        **module("patch_embed.0", "TokenTransformer"),
        **module("patch_embed.1", "TokenTransformer"),
        **blocks("blocks.0"),
        **blocks("blocks.1"),
    },
    "shared blocks": {**PERFORMER, "block": "FusedBlock"},
    "mmpretrain": {
        "tokens_to_token": "T2TModule",
        **{f"tokens_to_token.attention{index}": "MmpretrainTokenTransformer" for index in (1, 2)},
        **blocks("encoder", name="MmpretrainBlock"),
    },
    "vit-pytorch": {
        **{f"to_patch_embedding.{step}.layers.0.0": "PreNormHead" for step in (3, 7)},
        **{f"to_patch_embedding.{step}.layers.0.1": "PreNormMlp" for step in (3, 7)},
        "transformer.layers.0.0": "PreNormAttention",
        "transformer.layers.0.1": "PreNormMlp",
    },
    "LANL": {"": "lanl.Tokens2Token", **{f"transformer{index}": "lanl.TokenTransformer" for index in (1, 2)}},
    "VST": {
        **TRANSFORMER,
        **blocks("blocks"),
        **{f"decoder{index}.upsample": "Fold" for index in (1, 2, 3)},
        **{f"decoder{index}.att": "PerformerBlock" for index in (1, 2)},
    },
    "M3Net": {**TRANSFORMER, **blocks("blocks"), **{f"decoder{index}.upsample": "Fold" for index in (1, 2, 3)}},
    "FuseFormer": {"ss": "SplitEmbedding", "sc.t2t": "Fold", **FEED_FORWARD},
    "E2FGVI": {"ss": "GridEmbedding", "sc.t2t": "Fold", **FEED_FORWARD},
    "E2FGVI-HQ": {
        "ss": "SizedGridEmbedding",
        "sc": "Composition",
        **{f"transformers.{index}.ffn": "SizedFusionFeedForward" for index in range(2)},
    },
    "ProPainter": {
        "ss": "SizedGridEmbedding",
        "sc": "Composition",
        **{f"transformers.{index}.ffn": "SizedFusionMlp" for index in range(2)},
    },
    "VOLO": {
        **blocks("outlookers", name="GridMlpBlock"),
        **{f"outlookers.{index}.attn": "OutlookAttention" for index in range(2)},
        **blocks("transformers", name="GridBlock"),
    },
    "PTNet": {
        **blocks("down_blocks", 3, "SplitLayer"),
        **{f"down_blocks.{index}.transformer": "TokenPerformer" for index in range(3)},
        **blocks("bottleneck"),
        **{f"up_blocks.{index}.transformer": "TokenPerformer" for index in range(2)},
    },
}
LEFT = {
    "DVT": {
        **{f"blocks.{index}": "the original returns a tuple, not a tensor" for index in range(2)},
        **{f"fine_blocks.{index}": "does not run on a probe of 2 x 7 x 48" for index in range(2)},
        **{
            f"{path}.{index}.attn": "its forward takes (x, relations), the fast one an input alone"
            for path in ("blocks", "fine_blocks")
            for index in range(2)
        },
    },
    "AdaViT": {
        "blocks.0": "has the child head_select, layer_select, which the fast form does not call",
        "blocks.0.mlp": "fc1 is WidthLinear",
    },
    "vit-pytorch": {f"to_patch_embedding.{step}": VIEW for step in (1, 5, 9)},
    "PTNet": {
        "up_blocks.0": "the layer's width 32 is not a multiple of its window's 9 pixels",
        "up_blocks.1": "the layer's width 16 is not a multiple of its window's 9 pixels",
        **{f"up_blocks.{index}.sw": VIEW for index in range(2)},
    },
}


def evaluated(model, *given, named=None):
    """The results of a model, and the gradients of its first input and of its parameters."""
    first, *others = given
    first = first.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    results = flat(model(first, *others, **(named or {})))
    weights = [torch.linspace(-1, 1, result.numel()).to(result).view(result.shape) for result in results]
    sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
    gradients = [first.grad, *(p.grad for p in model.parameters())]
    return results, [torch.zeros(1) if each is None else each for each in gradients]


def equal(found, expected, tolerance=1e-9):
    """Results and gradients; a gradient that is zero but for rounding is compared with the others."""
    scale = max(each.norm().item() for each in expected[1])
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert errors(ours, theirs)[0] < tolerance
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert (ours - theirs).norm().item() < tolerance * max(theirs.norm().item(), 1e-3 * scale)


def still(model):
    """The model in training mode, without dropout."""
    for each in model.modules():
        for name in ("p", "drop_prob"):
            if hasattr(each, name):
                setattr(each, name, 0.0)
    return model.train()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_swapped_and_left(name):
    model = FOREIGN[name].model()
    kinds, keys = [type(each) for each in model.modules()], list(model.state_dict())
    report = swap(model)
    assert {row.path: row.target for row in report.rows if row.path in report.swapped} == SWAPPED[name]
    assert set(report.left) == set(LEFT.get(name, ()))
    for path, reason in LEFT.get(name, {}).items():
        assert reason in report.left[path]
    assert list(model.state_dict()) == keys
    unswap(model)
    assert [type(each) for each in model.modules()] == kinds


@pytest.mark.parametrize("name", FOREIGN)
def test_results_and_gradients_in_float64(name):
    model, x = FOREIGN[name].model().double(), FOREIGN[name].images().double()
    fast = copy.deepcopy(model)
    swap(fast)
    equal(evaluated(fast, x), evaluated(model, x))
    equal(evaluated(still(fast), x), evaluated(still(model), x))


@pytest.mark.parametrize(
    "name",
    [
        "official_tiny_performer_in3",
        "official_tiny_transformer_in3",
        "lanl_t2t_vit_60x100_heads2_bias",
        "vitpytorch_t2tvit_small_gray_mean",
        "mmpretrain_tiny_featmap_64x96_scale_corrected",
    ],
)
def test_golden_numbers_of_swapped_models(name):
    case = golden.cases()[name]
    built = families.build(case, "reference")
    golden.fill(built.model.eval(), case, built.upstream_key)
    assert swap(built.model).swapped
    with torch.no_grad():
        found = flat(built.call(golden.make_input(case, torch.float32)))[0]
    expected = next(value for key, value in golden.arrays(case).items() if key.startswith("out"))
    assert errors(found, torch.from_numpy(expected))[0] < 1e-5


# ---- fold, normalise, unfold


def feed_forward(kind="fixed"):
    torch.manual_seed(0)
    if kind == "fixed":
        return inpainting.FixedFeedForward(24, 98, (20, 32)).eval()
    return inpainting.ProPainterFeedForward(24, 98).eval()


@pytest.mark.parametrize("size", [(7, 7), (13, 25), (31, 10), (60, 108)])
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 3)])
def test_any_size_and_number_of_frames(size, batch, frames):
    """Only one small size is tried by the proof; the others follow from the operator."""
    model = feed_forward("sized").double()
    height, width = inpainting.grid_of(size)
    x = torch.randn(batch, frames * height * width, 24, dtype=torch.float64)
    expected = evaluated(model, x, size)
    assert swap(nn.ModuleList([model])).swapped == ["0"]
    equal(evaluated(model, x, size), expected)


def test_arguments_by_name():
    class Renamed(inpainting.ProPainterFeedForward):
        def forward(self, tokens, fold_size):
            return super().forward(tokens, fold_size)

    torch.manual_seed(0)
    x, models = torch.randn(1, 15, 24), [feed_forward("sized"), Renamed(24, 98).eval()]
    expected = [models[0](x=x, output_size=(13, 9)), models[1](tokens=x, fold_size=(13, 9))]
    assert swap(nn.ModuleList(models)).swapped == ["0", "1"]
    found = [models[0](output_size=(13, 9), x=x), models[1](fold_size=(13, 9), tokens=x)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["fixed", "sized"])
def test_copies_and_pickles(kind):
    model = feed_forward(kind)
    given = (torch.randn(1, 77, 24),) if kind == "fixed" else (torch.randn(1, 15, 24), (13, 9))
    expected = model(*given)
    swap(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, windowed.FusionFeedForward)
        assert torch.allclose(twin(*given), expected, atol=1e-6)


def test_hooks():
    """A hook on a child that the fast form skips is called, and so are those on the others, which stay fused."""
    model, x, called = feed_forward(), torch.randn(1, 77, 24), []
    expected = model(x)
    swap(model)
    assert model.obstacle() is None
    model.conv1.register_forward_hook(lambda *_: called.append("conv1"))
    assert torch.allclose(model(x), expected, atol=1e-6) and called == ["conv1"] and model.obstacle() is None
    handle = model.unfold.register_forward_hook(lambda *_: called.append("unfold"))
    assert torch.equal(model(x), expected) and called == ["conv1", "conv1", "unfold"]
    assert "unfused: unfold has hooks" in str(explain(model))
    handle.remove()
    assert model.obstacle() is None


class Unnormalised(inpainting.FixedFeedForward):
    """Adds the windows up without dividing by their number."""

    def forward(self, x):
        x = self.conv1(x)
        frames = x.view(-1, self.n_vecs, x.shape[2]).transpose(1, 2)
        return self.conv2(self.unfold(self.fold(frames)).transpose(1, 2).reshape(x.shape))


class Weighted(inpainting.ProPainterFeedForward):
    """Multiplies the averaged tokens by a number that only its instance knows."""

    gain = 1.0

    def forward(self, x, output_size):
        return self.fc2(self._between(self.fc1(x), output_size) * self.gain)


def test_another_computation_is_left():
    torch.manual_seed(0)
    model = nn.ModuleDict({"sum": Unnormalised(24, 98, (20, 32)), "gain": Weighted(24, 98)}).eval()
    x = torch.randn(1, 77, 24)
    expected = model["sum"](x)
    report = swap(model)
    assert "its forward computes something else" in report.left["sum"]
    assert "its forward reads gain, which the fast form does not" in report.left["gain"]
    assert report.swapped == ["sum.fold", "sum.unfold"], "the proof shows that it takes the view of a fast unfold"
    assert torch.allclose(model["sum"](x), expected, atol=1e-5)


def test_number_of_arguments():
    class Masked(inpainting.ProPainterFeedForward):
        def forward(self, x, output_size, mask):
            return super().forward(x, output_size) * mask

    report = swap(nn.ModuleDict({"a": Masked(24, 98), "plain": reference.Block(24, 3)}))
    assert report.left["a"] == "its forward takes (x, output_size, mask), the fast one (x, output_size)"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FuseFormer", "ProPainter", "VOLO", "VST"])
def test_compiled(name):
    model, x = FOREIGN[name].model(), FOREIGN[name].images()
    with torch.no_grad():
        expected = model(x)
        assert swap(model).swapped
        assert torch.allclose(torch.compile(model, backend="eager")(x), expected, atol=1e-4)


# ---- other kinds


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 8)), (2, (8, 6)), (2, (7, 5)), (3, (10, 4))])
def test_outlook_attention(stride, size):
    torch.manual_seed(0)
    model = grids.OutlookAttention(12, 3, stride=stride).double().eval()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    expected = evaluated(model, x)
    assert swap(model).swapped == [""]
    equal(evaluated(model, x), expected)
    model.attn_drop.register_forward_hook(lambda module, given, weights: weights * 0)
    assert model.obstacle() == "attn_drop has hooks"
    assert torch.equal(model(x), model.proj(torch.zeros_like(x)))


def test_outlook_attention_of_timm():
    volo = pytest.importorskip("timm.models.volo")
    torch.manual_seed(0)
    model = nn.Sequential(volo.Outlooker(24, 3, 1, 2, 3), volo.Transformer(24, 3)).double().eval()
    x = torch.randn(2, 6, 8, 24, dtype=torch.float64)
    expected = evaluated(model, x)
    assert swap(model).swapped == ["0", "0.attn", "1"]
    equal(evaluated(model, x), expected)


def test_blocks_on_a_grid_take_grids_alone():
    torch.manual_seed(0)
    model = grids.GridBlock(24, grids.GridAttention(24, 3)).eval()
    assert swap(model).swapped == [""]
    with pytest.raises(ValueError, match="not enough values to unpack"):  # the original's error
        model(torch.randn(2, 7, 24))


def test_performer_with_a_skip_of_its_input():
    torch.manual_seed(0)
    model = saliency.InputSkip(24, 24).double().eval()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    expected = evaluated(model, x)
    report = swap(nn.ModuleDict({"skip": model, "plain": reference.Token_performer(24, 24)}))
    assert [row.target for row in report.rows] == ["PerformerBlock", "TokenPerformer"]
    for _ in range(3):  # remembered calls
        equal(evaluated(model, x), expected)
    model.w.data *= 0.5
    model.epsilon = 1e-2
    found = evaluated(model, x)
    unswap(model)
    equal(found, evaluated(model, x))


def test_dropout_of_swapped_modules():
    """The rates are those of the modules; the random numbers are others."""
    torch.manual_seed(0)
    model = saliency.InputSkip(24, 24).train()
    x = torch.randn(2, 400, 24)
    swap(model)
    model.dp.p, model.mlp[3].p = 1.0 - 1e-7, 0.0
    without = model(x)
    model.dp.p = 0.0
    assert not torch.allclose(without, model(x))
    model.dp.p = 1.0
    assert "dp drops everything" in model.obstacle()
    assert torch.equal(model(x), x + model.mlp(model.norm2(x)))


def test_the_innermost_step_of_ptnet_only_splits():
    torch.manual_seed(0)
    model = grids.Down(2, 8, (3, 2, 1)).eval()
    x = torch.randn(2, 2, 12, 10)
    expected = model(x), model(x, attention=False), model(x, False)
    report = swap(model)
    assert report.swapped == ["", "transformer"]
    found = model(x), model(x, attention=False), model(x, False)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
