"""Checkpoints: every file format, other grids, other class counts."""

import argparse
from collections import OrderedDict

import pytest
import torch
from torch import nn

from support import golden
from support.checkpoints import SMALL, TINY, fingerprint, resized_table, same, saved, small, tiny
from t2t_fast import reference
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint
from t2t_fast.interop.swap import swap
from t2t_fast.models import T2TViT, ViT, lanl


def _upstream_training_file(path, state):
    """What upstream's training script saves, including its command line."""
    content = {
        "epoch": 3,
        "arch": "t2t_vit_14",
        "state_dict": state,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
        "args": argparse.Namespace(lr=1e-3, mean=(0.5, 0.5), model="t2t_vit_14"),
        "metric": 81.5,
    }
    return saved(path / "checkpoint.pth.tar", content)


def _safetensors(path, state):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")
    return path / "model.safetensors"


FILES = {
    "bare": lambda path, state: saved(path / "model.pth", state),
    "upstream": _upstream_training_file,
    "model": lambda path, state: saved(path / "model.pt", {"model": state, "epoch": 1}),
    "module": lambda path, state: saved(path / "m.pth", {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    "compiled": lambda path, state: saved(path / "m.pth", {f"module._orig_mod.{k}": v for k, v in state.items()}),
    "ema": lambda path, state: saved(
        path / "m.pth", {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": OrderedDict(state)}
    ),
    "legacy": lambda path, state: saved(
        path / "m.pth.tar", {"state_dict": state}, _use_new_zipfile_serialization=False
    ),
    "safetensors": _safetensors,
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_file_formats(tmp_path, make):
    source, model = tiny(), tiny()
    path = make(tmp_path, source.state_dict())
    report = load_checkpoint(model, path)
    assert same(model, source.state_dict())
    assert report.complete and report.loaded == report.total == len(source.state_dict())
    assert report.resized == report.reinitialised == report.left_out == report.new_modules == ()
    assert str(path) in str(report) and f"{report.total} of {report.total} tensors" in str(report)


def test_averaged_weights_are_preferred_unless_declined(tmp_path):
    source, averaged = tiny(), tiny()
    content = {"state_dict": source.state_dict(), "state_dict_ema": averaged.state_dict()}
    path = saved(tmp_path / "m.pth", content)
    model = tiny()
    assert load_checkpoint(model, path).source == "state_dict_ema"
    assert same(model, averaged.state_dict())
    assert load_checkpoint(model, path, use_ema=False).source == "state_dict"
    assert same(model, source.state_dict())


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("official_tiny_performer_in3", lambda: T2TViT(**{**TINY, "token_dim": 64})),
        ("official_tiny_performer_in3", lambda: reference.T2T_ViT(**{**TINY, "token_dim": 64})),
        ("official_tiny_transformer_in3", lambda: T2TViT(**{**TINY, "token_dim": 64}, tokens_type="transformer")),
        ("mmpretrain_tiny_cls_scale_corrected", lambda: tiny(mlp_ratio=3, num_classes=0, tokens_type="transformer")),
    ],
    ids=["fast", "reference", "transformer", "mmpretrain"],
)
def test_upstream_weights_from_a_file_give_upstream_numbers(tmp_path, name, build):
    case, model = golden.cases()[name], build().double().eval()
    names = {key: key for key in model.state_dict()}
    if case["upstream"] == "mmpretrain":
        names = {key: _mmpretrain_name(key) for key in names}
    state = {theirs: golden.make_weight(case, theirs, model.state_dict()[ours].shape) for ours, theirs in names.items()}
    report = load_checkpoint(model, saved(tmp_path / "m.pth", {"state_dict": state}))
    assert report.layout == ("mmpretrain" if case["upstream"] == "mmpretrain" else "upstream")
    with torch.no_grad():
        out = model(golden.make_input(case))
    torch.testing.assert_close(out, torch.from_numpy(golden.arrays(case)["out"]).double(), rtol=1e-6, atol=1e-6)


def _mmpretrain_name(key):
    key = key.replace("blocks.", "encoder.").replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.")
    return key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")


def test_values_are_copied_into_the_same_parameters(tmp_path):
    source, model = tiny(), tiny()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()))
    assert before == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, source.head.weight)
    assert torch.equal(model.tokens_to_token.attention1.w, source.tokens_to_token.attention1.w)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_cast_to_the_models(tmp_path, kind):
    source, model = tiny(), tiny()
    state = {name: value.to(kind) for name, value in source.state_dict().items()}
    load_checkpoint(model, saved(tmp_path / "m.pth", state))
    assert same(model, {name: value.float() for name, value in state.items()})
    half = tiny().to(kind)
    load_checkpoint(half, saved(tmp_path / "n.pth", source.state_dict()))
    assert same(half, state)


