"""Methods of the models that timm's tools call, without timm: intermediates, pooling, heads, sizes, checkpointing."""

import copy

import pytest
import torch
from torch import nn

from support.checkpoints import TINY, resized_table
from t2t_fast import models, reference

DENSE = dict(
    img_size=64, embed_dim=48, num_heads=3, mlp_ratio=2, token_dim=32, growth_rate=12, block_config=(1, 2)
)  # widths: 60, 30 (transition), 42, 54
PLAIN = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=10)


def t2t(**options):
    return models.T2TViT(**{**TINY, **options}).eval()


def dense(**options):
    return models.T2TViTDense(**{**DENSE, **options}).eval()


def vit(**options):
    return models.ViT(**{**PLAIN, **options}).eval()


IMAGE = torch.randn(2, 3, 64, 96)
BUILDERS = {"t2t": t2t, "dense": dense, "vit": vit, "distilled": lambda **o: vit(distilled=True, **o)}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_intermediates_are_those_of_feature_info(build):
    model = build()
    features, maps = model.forward_intermediates(IMAGE)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        stride = info["reduction"]
        assert found.shape == (2, info["num_chs"], 64 // stride, 96 // stride), info
        assert info["module"].rpartition(".")[0] and model.get_submodule(info["module"]) is not None
    torch.testing.assert_close(features, model.forward_features(IMAGE))
    assert features.shape == (2, model.num_prefix_tokens + 24, model.num_features)


def test_numbers_of_intermediates():
    model = t2t()
    x = model.tokens_to_token.forward_stages(IMAGE)
    _, maps = model.forward_intermediates(IMAGE, output_fmt="NLC")
    assert torch.equal(maps[0], x[0][0]) and torch.equal(maps[1], x[1][0])
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    _, maps = model.forward_intermediates(IMAGE, output_fmt="NLC")
    assert torch.equal(maps[2], seen[0][:, 1:])
    last = model.forward_stages(IMAGE)[-1]
    torch.testing.assert_close(model.forward_intermediates(IMAGE, (-1,), norm=True, intermediates_only=True)[0], last)


@pytest.mark.parametrize(
    ("indices", "expected"), [(None, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), ((0, 1, -1), [0, 1, 3]), ([3, 0], [3, 0])]
)
def test_indices(indices, expected):
    model = t2t()
    maps = model.forward_intermediates(IMAGE, intermediates_only=True)
    found = model.forward_intermediates(IMAGE, indices, intermediates_only=True)
    assert len(found) == len(expected)
    for ours, index in zip(found, expected, strict=True):
        assert torch.equal(ours, maps[index])


def test_prefix_tokens_and_dict():
    model = vit(distilled=True)
    _, pairs = model.forward_intermediates(IMAGE, return_prefix_tokens=True, output_fmt="NLC")
    assert [(a.shape, b.shape) for a, b in pairs] == [((2, 24, 48), (2, 2, 48))] * 2
    found = model.forward_intermediates(IMAGE, return_prefix_tokens=True, output_fmt="NLC", output_dict=True)
    assert set(found) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    whole = torch.cat([found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]], dim=1)
    torch.testing.assert_close(model.norm(whole), found["image_features"])
    assert set(model.forward_intermediates(IMAGE, output_dict=True, intermediates_only=True)) == {"image_intermediates"}
    pairs = t2t().forward_intermediates(IMAGE, (0, -1), return_prefix_tokens=True, intermediates_only=True)
    assert [prefix.shape for _, prefix in pairs] == [(2, 0, 32), (2, 1, 48)]


def test_early_stop_runs_no_later_block():
    model = t2t()
    model.blocks[1].register_forward_hook(lambda *_: pytest.fail("the block behind the last intermediate ran"))
    options = dict(stop_early=True, intermediates_only=True)
    assert [m.shape[1] for m in model.forward_intermediates(IMAGE, (0, 2), **options)] == [32, 48]
    model.blocks[0].register_forward_hook(lambda *_: pytest.fail("a block ran"))
    assert [m.shape[2] for m in model.forward_intermediates(IMAGE, (0, 1), **options)] == [16, 8]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(indices=0), ValueError, "indices must be from 1 to 6 if it is one number, got 0"),
        (dict(indices=7), ValueError, "indices must be from 1 to 6 if it is one number, got 7"),
        (dict(indices=(0, 6)), ValueError, "indices must be from -6 to 5, got 6"),
        (dict(indices=()), TypeError, r"indices must be an int, a sequence of ints or None, got \(\)"),
        (dict(indices="01"), TypeError, "indices must be an int, a sequence of ints or None, got '01'"),
        (dict(output_fmt="NHWC"), ValueError, "output_fmt must be one of NCHW, NLC, got 'NHWC'"),
        (dict(norm=True), ValueError, r"norm must be False for blocks\.0 \(index 2\), which has 60 channels; .* 54"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=f"T2TViTDense.forward_intermediates: {text}"):
        dense().forward_intermediates(IMAGE, **options)


