"""``import t2t_fast.timm``: the models in timm's registry, under the checks that timm makes of its own models."""

import argparse
import importlib
import io
import math
import warnings

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo, get_notrace_modules, get_pretrained_cfg, model_entrypoint, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models import feature_extraction

import t2t_fast.timm
from support.checkpoints import resized_table, saved
from t2t_fast import CheckpointError, list_models

plugin = importlib.import_module("t2t_fast.timm")

NAMES = timm.list_models("t2t_*")
SMALL = dict(img_size=64, embed_dim=48, depth=2, num_heads=3)
T2T = dict(SMALL, token_dim=16)
GROWING = dict(growth_rate=12, block_config=(1, 2))
KINDS = {
    "t2t_vit_7": T2T,
    "t2t_vit_t_14": T2T,
    "t2t_vit_c_14": T2T,
    "t2t_vit_14_se": T2T,
    "t2t_vit_16_ghost": T2T,
    "t2t_vit_dense": {**{k: v for k, v in T2T.items() if k != "depth"}, **GROWING},
    "t2t_paper_vit_small_patch16_224": SMALL,
    "t2t_paper_vit_dense_patch16_224": {**SMALL, **GROWING},
    "t2t_paper_vit_deit_tiny_distilled_patch16_224": SMALL,
}
LEARNED_POSITIONS = [name for name in KINDS if "paper" in name]


def small(name="t2t_vit_7", **options):
    return timm.create_model(name, **{**KINDS[name], **options})


ALIKE = ("t2t_vit_c_14", "t2t_vit_16_ghost", "t2t_vit_14_se", "t2t_paper_vit_dense_patch16_224")
every_kind = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in KINDS]
)


def test_registered_names_are_those_of_list_models():
    assert set(NAMES) == {name if name.startswith("t2t") else f"t2t_paper_{name}" for name in list_models()}
    assert timm.list_pretrained("t2t_*") == [
        "t2t_vit_7.yitu_in1k",
        "t2t_vit_10.yitu_in1k",
        "t2t_vit_12.yitu_in1k",
        "t2t_vit_14.yitu_in1k",
        "t2t_vit_14.yitu_in1k_384",
        "t2t_vit_19.yitu_in1k",
        "t2t_vit_24.yitu_in1k",
        "t2t_vit_t_14.yitu_in1k",
        "t2t_vit_t_19.yitu_in1k",
        "t2t_vit_t_24.yitu_in1k",
    ]
    assert t2t_fast.timm.t2t_vit_7 is model_entrypoint("t2t_vit_7") and "t2t_vit_7" in t2t_fast.timm.__all__


def test_no_name_of_timm_is_replaced():
    for name in list_models():
        if timm.is_model(name) and not name.startswith("t2t_"):
            assert model_entrypoint(name).__module__.startswith("timm.models"), name
    before = model_entrypoint("t2t_vit_7")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin._register()
    text = "t2t_fast.timm: timm already has a model t2t_vit_7, which stays; t2t_fast.create_model makes the one"
    assert len(caught) == len(NAMES) and any(str(each.message).startswith(text) for each in caught)
    assert model_entrypoint("t2t_vit_7") is before


