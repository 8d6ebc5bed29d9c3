"""Modules: drop-in shapes and training behaviour, any grid, stages, models by name."""

import pytest
import torch
from torch import nn

import t2t_fast
from t2t_fast import models, reference
from t2t_fast.models.position import resize_position_table, sinusoid_table, square_grid
from t2t_fast.modules import SoftComposition, SoftSplit, T2TModule, TokenPerformer, TokenTransformer

TINY = dict(img_size=64, num_classes=10, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0, token_dim=32)


def test_soft_split_and_composition_modules():
    split = SoftSplit(3, 2, 1)
    x = torch.randn(2, 4, 9, 14)
    tokens, grid = split.forward_with_grid(x)
    assert grid == (5, 7) and tokens.shape == (2, 35, 36) and repr(split) == "SoftSplit(k3 s2 p1)"
    again, grid = split.forward_with_grid(tokens, (5, 7))
    assert grid == (3, 4) and again.shape == (2, 12, 324)
    composition = SoftComposition((9, 14), 3, 2, 1)
    assert composition(tokens).shape == x.shape and "9x14" in repr(composition)


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (50, 33), (16, 112), (7, 7)])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_t2t_module_on_any_image(tokens_type, height, width, batch):
    module = T2TModule(64, tokens_type, embed_dim=24, token_dim=16).eval()
    tokens, grid = module.forward_with_grid(torch.randn(batch, 3, height, width))
    assert grid == module.grid(height, width)
    assert tokens.shape == (batch, grid[0] * grid[1], 24)
    stages = module.forward_stages(torch.randn(1, 3, height, width))
    assert [t.shape[1] for t, _ in stages] == [h * w for _, (h, w) in stages]


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_a_non_square_image_is_not_scrambled(tokens_type):
    """36 x 64 tokens are as many as 48 x 48, so upstream would restore a 48 x 48 grid from them. The second stage must
    split the 36 x 64 grid."""
    module = T2TModule((144, 256), tokens_type, embed_dim=24, token_dim=16).double().eval()
    assert module.grid_size == (9, 16)
    x = torch.randn(1, 3, 144, 256, dtype=torch.float64)
    stages = module.forward_stages(x)
    assert [grid for _, grid in stages] == [(36, 64), (18, 32), (9, 16)]
    image = stages[0][0].transpose(1, 2).reshape(1, 16, 36, 64)
    expected = module.attention2(nn.functional.unfold(image, 3, stride=2, padding=1).transpose(1, 2))
    torch.testing.assert_close(stages[1][0], expected, rtol=1e-9, atol=1e-9)


def test_num_patches_counts_what_the_splits_make():
    assert T2TModule(100).num_patches == 49 and T2TModule(224).num_patches == 196
    assert T2TModule(100, embed_dim=8, token_dim=8)(torch.randn(1, 3, 100, 100)).shape[1] == 49


@pytest.mark.parametrize(
    ("fast", "eager"),
    [
        (TokenPerformer(27, 16), reference.Token_performer(27, 16)),
        (TokenTransformer(27, 16), reference.Token_transformer(27, 16, 1)),
        (TokenPerformer(12, 8, head_cnt=2, kernel_ratio=0.25), reference.Token_performer(12, 8, 2, 0.25)),
    ],
    ids=["performer", "transformer", "performer, two heads"],
)
def test_layers_load_each_other_strictly(fast, eager):
    eager.load_state_dict(fast.state_dict())
    fast.load_state_dict(eager.state_dict())
    x = torch.randn(2, 9, 27 if fast is not None and eager.norm1.weight.numel() == 27 else 12)
    torch.testing.assert_close(fast.eval()(x), eager.eval()(x), rtol=1e-4, atol=1e-5)


def test_performer_dropout_is_on_in_training_as_upstream():
    layer = TokenPerformer(27, 16)
    x = torch.randn(2, 9, 27)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    still = TokenPerformer(27, 16, dp1=0.0, dp2=0.0)
    assert torch.equal(still(x), still(x))


def test_performer_w_is_frozen_and_never_redrawn():
    layer = TokenPerformer(27, 16)
    assert not layer.w.requires_grad
    torch.testing.assert_close(layer.w @ layer.w.T, 8 * torch.eye(8), rtol=0, atol=1e-4)
    before = layer.w.detach().clone()
    layer(torch.randn(2, 9, 27)).sum().backward()
    assert layer.w.grad is None and torch.equal(layer.w, before)
    layer.w.requires_grad_(True)
    layer(torch.randn(2, 9, 27)).sum().backward()
    assert layer.w.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [dict(drop=0.2), dict(drop_path=0.5), dict(attn_drop=0.3)], ids=str)
def test_transformer_layer_options_in_training(options):
    """Random in training, with upstream's mean and deviation; in eval mode equal to upstream."""
    fast, eager = TokenTransformer(27, 16, **options), reference.Token_transformer(27, 16, 1, **options)
    eager.load_state_dict(fast.state_dict())
    x = torch.randn(4, 9, 27)
    outs = torch.stack([fast(x) for _ in range(400)])
    assert outs.std(0).max() > 0
    theirs = torch.stack([eager(x) for _ in range(400)])
    torch.testing.assert_close(outs.mean(0), theirs.mean(0), rtol=0, atol=6 * theirs.std(0).max().item() / 20)
    torch.testing.assert_close(outs.std(0).mean(), theirs.std(0).mean(), rtol=0.1, atol=0)
    torch.testing.assert_close(fast.eval()(x), eager.eval()(x), rtol=1e-4, atol=1e-5)


