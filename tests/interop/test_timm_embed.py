"""T2TEmbed inside timm's vision transformers."""

from functools import partial

import pytest
import torch
from torch import nn

from t2t_fast.interop.checkpoints import load_checkpoint
from t2t_fast.interop.timm_embed import T2TEmbed
from t2t_fast.modules import T2TModule

SMALL = partial(T2TEmbed, token_dim=32)
VIT = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=10)


def vit(embed_layer=SMALL, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.models.vision_transformer.VisionTransformer(embed_layer=embed_layer, **{**VIT, **options})


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
def test_in_timms_vision_transformer(tokens_type):
    model = vit(partial(SMALL, tokens_type=tokens_type))
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 10)
    out.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    frozen = ["patch_embed.tokens_to_token.attention1.w", "patch_embed.tokens_to_token.attention2.w"]
    assert without == (frozen if tokens_type == "performer" else [])
    assert model.patch_embed.tokens_to_token.project.weight.grad.abs().max() > 0


def test_the_tokens_are_the_t2t_modules():
    embed, module = SMALL(64, embed_dim=48).eval(), T2TModule(64, embed_dim=48, token_dim=32).eval()
    module.load_state_dict({key.removeprefix("tokens_to_token."): v for key, v in embed.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(embed(x), module(x))


def test_as_timms_own_embedding():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    theirs, ours = layers.PatchEmbed(img_size=(64, 96), embed_dim=48), SMALL(img_size=(64, 96), embed_dim=48)
    for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt", "strict_img_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.dynamic_img_pad == theirs.dynamic_img_pad
    for as_scalar in (True, False):
        assert ours.feat_ratio(as_scalar) == theirs.feat_ratio(as_scalar)
    assert ours.dynamic_feat_size((160, 32)) == theirs.dynamic_feat_size((160, 32)) == (10, 2)
    x = torch.randn(2, 3, 64, 96)
    assert ours(x).shape == theirs(x).shape == (2, 24, 48)
    for each in (ours, theirs):
        each.set_input_size(img_size=(32, 64), patch_size=16)
    assert (ours.img_size, ours.grid_size, ours.num_patches) == (theirs.img_size, theirs.grid_size, theirs.num_patches)
    assert ours(x[:, :, :32, :64]).shape == theirs(x[:, :, :32, :64]).shape


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC", "NCL", "NLC"])
def test_output_formats_are_timms(output_fmt):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    tokens = SMALL(img_size=(64, 96), embed_dim=48).eval()
    embed = SMALL(img_size=(64, 96), embed_dim=48, output_fmt=layers.Format(output_fmt)).eval()
    embed.load_state_dict(tokens.state_dict())
    x = torch.randn(2, 3, 64, 96)
    expected = layers.nhwc_to(tokens(x).unflatten(1, (4, 6)), layers.Format(output_fmt))
    assert torch.equal(embed(x), expected)


def test_not_flattened_is_an_image():
    assert SMALL(64, embed_dim=48, flatten=False)(torch.randn(2, 3, 64, 64)).shape == (2, 48, 4, 4)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 52)], ids=str)
def test_any_image_size(size):
    model = vit(dynamic_img_size=True).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)
    grid = model.patch_embed.dynamic_feat_size(size)
    features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert [f.shape for f in features] == [(2, 48, *grid)] * 2


def test_padding_to_multiples_of_the_patch():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True).eval()
    x = torch.randn(2, 3, 70, 50)
    assert model.patch_embed.dynamic_feat_size((70, 50)) == (5, 4)
    padded = nn.functional.pad(x, (0, 14, 0, 10))
    assert torch.equal(model(x), model(padded))


def test_non_square_models_and_set_input_size():
    model = vit(img_size=(64, 96)).eval()
    assert model.pos_embed.shape == (1, 25, 48) and model(torch.randn(1, 3, 64, 96)).shape == (1, 10)
    model.set_input_size((32, 128))
    assert model.pos_embed.shape == (1, 17, 48) and model(torch.randn(1, 3, 32, 128)).shape == (1, 10)


def test_create_model_and_feature_maps():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = dict(img_size=64, depth=2, embed_layer=SMALL)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, pre_norm=True, **options)
    assert model.patch_embed.tokens_to_token.project.bias is None  # timm requests no bias before a pre-norm
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **options)
    assert [f.shape for f in features(torch.randn(1, 3, 64, 64))] == [(1, 192, 4, 4)] * 2
    assert features.feature_info.reduction() == [16, 16]


def test_norm_layer_bias_device_and_dtype():
    embed = SMALL(64, embed_dim=48, norm_layer=nn.LayerNorm, bias=False, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in embed.parameters()} == {torch.float64} and embed.tokens_to_token.project.bias is None
    out = embed.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert out.mean(-1).abs().max() < 1e-10


def test_without_an_image_size():
    embed = SMALL(None, embed_dim=48)
    assert embed.img_size is embed.grid_size is embed.num_patches is None
    assert embed(torch.randn(1, 3, 48, 80)).shape == (1, 15, 48)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(patch_size=14), ValueError, "patch_size must be 16, the product of the soft splits' strides, got 14"),
        (dict(patch_size=(16, 8)), ValueError, r"patch_size must be 16, .* got \(16, 8\)"),
        (dict(patch_size="16"), TypeError, "patch_size must be an int or a pair of ints, got '16'"),
        (dict(img_size=0), ValueError, "img_size must be at least 1, got 0"),
        (dict(output_fmt="BHWC"), ValueError, "output_fmt must be one of NCHW, NHWC, NCL, NLC or None, got 'BHWC'"),
        (dict(tokens_type="swin"), ValueError, "tokens_type must be one of performer"),
        (dict(windows=((7, 4, 2), (3, 2, 1))), ValueError, "windows must be three"),
    ],
    ids=["14", "pair", "text", "size", "format", "tokens", "windows"],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        T2TEmbed(**options)


def test_other_strides_make_another_patch():
    embed = T2TEmbed(32, 8, embed_dim=48, token_dim=32, windows=((7, 2, 3), (3, 2, 1), (3, 2, 1)))
    assert embed.grid_size == (4, 4) and embed(torch.randn(1, 3, 32, 32)).shape == (1, 16, 48)


def test_images_of_another_size_are_refused_when_strict():
    embed = SMALL((64, 96), embed_dim=48)
    with pytest.raises(ValueError, match="strict_img_size the image must be 64 x 96, got 96 x 64"):
        embed(torch.randn(1, 3, 96, 64))
    with pytest.raises(ValueError, match="patch_size must be 16"):
        embed.set_input_size(patch_size=8)
    assert embed.grid_size == (4, 6)


@pytest.mark.parametrize("no_embed_class", [False, True], ids=["table with class", "table without class"])
def test_checkpoints_of_timm_models(tmp_path, no_embed_class):
    source, model = vit(no_embed_class=no_embed_class), vit(img_size=(64, 96), no_embed_class=no_embed_class)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "m.pth")
    report = load_checkpoint(model, tmp_path / "m.pth", num_classes=3)
    assert report.resized == (("pos_embed", (4, 4), (4, 6)),) and report.new_modules == ("head",)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3)
