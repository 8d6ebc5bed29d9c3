"""Models on uint8 images: the same tokens as for the normalised image, whichever part runs unfused."""

import pytest
import torch

import t2t_fast
from t2t_fast.modules import T2TModule

NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(size=(40, 36)):
    """A uint8 image and its normalised form."""
    x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in NORM)
    return x, (x / 255 - mean) / std


def module(tokens_type):
    torch.manual_seed(0)
    return T2TModule(tokens_type=tokens_type, token_dim=16, embed_dim=24, pixel_norm=NORM).eval()


@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution"])
def test_a_module_reads_bytes(tokens_type, fused):
    t2t, (x, values) = module(tokens_type), image()
    with t2t_fast.backend(fused):
        torch.testing.assert_close(t2t(x), t2t(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
@pytest.mark.parametrize("watched", ["attention1", "attention1.norm1", "soft_split0"])
def test_a_hook_on_a_part_that_reads_bytes(tokens_type, watched):
    t2t, (x, values) = module(tokens_type), image()
    expected, seen = t2t(values), []
    t2t.get_submodule(watched).register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(t2t(x), expected, rtol=1e-4, atol=1e-5)
    assert seen


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(recompute, fused):
    """Every parameter's gradient from a uint8 image equals the one from the normalised image."""
    (x, values), found = image(), []
    for each in (x, values):
        t2t = module("performer")
        t2t.recompute = recompute
        with t2t_fast.backend(fused):
            t2t(each).square().sum().backward()
        found.append({name: p.grad for name, p in t2t.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=2e-3, atol=2e-4 * gradient.abs().max().item())


def test_a_swapped_model_reads_bytes():
    x, values = image((64, 64))
    model = t2t_fast.create_model("t2t_vit_7", img_size=64, num_classes=10).eval()
    model.tokens_to_token.pixel_norm = NORM
    torch.testing.assert_close(model(x), model(values), rtol=1e-3, atol=1e-4)


def test_in_one_compiled_graph():
    t2t, (x, _) = module("performer"), image()
    compiled = torch.compile(t2t, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), t2t(x), rtol=1e-5, atol=1e-6)


def test_bytes_need_a_normalisation():
    t2t, (x, values) = module("performer"), image()
    t2t.pixel_norm = None
    with pytest.raises(ValueError, match="performer_layer: x is an image of uint8, so pixel_norm="):
        t2t(x)
    assert t2t(values).shape == (2, 9, 24)