def test_initialisation_is_upstreams():
    model, eager = models.T2TViT(**TINY), reference.T2T_ViT(**TINY)
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        if ours.ndim < 2 or name == "pos_embed":
            assert torch.equal(ours, theirs), name
        else:
            assert 0.8 < ours.std() / theirs.std() < 1.25, name
    assert model.no_weight_decay() == {"cls_token"}


def test_drop_path_and_dropout_rates_reach_the_blocks():
    model = models.T2TViT(**{**TINY, "depth": 3}, drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0.0, 0.2, 0.4])
    assert all(b.attn.attn_drop.p == 0.3 and b.attn.proj_drop.p == 0.2 and b.mlp.drop.p == 0.2 for b in model.blocks)
    assert model.pos_drop.p == 0.2
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))
    dense = models.T2TViTDense(12, (2, 2), **{k: v for k, v in TINY.items() if k != "depth"}, drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in dense.blocks if hasattr(b, "drop_path")]
    assert rates == pytest.approx([0.0, 0.0, 0.4, 0.4])


@pytest.mark.parametrize("name", t2t_fast.list_models())
def test_every_model_by_name(name):
    """Shapes of logits at two image sizes and of stages, on the meta device; the strides are 4, 8 and 16."""
    with torch.device("meta"):
        model = models.build_model(name, num_classes=7).eval()
        for size in ((224, 224), (96, 160)):
            assert model(torch.empty(2, 3, *size)).shape == (2, 7)
        stages = model.forward_stages(torch.empty(2, 3, 96, 160))
    strides = (4, 8, 16) if name.startswith("t2t") else (16,)
    assert [tuple(s.shape[2:]) for s in stages] == [(96 // n, 160 // n) for n in strides]


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution", "patch"])
@pytest.mark.parametrize("block", ["plain", "se", "dense", "ghost"])
def test_tokeniser_and_block_are_independent(tokens_type, block):
    model = models.T2TViT(
        tokens_type=tokens_type, block=block, growth_rate=12, block_config=(1, 2), **{**TINY, "mlp_ratio": 3.0}
    )
    out = model(torch.randn(2, 3, 64, 96))
    out.sum().backward()
    assert out.shape == (2, 10)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "sinusoid"])
def test_positions_for_another_grid(mode):
    model = models.T2TViT(**TINY)
    model.position_mode = mode
    assert model.positions((4, 4)) is model.pos_embed
    table = model.positions((3, 5))
    assert table.shape == (1, 16, 48)
    if mode == "sinusoid":
        assert torch.equal(table, sinusoid_table(16, 48))
    else:
        assert torch.equal(table, resize_position_table(model.pos_embed, (4, 4), (3, 5), mode=mode))
        assert torch.equal(table[:, :1], model.pos_embed[:, :1])
    assert model(torch.randn(1, 3, 48, 80)).shape == (1, 10)


def test_resizing_keeps_a_constant_table_and_rejects_a_wrong_one():
    table = torch.ones(1, 17, 3)
    torch.testing.assert_close(resize_position_table(table, (4, 4), (7, 2)), torch.ones(1, 15, 3))
    with pytest.raises(ValueError, match="table must have 1 \\+ 5 x 5 entries, got 17"):
        resize_position_table(table, (5, 5), (2, 2))
    assert square_grid(17) == (4, 4)
    with pytest.raises(ValueError, match="no square grid"):
        square_grid(16)


def test_stage_maps_are_the_tokens():
    model = models.T2TViT(**TINY).eval()
    x = torch.randn(2, 3, 64, 96)
    stages = model.forward_stages(x)
    assert [tuple(s.shape) for s in stages] == [(2, 32, 16, 24), (2, 32, 8, 12), (2, 48, 4, 6)]
    tokens = model.tokens_to_token.forward_stages(x)[0][0]
    assert torch.equal(stages[0].flatten(2).transpose(1, 2), tokens)


def test_reset_classifier():
    model = models.T2TViT(**TINY)
    features = model.eval().forward_features(torch.randn(1, 3, 64, 64))
    assert features.shape == (1, 17, 48) and model.get_classifier() is model.head
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity) and model(torch.randn(1, 3, 64, 64)).shape == (1, 48)
    vit = models.ViT(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=5, distilled=True)
    vit.reset_classifier(4)
    assert vit.train()(torch.randn(1, 3, 32, 32))[1].shape == (1, 4)


@pytest.mark.parametrize("size", [(60, 100), (33, 71)])
def test_articles_family_on_any_image(size):
    model = models.lanl.T2TViT((1, 60, 100), (7, 3, 3), token_len=24, token_chan=16, depth=1, preds=3)
    assert model(torch.randn(2, 1, *size)).shape == (2, 3)
    patches = models.lanl.ViTModel((1, 60, 100), 20, token_len=24, depth=1)
    assert patches(torch.randn(2, 1, 40, 120)).shape == (2, 1)
    with pytest.raises(ValueError, match="patch_size 20 must divide the image, got height 50"):
        patches(torch.randn(2, 1, 50, 120))


def test_activation_checkpointing():
    """Masks come from torch's generator, so a recomputed forward draws the same ones."""
    from torch.utils.checkpoint import checkpoint

    module = T2TModule(32, embed_dim=24, token_dim=16)
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    torch.manual_seed(1)
    checkpoint(module, x, use_reentrant=False).square().sum().backward()
    for ours, theirs in zip([p.grad for p in module.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
