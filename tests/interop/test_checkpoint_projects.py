"""Checkpoints of other projects, in their models and in ours, give the numbers of the code that trained them."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import t2t_fast
from support import golden, mmpretrain_model, vit_pytorch
from support.checkpoints import TINY, exact_state, paddle_file, same, saved, tiny
from t2t_fast import reference
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint

MMPRETRAIN = dict(TINY, mlp_ratio=3, num_classes=0, tokens_type="transformer")


def swapped(**options):
    model = reference.T2T_ViT(**options)
    t2t_fast.swap(model)
    return model


OURS = {"fast": t2t_fast.T2TViT, "reference": reference.T2T_ViT, "swapped": swapped}


def golden_state(case, model):
    return {key: golden.make_weight(case, key, value.shape) for key, value in model.state_dict().items()}


def check_golden(case, model):
    with torch.no_grad():
        out = model.double().eval()(golden.make_input(case))
    expected = torch.from_numpy(golden.arrays(case)["out"]).double()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", OURS.values(), ids=OURS)
@pytest.mark.parametrize("trained_with", ["mmpretrain", None])
def test_weights_of_mmpretrain_in_our_models(tmp_path, build, trained_with):
    """Weights that mmpretrain 1.2 trained, and weights that it publishes, which upstream's code trained."""
    case = golden.cases()[f"mmpretrain_tiny_cls_{'asis' if trained_with else 'scale_corrected'}"]
    path = saved(tmp_path / "m.pth", {"state_dict": golden_state(case, mmpretrain_model.T2TViT())})
    model = build(**MMPRETRAIN).double()
    report = load_checkpoint(model, path, trained_with=trained_with)
    check_golden(case, model)
    assert report.layout == "mmpretrain" and report.complete
    factors = dict(report.rescaled)
    if trained_with is None:
        assert not factors and "if mmpretrain 1.2 trained them, give trained_with='mmpretrain'" in str(report)
    else:
        assert factors["blocks.1.attn.qkv.weight"] == pytest.approx(48 // 3)
        assert factors["tokens_to_token.attention1.attn.qkv.weight"] == pytest.approx((32 * 147) ** 0.5)
        assert len(factors) == 4 and "rescaled" in str(report) and "note" not in str(report)


@pytest.mark.parametrize("trained_with", ["mmpretrain", None])
def test_weights_of_mmpretrain_in_its_own_model(tmp_path, trained_with):
    case, model = golden.cases()["mmpretrain_tiny_cls_asis"], mmpretrain_model.T2TViT()
    state = golden_state(case, model)
    report = load_checkpoint(model, saved(tmp_path / "m.pth", {"state_dict": state}), trained_with=trained_with)
    assert same(model, state) and report.rescaled == () and report.notes == () and report.prefix == ("", "")
    check_golden(case, model)


def test_a_classifier_of_mmpretrain(tmp_path):
    """Its backbone has a prefix and its head another name; every tensor loads, into their model and into ours."""
    source = mmpretrain_model.Classifier()
    path = saved(tmp_path / "m.pth", {"state_dict": source.state_dict(), "meta": {"epoch": 3}})
    theirs, ours = mmpretrain_model.Classifier(), tiny(mlp_ratio=3, tokens_type="transformer")
    assert load_checkpoint(theirs, path).complete and same(theirs, source.state_dict())
    report = load_checkpoint(ours, path, trained_with="mmpretrain")
    assert report.complete and report.prefix == ("backbone.", "")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)
    backbone = mmpretrain_model.T2TViT()
    assert load_checkpoint(backbone, path, strict=False).unexpected == (
        "head.layers.head.weight",
        "head.layers.head.bias",
    )
    assert same(backbone, source.backbone.state_dict())
    headless = tiny(mlp_ratio=3, tokens_type="transformer", num_classes=0)
    assert load_checkpoint(headless, path).left_out == ("head.weight", "head.bias")


def test_upstreams_weights_in_mmpretrains_model():
    source, model = tiny(mlp_ratio=3, tokens_type="transformer", num_classes=0), mmpretrain_model.T2TViT()
    report = load_checkpoint(model, source.state_dict())
    assert report.complete and "divides by its scale" in str(report)
    assert torch.equal(model.encoder[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_query_biases_are_rescaled_too():
    state = {"qkv.weight": torch.ones(12, 4), "qkv.bias": torch.ones(12)}
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.qkv, model.attn.num_heads, model.attn.scale = nn.Linear(4, 12), 2, 0.5
    factor = 2**0.5 / 0.5
    load_checkpoint(model, {f"attn.{name}": value for name, value in state.items()}, trained_with="mmpretrain")
    for value in model.state_dict().values():
        torch.testing.assert_close(value[:4], torch.full_like(value[:4], factor))
        assert (value[4:] == 1).all()
    before = exact_state(model)
    del model.attn.scale
    with pytest.raises(CheckpointError, match=r"needs an attention with num_heads and scale around attn\.qkv\.weight"):
        load_checkpoint(model, model.state_dict(), trained_with="mmpretrain")
    assert exact_state(model) == before


@pytest.mark.parametrize("family", ["fast", "reference"])
@pytest.mark.parametrize("name", ["small", "small_gray_mean"])
def test_weights_of_vit_pytorch_in_its_model(tmp_path, name, family):
    case = golden.cases()[f"vitpytorch_t2tvit_{name}"]
    model = vit_pytorch.T2TViT(family, **case["kwargs"])
    path = saved(tmp_path / "m.pth", {f"module.{k}": v for k, v in golden_state(case, model).items()})
    assert load_checkpoint(model, path).layout == "vit-pytorch"
    check_golden(case, model)


def test_vit_pytorchs_table_and_head(tmp_path):
    options = dict(dim=48, depth=1, heads=3, mlp_dim=96, dim_head=16)
    source = vit_pytorch.T2TViT("fast", image_size=64, num_classes=10, **options)
    model = vit_pytorch.T2TViT("fast", image_size=96, num_classes=10, **options)
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=4)
    assert report.new_modules == ("mlp_head",) and report.resized == (("pos_embedding", (4, 4), (6, 6)),)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 4)