QUICK = ("t2t_vit_7", "t2t_paper_vit_dense_patch16_224")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_every_model_and_its_pyramid(name):
    """On the meta device: logits at two sizes, default features with the channels and strides that timm is told."""
    model = timm.create_model(name, num_classes=7, device="meta")
    features = timm.create_model(name, features_only=True, device="meta")
    assert model.pretrained_cfg["architecture"] == name and model.default_cfg is model.pretrained_cfg
    for size in ((224, 224), (96, 160)):
        x = torch.empty(2, 3, *size, device="meta")
        assert model.eval()(x).shape == (2, 7)
        maps, info = features(x), features.feature_info
        assert len(maps) == 3
        for found, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
            assert found.shape == (2, channels, size[0] // stride, size[1] // stride)
    assert info.reduction() == ([16, 16, 16] if "paper" in name else [4, 8, 16])


@every_kind
def test_names_of_first_layer_and_classifier(name):
    model = small(name)
    state, cfg = model.state_dict(), model.default_cfg
    assert f"{cfg['first_conv']}.weight" in state
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert all(f"{classifier}.weight" in state for classifier in classifiers)
    assert model.num_classes == 1000 and model.num_features > 0 and model.head_hidden_size > 0
    data = resolve_model_data_config(model)
    assert (data["mean"], data["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (data["crop_pct"], data["interpolation"], data["input_size"]) == (0.9, "bicubic", (3, 224, 224))


@every_kind
def test_forward_with_and_without_checkpointing(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 64, 64)
    out = model(x)
    assert out.shape == (1, 1000) and out.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), out)


@every_kind
def test_backward_reaches_every_trained_parameter(name):
    model = small(name, num_classes=42, drop_rate=0.0, drop_path_rate=0.1, drop_block_rate=None, global_pool=None)
    model.train()(torch.randn(2, 3, 64, 64)).mean().backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    expected = set() if name in LEARNED_POSITIONS else {"pos_embed"}
    if "performer" in str(type(getattr(getattr(model, "tokens_to_token", None), "attention1", ""))).lower():
        expected |= {"tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert frozen == expected == {n for n, p in model.named_parameters() if not p.requires_grad}


@every_kind
def test_features_head_and_classifier(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_prefix_tokens + 16, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == pooled.shape
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert small(name, num_classes=0).eval()(x).shape == (1, model.num_features)
    assert small(name, num_classes=0, global_pool="").eval()(x).shape == features.shape


@every_kind
def test_intermediates(name):
    model = small(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = torch.randn(1, 3, 96, 64)
    output, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert len(maps) == len(info.channels())
    for channels, stride, found in zip(info.channels(), info.reduction(), maps, strict=True):
        assert found.shape == (1, channels, math.ceil(96 / stride), math.ceil(64 / stride)) and found.isfinite().all()
    torch.testing.assert_close(output, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], output)


@pytest.mark.parametrize("out_indices", [(0, 1, -1), (-1,), (0, 2), 2, (0, 1)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
def test_out_indices(out_indices, norm):
    torch.manual_seed(0)
    model = small(img_size=64).eval()
    torch.manual_seed(0)
    features = small(features_only=True, out_indices=out_indices, feature_cfg={"norm": norm}).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 70, 100)
    expected = model.forward_intermediates(x, out_indices, norm=norm, intermediates_only=True)
    found = features(x)
    assert features.feature_info.channels() == [m.shape[1] for m in found]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sizes_in_arguments():
    model = small(img_size=(64, 96), in_chans=5, num_classes=3, dynamic_img_size=True, dtype=torch.float64)
    assert model.grid_size == (4, 6) and model.in_chans == 5 and model.head.weight.dtype == torch.float64
    model.set_input_size((32, 64))
    assert model._traits["img_size"] == model._model_args["img_size"] == (32, 64)
    assert model.eval()(torch.randn(1, 5, 50, 40, dtype=torch.float64)).shape == (1, 3)
    assert small(dynamic_img_size=False).eval()(torch.randn(1, 3, 50, 40)).shape[0] == 1
    with pytest.raises(TypeError, match=r"t2t_vit_7: dynamic_img_size must be True or False, got 'yes'"):
        small(dynamic_img_size="yes")
    with pytest.raises(TypeError, match="colour"):
        small(colour="red")


@every_kind
def test_layer_decay_grows_with_depth(name):
    model = small(name, num_classes=5)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scales.keys() == {id(p) for p in named.values() if p.requires_grad}
    depth = len(model.blocks)
    for key, parameter in named.items():
        if parameter.requires_grad:
            part, _, rest = key.partition(".")
            layer = {"blocks": int(rest.partition(".")[0]) + 1 if part == "blocks" else 0, "norm": depth}.get(
                part, depth + 1 if part.startswith("head") else 0
            )
            assert scales[id(parameter)] == 0.5 ** (depth + 1 - layer), key
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.cls_token) in undecayed


def released(tmp_path, model, name="m.pth.tar", **entries):
    """A file as upstream's training script writes it."""
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    noise = {key: torch.randn_like(value) for key, value in state.items()}
    content = dict(epoch=3, arch="t2t", args=argparse.Namespace(lr=0.1), state_dict=noise, state_dict_ema=state)
    return saved(tmp_path / name, {**content, **entries})


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "t2t_paper_vit_small_patch16_224"])
@pytest.mark.parametrize("source", ["file", "url"])
def test_released_files_load_through_timm(tmp_path, name, source):
    original = small(name).eval()
    path = released(tmp_path, original)
    overlay = {"file": str(path)} if source == "file" else {"url": path.as_uri()}
    model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache").eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), original(x))
    assert torch.equal(small(name, checkpoint_path=path).eval()(x), original(x))


def test_another_size_and_another_number_of_classes(tmp_path):
    original = small()
    overlay = dict(file=str(released(tmp_path, original)))
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, img_size=(64, 96), num_classes=3)
    expected = resized_table(original.pos_embed.data, (4, 4), (4, 6))
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, original.blocks[1].mlp.fc1.weight)
    assert model.head.weight.shape == (3, 48) and model.head.weight.std() > 0
    features = small(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(0, 2))
    assert torch.equal(features.model.blocks[0].attn.qkv.weight, original.blocks[0].attn.qkv.weight)
    assert len(features.model.blocks) == 1
    assert small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0).num_classes == 0


