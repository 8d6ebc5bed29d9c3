"""Every constructor names the argument that is wrong, before it builds anything."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

from t2t_fast import models
from t2t_fast.models import lanl
from t2t_fast.models.patch import PatchEmbed
from t2t_fast.modules import T2TModule, TokenPerformer, TokenTransformer
from t2t_fast.modules.options import OPTIONS

MODEL = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 2}
T2T = MODEL | {"token_dim": 4}
LANL = {"token_len": 8, "depth": 1}
CLASSES = {
    T2TModule: {"img_size": 32, "embed_dim": 8, "token_dim": 4},
    TokenPerformer: {"dim": 9, "in_dim": 4},
    TokenTransformer: {"dim": 9, "in_dim": 4},
    PatchEmbed: {"img_size": 32, "embed_dim": 8},
    models.T2TViT: T2T,
    models.T2TViTSE: T2T | {"embed_dim": 48},
    models.T2TViTGhost: T2T | {"mlp_ratio": 3.0},
    models.T2TViTDense: T2T | {"embed_dim": 48, "growth_rate": 6, "block_config": (1, 1)},
    models.ViT: MODEL,
    lanl.Attention: {"dim": 9, "chan": 4},
    lanl.NeuralNet: {"in_chan": 4},
    lanl.TokenTransformer: {"dim": 9, "chan": 4, "num_heads": 1},
    lanl.Encoding: {"dim": 4},
    lanl.Tokens2Token: {"img_size": (1, 32, 24), "token_chan": 4, "token_len": 8},
    lanl.PatchTokenization: {"img_size": (1, 32, 24), "patch_size": 8, "token_len": 8},
    lanl.ViTBackbone: LANL,
    lanl.ViTModel: LANL | {"img_size": (1, 32, 24), "patch_size": 8},
    lanl.T2TViT: LANL | {"img_size": (1, 32, 24), "softsplit_kernels": (7, 3, 3), "token_chan": 4},
}
SIZE = {
    0: ValueError,
    -1: ValueError,
    1.5: TypeError,
    "x": TypeError,
    None: TypeError,
    2**40: ValueError,
    True: TypeError,
}
COUNT = {kind: error for kind, error in SIZE.items() if kind != 0}
NUMBER = {"x": TypeError, float("nan"): ValueError, 1j: TypeError, (1.0,): TypeError}
RATIO = {**NUMBER, None: TypeError, -1.0: ValueError, 0: ValueError}
RATE = {**NUMBER, None: TypeError, -0.1: ValueError, 1.5: ValueError}
PAIR = {(224,): TypeError, "224": TypeError, 1.5: TypeError, None: TypeError, 0: ValueError, (32, -1): ValueError}
TRIPLE = {224: TypeError, (32, 32): ValueError, ("1", 2, 3): TypeError, (0, 32, 32): ValueError, None: TypeError}
CHOICE = {"swin": ValueError, None: ValueError, 3: ValueError}
DEPTH_RATE = {**RATE, 1.0: ValueError}
CALLABLE = {3: TypeError, "LayerNorm": TypeError}


def without_none(kinds):
    return {kind: error for kind, error in kinds.items() if kind is not None}


BAD = {
    **dict.fromkeys(("dim", "in_dim", "head_cnt", "num_heads", "in_chans", "embed_dim", "token_dim"), SIZE),
    **dict.fromkeys(("patch_size", "growth_rate", "chan", "in_chan", "token_chan", "token_len", "preds"), SIZE),
    **dict.fromkeys(("hidden_chan", "out_chan"), without_none(SIZE)),
    **dict.fromkeys(("num_classes", "depth"), COUNT),
    "representation_size": without_none(COUNT),
    **dict.fromkeys(("mlp_ratio", "kernel_ratio", "hidden_chan_mul"), RATIO),
    **dict.fromkeys(("T2T_hidden_chan_mul", "Encoding_hidden_chan_mul"), RATIO),
    "qk_scale": NUMBER,
    **dict.fromkeys(("drop_rate", "attn_drop_rate", "dp1", "dp2", "drop", "attn_drop"), RATE),
    **dict.fromkeys(("drop_path", "drop_path_rate"), DEPTH_RATE),
    **dict.fromkeys(("norm_layer", "act_layer"), CALLABLE),
    **dict.fromkeys(("img_size", "grid_size"), PAIR),
    "softsplit_kernels": {**TRIPLE, (7.0, 3, 3): TypeError},
    "block_config": {3: TypeError, (1, "x"): TypeError, (1, -1): ValueError, None: TypeError},
    "windows": {None: ValueError, ((7, 4, 2),): ValueError, (7, 4, 2): ValueError, "abc": ValueError},
    **dict.fromkeys(("tokens_type", "block", "global_pool"), CHOICE),
    "recompute": {"low": TypeError, None: TypeError, 1: TypeError},
    "pixel_norm": {"x": TypeError, ((0.5,) * 2, (0.2,) * 2): ValueError, ((0.5,) * 3, (0.0,) * 3): ValueError},
}
FREE = {"qkv_bias", "distilled"}  # any truth value is accepted


def arguments_of(kind):
    """Names of a constructor's arguments, including those that it passes to its base class."""
    names = {}
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names |= {each.name: None for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return [name for name in names if name not in ("self", *FREE)]


ROWS = [(kind, name) for kind in CLASSES for name in arguments_of(kind)]


@pytest.mark.parametrize(
    ("kind", "name"), ROWS, ids=[f"{kind.__module__}.{kind.__name__} {name}" for kind, name in ROWS]
)
def test_bad_argument(kind, name, monkeypatch):
    def build(*arguments, **options):
        raise AssertionError("something was built")

    for layer in (nn.Linear, nn.Conv2d, nn.LayerNorm):
        monkeypatch.setattr(layer, "__init__", build)
    bad = TRIPLE if name == "img_size" and kind.__module__.startswith(lanl.__name__) else BAD[name]
    for value, error in bad.items():
        with pytest.raises(error, match=rf"^(\w+): {name}\b.* must be ") as caught:
            kind(**{**CLASSES[kind], name: value})
        owner = re.match(r"\w+", str(caught.value))[0]
        in_family = kind.__module__.startswith(lanl.__name__) and hasattr(lanl, owner)
        assert owner == kind.__name__ or in_family, str(caught.value)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_good_arguments(kind):
    """The calls without a bad argument work, also with NumPy's integers and floats."""
    kind(**CLASSES[kind])
    converted = {
        name: np.int64(value) if type(value) is int else np.float64(value) if type(value) is float else value
        for name, value in CLASSES[kind].items()
    }
    kind(**converted)


def test_every_option_is_in_the_table():
    used = {name for _, name in ROWS}
    assert used <= set(BAD)
    assert used >= set(OPTIONS) - {"in_features", "hidden_features", "out_features", "proj_drop", "drop_prob"}


def test_other_calls():
    for call, text in {
        lambda: models.T2TViT(**T2T).reset_classifier(-1): "T2TViT: num_classes must be at least 0, got -1",
        lambda: models.ViT(**MODEL).reset_classifier("x"): "ViT: num_classes must be an int, got 'x'",
        lambda: models.T2TViT(
            **T2T | {"num_heads": 5}
        ): "num_heads must divide embed_dim, got embed_dim=12, num_heads=5",
        lambda: models.build_model("t2t_vit_7", num_classes=-1): "T2TViT: num_classes must be at least 0, got -1",
    }.items():
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_dropout_rate_of_one():
    """nn.Dropout accepts a rate of 1; stochastic depth with a rate of 1 would divide by 0."""
    layer = TokenPerformer(9, 4, dp1=1.0, dp2=1).eval()
    assert layer(torch.randn(1, 5, 9)).isfinite().all()
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1, got 1"):
        TokenTransformer(9, 4, drop_path=1.0)