@pytest.mark.parametrize("project", ["vit-pytorch", "lanl"])
def test_other_networks_do_not_fit_ours(tmp_path, project):
    models = {
        "vit-pytorch": lambda: vit_pytorch.T2TViT(
            "fast", image_size=64, num_classes=10, dim=48, depth=2, heads=3, mlp_dim=96
        ),
        "lanl": lambda: t2t_fast.models.lanl.T2TViT((3, 64, 64), (7, 3, 3), 10, 48, 32, depth=2),
    }
    state, model = models[project]().state_dict(), tiny(tokens_type="transformer")
    before = exact_state(model)
    with pytest.raises(CheckpointError, match=f"it is a checkpoint of {project}'s network"):
        load_checkpoint(model, saved(tmp_path / "m.pth", state))
    assert exact_state(model) == before


def paddlevit(name):
    return name.replace("tokens_to_token.attention", "patch_embed.attn").replace(
        "tokens_to_token.project", "patch_embed.proj"
    )


@pytest.mark.parametrize("rename", [paddlevit, lambda name: name], ids=["PaddleViT", "upstream"])
@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_paddles_parameters(tmp_path, protocol, tokens_type, rename):
    options = dict(TINY, tokens_type=tokens_type, mlp_ratio=1)  # square matrices too, and a square head
    source, model = t2t_fast.T2TViT(**options), t2t_fast.T2TViT(**options)
    (tmp_path / "m.pdparams").write_bytes(paddle_file(source.state_dict(), protocol, rename))
    report = load_checkpoint(model, tmp_path / "m.pdparams")
    assert same(model, source.state_dict()) and report.complete
    assert report.layout == ("paddle" if rename is paddlevit else "upstream")
    assert report.ignored == ("StructuredToParameterName@@",)
    assert ("eps 1e-6" in str(report)) == (rename is paddlevit)


def test_paddles_arrays_without_name_table_and_in_other_orders(tmp_path):
    source, model = tiny(), tiny()
    arrays = pickle.loads(paddle_file(source.state_dict()))
    del arrays["StructuredToParameterName@@"]
    arrays["norm.bias"] = ("layer_norm_0.b_0", arrays["norm.bias"])
    arrays["norm.weight"] = arrays["norm.weight"].astype(">f4")
    arrays["head.weight"] = np.asfortranarray(arrays["head.weight"])
    path = tmp_path / "m.pdparams"
    path.write_bytes(pickle.dumps({"model": arrays, "epoch": 3}, 4))
    assert load_checkpoint(model, path).source == "model"
    assert same(model, source.state_dict())


def test_paddles_bfloat16(tmp_path):
    source, model = tiny().bfloat16(), tiny()
    bits = {name: value.view(torch.int16) for name, value in source.state_dict().items()}
    arrays = {name: array.view(np.uint16) for name, array in pickle.loads(paddle_file(bits)).items() if name in bits}
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps(arrays, 4))
    load_checkpoint(model, tmp_path / "m.pdparams")
    assert same(model, {name: value.float() for name, value in source.state_dict().items()})


def test_paddles_parameters_with_another_head_and_grid(tmp_path):
    source, model = tiny(num_classes=48), tiny(img_size=96)  # the head is square
    (tmp_path / "m.pdparams").write_bytes(paddle_file(source.state_dict(), rename=paddlevit))
    report = load_checkpoint(model, tmp_path / "m.pdparams", num_classes=5)
    assert report.new_modules == ("head",) and report.resized == (("pos_embed", (4, 4), (6, 6)),)
    load_checkpoint(model, tmp_path / "m.pdparams", num_classes=48)
    assert torch.equal(model.head.weight, source.head.weight)


def timm_model(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    embed = partial(t2t_fast.T2TEmbed, token_dim=32)
    options = (
        dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=10, mlp_ratio=2, qkv_bias=False) | options
    )
    norm = partial(nn.LayerNorm, eps=1e-5)
    return timm.models.vision_transformer.VisionTransformer(embed_layer=embed, norm_layer=norm, **options)


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_timm_models_with_our_embedding(tmp_path, prefix):
    """Upstream's weights load into a timm model with the same logits, and from there back into our model."""
    source, model, back = tiny().eval(), timm_model().eval(), tiny().eval()
    path = saved(tmp_path / "m.pth", {"state_dict": {prefix + name: v for name, v in source.state_dict().items()}})
    assert load_checkpoint(model, path).complete
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
    load_checkpoint(back, saved(tmp_path / "n.pth", {prefix + name: v for name, v in model.state_dict().items()}))
    assert same(back, source.state_dict())
    twin = timm_model()
    assert load_checkpoint(twin, tmp_path / "n.pth").complete and same(twin, model.state_dict())