def test_a_swapped_model_takes_the_same_file(tmp_path):
    source, model = reference.T2T_ViT(**TINY).eval(), reference.T2T_ViT(**TINY).eval()
    path = saved(tmp_path / "m.pth", source.state_dict())
    swap(model)
    assert load_checkpoint(model, path).complete
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_through(tmp_path, wrap):
    source, model = tiny(), tiny()
    load_checkpoint(wrap(model), saved(tmp_path / "m.pth", source.state_dict()))
    assert same(model, source.state_dict())


def test_a_load_without_a_new_head_draws_no_random_numbers(tmp_path):
    path = saved(tmp_path / "m.pth", tiny().state_dict())
    model = tiny()
    before = torch.get_rng_state()
    load_checkpoint(model, path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "size"),
    [("official_resize_pos_embed_14_24", 384), ("mmpretrain_resize_pos_embed_4x4_5x6", (80, 96))],
    ids=["14x14 to 24x24", "4x4 to 5x6"],
)
def test_position_tables_are_resized_as_upstream_does(tmp_path, name, size):
    case = golden.cases()[name]
    table = golden.make_input(case)
    model = small(img_size=size).double()
    state = {**model.state_dict(), "pos_embed": table}
    report = load_checkpoint(model, saved(tmp_path / "m.pth", state))
    torch.testing.assert_close(
        model.pos_embed.data, torch.from_numpy(golden.arrays(case)["out"]).double(), rtol=1e-6, atol=1e-6
    )
    side = int((table.shape[1] - 1) ** 0.5)
    assert report.resized == (("pos_embed", (side, side), tuple(model.grid_size)),)
    assert f"pos_embed {side} x {side} -> " in str(report)


TARGETS = {
    "fast": lambda **options: small(**options),
    "distilled": lambda **options: ViT(
        embed_dim=8, depth=1, num_heads=1, num_classes=10, distilled=True, **{"img_size": 64, **options}
    ),
    "lanl": lambda img_size=(64, 64): lanl.T2TViT((3, *img_size), (7, 3, 3), 10, 8, 8, depth=1),
    "lanl reference": lambda img_size=(64, 64): reference.lanl.T2T_ViT((3, *img_size), (7, 3, 3), 10, 8, 8, depth=1),
}


@pytest.mark.parametrize("build", TARGETS.values(), ids=TARGETS)
def test_non_square_targets_and_extra_tokens(tmp_path, build):
    source, model = build(), build(img_size=(32, 96))
    key = next(name for name in source.state_dict() if name.endswith("pos_embed"))
    extra = 2 if "dist_token" in source.state_dict() else 1
    path = saved(tmp_path / "m.pth", source.state_dict())
    grid = None
    if build is TARGETS["lanl reference"]:
        grid, model.vit_backbone.grid_size = (2, 6), None  # the articles' own class does not store its grid
        with pytest.raises(CheckpointError, match=r"the model's position table has 1 \+ 12 entries, .* give grid="):
            load_checkpoint(model, path)
    report = load_checkpoint(model, path, grid=grid)
    assert report.resized == ((key, (4, 4), (2, 6)),)
    expected = resized_table(source.state_dict()[key], (4, 4), (2, 6), extra)
    torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-5, atol=1e-6)
    assert report.loaded == report.total
    if grid is None:
        model.eval()(torch.randn(1, 3, 32, 96))


@pytest.mark.parametrize("swapped", [False, True], ids=["upstream-shaped", "swapped"])
def test_upstream_shaped_targets_are_square(tmp_path, swapped):
    source, model = small(), reference.T2T_ViT(**{**SMALL, "img_size": 96})
    model.grid_size = None  # upstream's own class does not store it
    if swapped:
        swap(model)
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()))
    assert report.resized == (("pos_embed", (4, 4), (6, 6)),)
    torch.testing.assert_close(model.pos_embed.data, resized_table(source.pos_embed.data, (4, 4), (6, 6)))


