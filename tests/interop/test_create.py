"""``create_model``: checkpoints, fine-tuning, bad names and options."""

import pytest
import torch

from support.checkpoints import resized_table, same, saved
from t2t_fast.interop.create import create_model
from t2t_fast.models import T2TViT

SHRUNK = dict(embed_dim=48, depth=2, num_heads=3, token_dim=32, img_size=64)


@pytest.mark.filterwarnings("error")
def test_create_model_with_a_checkpoint(tmp_path):
    source = create_model("t2t_vit_14", num_classes=10, **SHRUNK)
    path = saved(tmp_path / "m.pth", source.state_dict())
    model = create_model("t2t_vit_14", num_classes=10, checkpoint=path, **SHRUNK)
    assert same(model, source.state_dict()) and model.training


def test_create_model_for_fine_tuning(tmp_path):
    source = create_model("t2t_vit_14", **SHRUNK)
    path = saved(tmp_path / "m.pth", {"state_dict_ema": source.state_dict()})
    with pytest.warns(UserWarning, match=r"has no head of 10 classes, so head\.weight, head\.bias are newly") as caught:
        model = create_model("t2t_vit_14", num_classes=10, checkpoint=path, **{**SHRUNK, "img_size": (64, 96)})
    assert len(caught) == 1
    assert model.grid_size == (4, 6) and model.head.weight.shape == (10, 48)
    torch.testing.assert_close(model.pos_embed.data, resized_table(source.pos_embed.data, (4, 4), (4, 6)))
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_create_model_refuses_upstreams_pretrained():
    with pytest.raises(TypeError, match=r"give checkpoint=PATH .* qk_scale"):
        create_model("t2t_vit_7", pretrained=True)
    assert isinstance(create_model("t2t_vit_7", pretrained=False, **SHRUNK), T2TViT)


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("resnet50", {}, ValueError, "name must be one of t2t_vit_7, "),
        ("t2t_vit_7", dict(img_size="224"), TypeError, "img_size must be an int or a pair of ints, got '224'"),
        ("t2t_vit_7", dict(img_size=(224, 0)), ValueError, r"img_size must be at least 1, got \(224, 0\)"),
        ("t2t_vit_7", dict(colour="red"), TypeError, "colour"),
        ("t2t_vit_7", dict(SHRUNK, checkpoint="/nowhere/m.pth"), FileNotFoundError, "there is no file"),
    ],
    ids=["name", "size text", "size zero", "option", "no file"],
)
def test_create_model_errors(name, options, error, text):
    with pytest.raises(error, match=text):
        create_model(name, **options)