@pytest.mark.parametrize(
    ("build", "indices", "blocks"), [(t2t, (0, 1, 2), 1), (t2t, (0, 1), 0), (dense, (-2,), 3), (vit, 1, 2)]
)
def test_pruning_keeps_the_intermediates(build, indices, blocks):
    model = build()
    expected = model.forward_intermediates(IMAGE, indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    assert len(model.blocks) == blocks and isinstance(model.norm, nn.Identity) and isinstance(model.head, nn.Identity)
    found = model.forward_intermediates(IMAGE, taken, intermediates_only=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"norm must be False, since the model's norm was pruned|from 1 to"):
        model.forward_intermediates(IMAGE, 1 if blocks else 4, norm=True)


def test_pruning_removes_the_tanh_layer_with_the_head():
    model = vit(representation_size=20)
    assert model.num_features == 48 and model.head_hidden_size == 20
    assert model.forward_head(model.forward_features(IMAGE), pre_logits=True).shape == (2, 20)
    model.reset_classifier(0)
    assert model(IMAGE).shape == (2, 20)
    model.prune_intermediate_layers(1)
    assert isinstance(model.pre_logits, nn.Identity) and model.head_hidden_size == 48


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_heads_and_pooling(build):
    model = build(num_classes=7)
    tokens = model.forward_features(IMAGE)
    torch.testing.assert_close(model.forward_head(tokens), model(IMAGE))
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(IMAGE), pooled)
    model.reset_classifier(3, "")
    assert model.head.training is False and model(IMAGE).shape == (2, tokens.shape[1], 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(IMAGE), tokens)


@pytest.mark.parametrize("build", [t2t, dense, vit])
def test_average_pooling_leaves_the_class_token_out(build):
    model = build(global_pool="avg", num_classes=0)
    torch.testing.assert_close(model(IMAGE), model.forward_features(IMAGE)[:, 1:].mean(1))


def test_distilled_training_is_upstreams_unless_it_is_turned_off():
    model = vit(distilled=True).train()
    first, second = model.get_classifier()
    assert first is model.head and second is model.head_dist
    assert [y.shape for y in model(IMAGE)] == [(2, 10)] * 2
    model.set_distilled_training(False)
    torch.testing.assert_close(model(IMAGE), model.eval()(IMAGE))
    with pytest.raises(ValueError, match=r"ViT: global_pool must be 'token' or '' with distilled, .* got 'avg'"):
        vit(distilled=True, global_pool="avg")
    with pytest.raises(ValueError, match="ViT: global_pool must be 'token' or ''"):
        model.reset_classifier(5, "avg")
    assert model.num_classes == 10


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: t2t(global_pool="max"), ValueError, "T2TViT: global_pool must be one of token, avg, , got 'max'"),
        (lambda: t2t().reset_classifier(3, "map"), ValueError, "T2TViT: global_pool must be one of"),
        (lambda: t2t().set_grad_checkpointing("yes"), TypeError, "set_grad_checkpointing: enable must be"),
        (lambda: t2t().set_input_size(0), ValueError, "set_input_size: img_size must be at least 1, got 0"),
        (lambda: t2t().set_input_size(64, 8), ValueError, "set_input_size: patch_size must stay 16 x 16, got 8"),
        (lambda: vit().set_input_size(60), ValueError, "patch_size 16 must divide the image, got height 60, width 60"),
        (lambda: models.build_model("t2t_vit_7", dtype="half"), ValueError, "dtype must be one of float32, .* 'half'"),
    ],
)
def test_other_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("build", [t2t, dense, vit, lambda: reference.T2T_ViT(**TINY)], ids=[*"tdv", "reference"])
def test_checkpointing_repeats_the_blocks_and_changes_no_gradient(build):
    model = build().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    runs, gradients = [], []
    other.blocks[0].register_forward_pre_hook(lambda *_: runs.append(None))
    for each in (model, other):
        torch.manual_seed(3)
        each(IMAGE[:, :, :, :64]).square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    assert len(runs) == 2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    runs.clear()
    with torch.no_grad():
        other(IMAGE[:, :, :, :64])
    other.set_grad_checkpointing(False)
    other(IMAGE[:, :, :, :64]).sum().backward()
    assert len(runs) == 2


def test_checkpointing_draws_the_same_dropout_masks():
    gradients = []
    model = t2t(drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3, depth=3).train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(7)
        _, maps = model.forward_intermediates(IMAGE, (0, -1))
        sum(m.square().sum() for m in maps).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("build", [t2t, vit])
def test_input_size(build):
    model = build()
    table, trained = model.pos_embed.detach().clone(), model.pos_embed.requires_grad
    expected = model(IMAGE)
    model.set_input_size(patch_size=16)
    assert torch.equal(model.pos_embed, table)
    model.set_input_size((64, 96))
    assert model.grid_size == model.tokeniser.grid_size == (4, 6) and model.tokeniser.num_patches == 24
    assert model.pos_embed.requires_grad is trained and "pos_embed" in dict(model.named_parameters())
    torch.testing.assert_close(model.pos_embed.data, resized_table(table, (4, 4), (4, 6)))
    assert model.positions((4, 6)) is model.pos_embed
    torch.testing.assert_close(model(IMAGE), expected)


def test_input_sizes_that_the_stride_does_not_divide():
    model = t2t()
    model.set_input_size((70, 100))
    assert model.grid_size == (5, 7)
    maps = model.forward_intermediates(torch.randn(1, 3, 70, 100), (0, 1, -1), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (5, 7)]


def test_patches_instead_of_a_t2t_module_have_no_stages_before_the_blocks():
    model = t2t(tokens_type="patch")
    assert [info["module"] for info in model.feature_info] == ["blocks.0", "blocks.1"]
    assert [m.shape for m in model.forward_intermediates(IMAGE, intermediates_only=True)] == [(2, 48, 4, 6)] * 2


def test_device_and_dtype():
    model = models.build_model("t2t_vit_14", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