def test_non_square_sources_need_their_grid(tmp_path):
    source, model = small(img_size=(32, 96)), small()
    path = saved(tmp_path / "m.pth", source.state_dict())
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"the checkpoint's pos_embed has 1 \+ 12 entries, .* give source_grid"):
        load_checkpoint(model, path)
    with pytest.raises(CheckpointError, match=r"source_grid is 3 x 5 = 15, but .* has 1 \+ 12 entries"):
        load_checkpoint(model, path, source_grid=(3, 5))
    with pytest.raises(CheckpointError, match=r"grid is 3 x 5 = 15, but .* has 1 \+ 16 entries"):
        load_checkpoint(model, path, source_grid=(2, 6), grid=(3, 5))
    assert fingerprint(model) == before
    load_checkpoint(model, path, source_grid=(2, 6))
    torch.testing.assert_close(model.pos_embed.data, resized_table(source.pos_embed.data, (2, 6), (4, 4)))


def test_a_grid_of_equal_area_is_resized_only_when_named(tmp_path):
    source, model = small(img_size=(32, 128)), small()
    path = saved(tmp_path / "m.pth", source.state_dict())
    assert load_checkpoint(model, path).resized == ()
    assert torch.equal(model.pos_embed, source.pos_embed)
    assert load_checkpoint(model, path, source_grid=(2, 8)).resized == (("pos_embed", (2, 8), (4, 4)),)
    torch.testing.assert_close(model.pos_embed.data, resized_table(source.pos_embed.data, (2, 8), (4, 4)))


def test_the_models_interpolation_is_used(tmp_path):
    source, model = small(), small(img_size=96)
    model.position_mode = "bilinear"
    load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()))
    torch.testing.assert_close(
        model.pos_embed.data, resized_table(source.pos_embed.data, (4, 4), (6, 6), mode="bilinear")
    )


def test_half_tables_are_resized_in_the_models_precision(tmp_path):
    source, model = small(), small(img_size=96)
    state = {name: value.half() for name, value in source.state_dict().items()}
    load_checkpoint(model, saved(tmp_path / "m.pth", state))
    torch.testing.assert_close(model.pos_embed.data, resized_table(state["pos_embed"].float(), (4, 4), (6, 6)))


def test_a_head_of_another_class_count_is_reinitialised(tmp_path):
    source, model = tiny(), tiny()
    model.head.weight.data.fill_(7.0)
    body = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    path = saved(tmp_path / "m.pth", source.state_dict())
    report = load_checkpoint(model, path, num_classes=4)
    assert model.head.weight.shape == (4, 48) and model.num_classes == 4
    assert 0.01 < model.head.weight.std() < 0.03 and model.head.bias.count_nonzero() == 0
    assert model.head.weight.requires_grad
    assert report.reinitialised == report.left_out == ("head.weight", "head.bias")
    assert report.new_modules == ("head",) and report.complete
    for name, parameter in model.named_parameters():
        if name in body:
            assert parameter is body[name] and torch.equal(parameter, source.state_dict()[name])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    assert "initialised" in str(report) and "new module" in str(report) and "head.bias" in str(report)


def test_the_checkpoints_head_is_kept_where_it_fits(tmp_path):
    source, model = tiny(), tiny(num_classes=4)
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=10)
    assert same(model, source.state_dict()) and model.num_classes == 10
    assert report.new_modules == ("head",) and report.reinitialised == ()


def test_without_a_class_count_the_model_keeps_its_own_with_a_warning(tmp_path):
    source, model = tiny(), tiny(num_classes=4)
    model.head.weight.data.fill_(7.0)
    head = model.head.weight
    with pytest.warns(UserWarning, match=r"another class count, so head\.weight, head\.bias were newly initialised"):
        report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()))
    assert report.reinitialised == ("head.weight", "head.bias") and report.new_modules == ()
    assert model.head.weight is head and head.std() < 0.03 and model.num_classes == 4
    assert torch.equal(model.norm.weight, source.norm.weight)


@pytest.mark.parametrize("has", [10, 0], ids=["with head", "without head"])
def test_no_head_on_request(tmp_path, has):
    source, model = tiny(), tiny(num_classes=has)
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=0)
    assert isinstance(model.head, nn.Identity) and model.num_classes == 0
    assert report.left_out == ("head.weight", "head.bias") and report.complete
    assert report.new_modules == (("head",) if has else ())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 48)


def test_a_headless_model_ignores_the_head_unless_classes_are_given(tmp_path):
    source = tiny()
    path = saved(tmp_path / "m.pth", source.state_dict())
    model = tiny(num_classes=0)
    assert load_checkpoint(model, path).left_out == ("head.weight", "head.bias")
    load_checkpoint(model, path, num_classes=10)
    assert same(model, source.state_dict())