def test_fine_tuned_files_with_their_own_number_of_classes(tmp_path):
    original = small(num_classes=10)
    file = str(released(tmp_path, original))
    overlay = dict(file=file, num_classes=10)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert torch.equal(model.head.weight, original.head.weight)
    again = small(pretrained=True, pretrained_cfg_overlay=dict(file=file, num_classes=-1), num_classes=10)
    assert not torch.equal(again.head.weight, original.head.weight)  # timm's request for a new head
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        small(pretrained=True, pretrained_cfg_overlay=dict(file=file), num_classes=1000)


def test_files_for_non_square_images(tmp_path):
    original = small(img_size=(48, 64))
    overlay = dict(file=str(released(tmp_path, original)), input_size=(3, 48, 64))
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, img_size=64)
    torch.testing.assert_close(model.pos_embed.data, resized_table(original.pos_embed.data, (3, 4), (4, 4)))


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "t2t_vit_c_14", "t2t_paper_vit_small_patch16_224"])
def test_other_numbers_of_channels(tmp_path, name):
    """One channel: equal to the original on a grey image. Six: equal on an image that is repeated."""
    original = small(name).eval()
    overlay = dict(file=str(released(tmp_path, original)))
    x = torch.randn(1, 1, 64, 64)
    expected = original(x.expand(-1, 3, -1, -1))
    for channels in (1, 6):
        model = small(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels).eval()
        torch.testing.assert_close(model(x.expand(-1, channels, -1, -1)), expected, rtol=1e-3, atol=1e-4)


def test_the_384_pixel_model_is_made_for_its_size():
    model = timm.create_model("t2t_vit_14.yitu_in1k_384", device="meta")
    assert model.grid_size == (24, 24) and model.pretrained_cfg["input_size"] == (3, 384, 384)
    assert get_pretrained_cfg("t2t_vit_14").input_size == (3, 224, 224)


def test_a_model_folder_of_timm(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    original = small(num_classes=5, img_size=(48, 64)).eval()
    save_for_hf(original, tmp_path)
    x = torch.randn(1, 3, 48, 64)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert model.grid_size == (3, 4) and torch.equal(model(x), original(x))
    resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
    torch.testing.assert_close(resized.pos_embed.data, resized_table(original.pos_embed.data, (3, 4), (4, 4)))


def test_files_that_do_not_fit(tmp_path):
    file = str(released(tmp_path, small(depth=1)))
    with pytest.raises(CheckpointError, match=r"does not fit the model\n *missing.*blocks\.1\."):
        small(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    foreign = str(saved(tmp_path / "other.pth", nn.Linear(2, 2).state_dict()))
    with pytest.raises(CheckpointError, match="not one tensor of it belongs to this model"):
        small(pretrained=True, pretrained_cfg_overlay=dict(file=foreign))


def test_weights_that_cannot_be_read(tmp_path):
    """The errors say how to load a local file."""
    remedy = (
        r"give a local file: pretrained=True, pretrained_cfg_overlay=dict\(file=PATH\); files are at https://github"
    )
    with pytest.raises(RuntimeError, match=rf"t2t_vit_14_se: .* no weights of this model were published; {remedy}"):
        small("t2t_vit_14_se", pretrained=True)
    missing = str(tmp_path / "missing.pth.tar")
    with pytest.raises(RuntimeError, match=rf"t2t_vit_7: pretrained=True could not read {missing} .*; {remedy}"):
        small(pretrained=True, pretrained_cfg_overlay=dict(file=missing))
    closed = "http://127.0.0.1:9/71.7_T2T_ViT_7.pth.tar"
    with pytest.raises(RuntimeError, match=rf"could not read {closed} \(URLError: .*; {remedy}"):
        small(pretrained=True, pretrained_cfg_overlay=dict(url=closed), cache_dir=tmp_path)


def test_scripts_run_with_the_models_registered(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys, timm\nprint(__name__, sys.argv[1:], timm.is_model('t2t_vit_7'))\n")
    monkeypatch.setattr("sys.argv", ["t2t_fast.timm"])
    plugin._main([str(script), "--model", "x"])
    assert capsys.readouterr().out == "__main__ ['--model', 'x'] True\n"
    with pytest.raises(SystemExit, match=r"usage: python -m t2t_fast\.timm SCRIPT"):
        plugin._main([])


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_dense", "t2t_paper_vit_deit_tiny_distilled_patch16_224"])
def test_torch_fx_traces_the_models(name):
    """Tokeniser and blocks are single nodes; timm's feature extractor by torch.fx returns the outputs of blocks."""
    model = small(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    tracer = feature_extraction.NodePathTracer(leaf_modules=get_notrace_modules())
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    assert torch.equal(traced(x), model(x))
    features = small(name, features_only=True, feature_cls="fx", out_indices=(-2, -1)).eval()
    assert [tuple(f.shape) for f in features(x)] == [
        (2, model.num_prefix_tokens + 16, info["num_chs"]) for info in model.feature_info[-2:]
    ]


def test_models_are_copied_and_saved():
    model = small(num_classes=3).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