def test_a_headless_checkpoint_needs_a_class_count(tmp_path):
    source, model = tiny(num_classes=0), tiny()
    path = saved(tmp_path / "m.pth", source.state_dict())
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"(?s)missing +2  head\.weight, head\.bias.*give num_classes"):
        load_checkpoint(model, path)
    assert fingerprint(model) == before
    report = load_checkpoint(model, path, num_classes=10)
    assert report.reinitialised == ("head.weight", "head.bias") and report.new_modules == ()


def test_both_heads_of_a_distilled_model(tmp_path):
    source, model = TARGETS["distilled"](), TARGETS["distilled"]()
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=4)
    assert report.new_modules == ("head", "head_dist") and report.complete
    assert model.head_dist.weight.shape == (4, 8)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize("build", [TARGETS["lanl"], TARGETS["lanl reference"]], ids=["fast", "reference"])
def test_the_articles_head_is_inside_the_backbone(tmp_path, build):
    source, model = build(), build()
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=4)
    assert report.new_modules == ("vit_backbone.head",) and model.vit_backbone.head.weight.shape == (4, 8)
    assert report.complete


def test_a_new_head_is_where_the_model_is(tmp_path):
    source, model = tiny(), tiny().half().eval()
    load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()), num_classes=4)
    assert model.head.weight.dtype == torch.float16 and not model.head.training


@pytest.mark.gpu
def test_a_model_on_a_gpu_stays_there(tmp_path):
    source, model = tiny(), tiny().cuda()
    report = load_checkpoint(model, saved(tmp_path / "m.pth", source.cuda().state_dict()), num_classes=4)
    assert report.complete and {p.device.type for p in model.parameters()} == {"cuda"}
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_everything_that_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    state = dict(tiny().state_dict())
    del state["norm.bias"], state["blocks.0.attn.qkv.weight"]
    state["extra.weight"] = torch.ones(3)
    state["blocks.1.mlp.fc1.bias"] = torch.ones(5)
    state["blocks.1.mlp.fc2.bias"] = torch.ones(48, dtype=torch.int8)
    model = tiny()
    before = fingerprint(model)
    path = saved(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path, num_classes=4)
    text = str(error.value)
    assert "missing         2  blocks.0.attn.qkv.weight, norm.bias" in text
    assert "unexpected      1  extra.weight" in text
    assert "blocks.1.mlp.fc1.bias (checkpoint (5,), model (96,))" in text
    assert "blocks.1.mlp.fc2.bias (checkpoint (48,) int8, model (48,))" in text
    assert fingerprint(model) == before and model.num_classes == 10

    left = {name: model.state_dict()[name].clone() for name in ("norm.bias", "blocks.1.mlp.fc1.bias")}
    report = load_checkpoint(model, path, strict=False)
    assert report.missing == ("blocks.0.attn.qkv.weight", "norm.bias") and report.unexpected == ("extra.weight",)
    assert [name for name, *_ in report.mismatched] == ["blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc2.bias"]
    assert not report.complete and report.loaded == report.total - 4
    assert all(torch.equal(model.state_dict()[name], value) for name, value in left.items())
    assert torch.equal(model.cls_token, state["cls_token"])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_a_checkpoint_of_another_architecture(tmp_path, strict):
    resnet = {f"layer{i}.{j}.conv1.weight": torch.ones(4, 4, 3, 3) for i in range(1, 5) for j in range(9)}
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=r"(?s)layer1\.0\.conv1\.weight.*and 16 more.*not one tensor"):
        load_checkpoint(model, saved(tmp_path / "m.pth", {"state_dict": resnet}), strict=strict)
    assert fingerprint(model) == before


def test_a_checkpoint_of_another_width_is_rejected(tmp_path):
    model = tiny()
    before = fingerprint(model)
    path = saved(tmp_path / "m.pth", tiny(embed_dim=24, num_classes=5).state_dict())
    with pytest.raises(CheckpointError, match=r"(?s)pos_embed \(checkpoint \(1, 17, 24\), model \(1, 17, 48\)\)"):
        load_checkpoint(model, path)
    assert fingerprint(model) == before


def test_a_distilled_checkpoint_has_another_table(tmp_path):
    source, model = TARGETS["distilled"](), ViT(img_size=64, embed_dim=8, depth=1, num_heads=1, num_classes=10)
    with pytest.raises(
        CheckpointError, match=r"(?s)dist_token.*pos_embed \(checkpoint \(1, 18, 8\), model \(1, 17, 8\)\)"
    ):
        load_checkpoint(model, saved(tmp_path / "m.pth", source.state_dict()))
