# ruff: noqa: E501 - the table is easier to read in long lines
"""Bad input: the error names the function, the argument, the expected and the actual value."""

import re

import pytest
import torch

import t2t_fast
from t2t_fast import backends, models
from t2t_fast.functional import (
    fused_fold_unfold,
    performer_attention,
    performer_layer,
    soft_composition,
    soft_split,
    soft_split_linear,
    token_mlp,
)
from t2t_fast.modules import FusedFoldUnfold, SoftComposition, SoftSplit, T2TModule, TokenPerformer, TokenTransformer

IMAGE = torch.randn(2, 3, 16, 16)
TOKENS = torch.randn(2, 16, 4)
WEIGHT = torch.randn(8, 147)
QKV = torch.randn(2, 5, 8)
W = torch.randn(4, 8)
KEEP = torch.ones(2, 5, dtype=torch.bool)
HEADS = QKV.unsqueeze(1)


def mlp(**changes):
    parameters = {
        "proj_weight": torch.randn(8, 8),
        "proj_bias": torch.randn(8),
        "norm_weight": torch.randn(8),
        "norm_bias": torch.randn(8),
        "fc1_weight": torch.randn(12, 8),
        "fc1_bias": torch.randn(12),
        "fc2_weight": torch.randn(8, 12),
        "fc2_bias": torch.randn(8),
    }
    return {**parameters, **changes}


def layer(**changes):
    """``performer_layer`` of stage 1's window on tokens of width 8."""
    given = {"kqv_weight": torch.randn(24, 147), "kqv_bias": None, "w": W, "kernel_size": 7, "stride": 4, "padding": 2}
    end = {name.replace("norm", "norm2"): value for name, value in mlp().items()}
    return performer_layer(IMAGE, **{**given, **end, **changes})


META = torch.empty(8, 147, device="meta")
BAD = {
    "soft_split: not a tensor": (lambda: soft_split([1.0], 3), TypeError, "soft_split: x must be a torch.Tensor, got list"),
    "soft_split: rank": (
        lambda: soft_split(IMAGE[0, 0], 3), ValueError, "soft_split: x must be 3-D or 4-D, got 2-D of shape (16, 16)",
    ),
    "soft_split: integer dtype": (
        lambda: soft_split(IMAGE.int(), 3), ValueError, "x must be one of float32, float64, float16, bfloat16, got int32",
    ),
    "soft_split: tokens without grid": (lambda: soft_split(TOKENS, 3), ValueError, "so grid=(h, w) is needed"),
    "soft_split: grid of an image": (lambda: soft_split(IMAGE, 3, grid=(4, 4)), ValueError, "grid is for tokens (3-D)"),
    "soft_split: wrong grid": (
        lambda: soft_split(TOKENS, 3, grid=(3, 5)), ValueError, "grid 3 x 5 = 15 must count the tokens of x, got 16",
    ),
    "soft_split: window larger than the padded image": (
        lambda: soft_split(IMAGE, 21, 1, 2), ValueError, "the window 21 x 21 must fit into the padded image, got 20 x 20",
    ),
    "soft_split: negative stride": (
        lambda: soft_split(IMAGE, 3, -1), ValueError, "soft_split: stride must be at least 1, got -1",
    ),
    "soft_split: zero kernel": (lambda: soft_split(IMAGE, (3, 0)), ValueError, "kernel_size must be at least 1, got (3, 0)"),
    "soft_split: negative padding": (lambda: soft_split(IMAGE, 3, 1, -2), ValueError, "padding must be at least 0, got -2"),
    "soft_split: stride of the wrong type": (
        lambda: soft_split(IMAGE, 3, 1.5), TypeError, "stride must be an int or a pair of ints, got 1.5",
    ),
    "soft_composition: token count": (
        lambda: soft_composition(torch.randn(1, 5, 9), 8, 3, 2, 1), ValueError, "must have 4 x 4 = 16 tokens",
    ),
    "soft_composition: token width": (
        lambda: soft_composition(torch.randn(1, 16, 10), 8, 3, 2, 1), ValueError, "multiple of the window's 9 pixels, got 10",
    ),
    "fused_fold_unfold: rank": (
        lambda: fused_fold_unfold(IMAGE, 8, 3), ValueError, "fused_fold_unfold: tokens must be 3-D, got 4-D of shape",
    ),
    "fused_fold_unfold: token count": (
        lambda: fused_fold_unfold(torch.randn(1, 5, 9), 8, 3, 2, 1), ValueError,
        "fused_fold_unfold: tokens must have 4 x 4 = 16 tokens for output_size (8, 8) and k3 s2 p1, got 5",
    ),
    "fused_fold_unfold: token width": (
        lambda: fused_fold_unfold(torch.randn(1, 16, 10), 8, 3, 2, 1), ValueError, "multiple of the window's 9 pixels, got 10",
    ),
    "fused_fold_unfold: output_size": (
        lambda: fused_fold_unfold(torch.randn(1, 16, 9), 8.0, 3), TypeError, "output_size must be an int or a pair of ints, got 8.0",
    ),
    "FusedFoldUnfold: no output_size": (
        lambda: FusedFoldUnfold(3)(torch.randn(1, 16, 9)), ValueError, "output_size is needed, at construction or at the call",
    ),
    "FusedFoldUnfold: token count": (
        lambda: FusedFoldUnfold(3, 2, 1)(torch.randn(1, 17, 9), 8), ValueError, "tokens must have 4 x 4 = 16 tokens",
    ),
    "FusedFoldUnfold: output_size": (
        lambda: FusedFoldUnfold(3, output_size=0), ValueError, "FusedFoldUnfold: output_size must be at least 1, got 0",
    ),
    "SoftComposition: output_size": (
        lambda: SoftComposition("8", 3), TypeError, "SoftComposition: output_size must be an int or a pair of ints, got '8'",
    ),
    "soft_split_linear: weight shape": (
        lambda: soft_split_linear(IMAGE, torch.randn(8, 148), None, 7, 4, 2), ValueError,
        "soft_split_linear: weight must have shape (8, 147) ((O, channels * window pixels)), got (8, 148)",
    ),
    "soft_split_linear: weight rank": (
        lambda: soft_split_linear(IMAGE, WEIGHT[0], None, 7, 4, 2), ValueError, "weight must be 2-D, got 1-D",
    ),
    "soft_split_linear: bias shape": (
        lambda: soft_split_linear(IMAGE, WEIGHT, torch.randn(7), 7, 4, 2), ValueError, "bias must have shape (8,)",
    ),
    "soft_split_linear: dtype mix": (
        lambda: soft_split_linear(IMAGE, WEIGHT.double(), None, 7, 4, 2), ValueError,
        "weight must have the dtype of x (torch.float32), got torch.float64",
    ),
    "soft_split_linear: device mix": (
        lambda: soft_split_linear(IMAGE, META, None, 7, 4, 2), ValueError, "weight must be on the device of x (cpu), got meta",
    ),
    "soft_split_linear: norm without eps": (
        lambda: soft_split_linear(IMAGE, WEIGHT, None, 7, 4, 2, norm_weight=torch.ones(147)), ValueError, "need norm_eps",
    ),
    "soft_split_linear: eps": (
        lambda: soft_split_linear(IMAGE, WEIGHT, None, 7, 4, 2, norm_eps=0.0), ValueError, "norm_eps must be above 0, got 0.0",
    ),
    "soft_split_linear: bias of the wrong type": (
        lambda: soft_split_linear(IMAGE, WEIGHT, 1.0, 7, 4, 2), TypeError, "bias must be a torch.Tensor or None, got float",
    ),
    "soft_split_linear: sizes in place of the bias": (
        lambda: soft_split_linear(IMAGE, WEIGHT, 7, 4, 2), TypeError, "bias must be a torch.Tensor or None, got int",
    ),
    "performer_attention: rank": (lambda: performer_attention(W, QKV, QKV, W), ValueError, "q must be 3-D or 4-D, got 2-D"),
    "performer_attention: k shape": (
        lambda: performer_attention(QKV, QKV[:1], QKV, W), ValueError, "k must have shape (2, 5, 8) (batch and width of q)",
    ),
    "performer_attention: v shape": (
        lambda: performer_attention(QKV, QKV, QKV[:, :3], W), ValueError, "v must have shape (2, 5, 8) (batch and tokens of k)",
    ),
    "performer_attention: w shape": (
        lambda: performer_attention(QKV, QKV, QKV, W[:, :5]), ValueError, "w must have shape (4, 8)",
    ),
    "performer_attention: no features": (
        lambda: performer_attention(QKV, QKV, QKV, W[:0]), ValueError, "w must have at least one random feature",
    ),
    "performer_attention: no tokens": (
        lambda: performer_attention(QKV, QKV[:, :0], QKV[:, :0], W), ValueError, "k must have at least one token",
    ),
    "performer_attention: eps": (
        lambda: performer_attention(QKV, QKV, QKV, W, -1e-8), ValueError, "eps must be at least 0, got -1e-08",
    ),
    "performer_attention: dtype mix": (
        lambda: performer_attention(QKV, QKV.half(), QKV, W), ValueError, "k must have the dtype of q",
    ),
    "performer_attention: w dtype": (
        lambda: performer_attention(QKV, QKV, QKV, W.half()), ValueError, "w must be torch.float32, got torch.float16",
    ),
    "performer_attention: key mask of the wrong type": (
        lambda: performer_attention(QKV, QKV, QKV, W, key_mask=[True] * 5), TypeError,
        "performer_attention: key_mask must be a torch.Tensor or None, got list",
    ),
    "performer_attention: key mask dtype": (
        lambda: performer_attention(QKV, QKV, QKV, W, key_mask=torch.ones(2, 5, dtype=torch.int64)), ValueError,
        "performer_attention: key_mask must be one of bool, float32, got int64",
    ),
    "performer_attention: weights in another dtype": (
        lambda: performer_attention(*[QKV.half()] * 3, W, key_mask=KEEP.double()), ValueError,
        "performer_attention: key_mask must be one of bool, float16, float32, got float64",
    ),
    "performer_attention: key mask rank": (
        lambda: performer_attention(QKV, QKV, QKV, W, key_mask=KEEP[0]), ValueError, "key_mask must be 2-D, got 1-D of shape (5,)",
    ),
    "performer_attention: key mask shape": (
        lambda: performer_attention(QKV, QKV[:, :3], QKV[:, :3], W, key_mask=KEEP), ValueError,
        "performer_attention: key_mask must have shape (2, 3) (batch and tokens of k), got (2, 5)",
    ),
    "performer_attention: key mask with a head axis": (
        lambda: performer_attention(QKV, QKV, QKV, W, key_mask=KEEP.unsqueeze(1)), ValueError, "key_mask must be 2-D, got 3-D",
    ),
    "performer_attention: key mask of other heads": (
        lambda: performer_attention(HEADS, HEADS, HEADS, W, key_mask=KEEP.unsqueeze(1).expand(2, 3, 5)), ValueError,
        "key_mask must have shape (2, 1, 5) (batch, heads and tokens of k), got (2, 3, 5)",
    ),
    "performer_attention: features per head without heads": (
        lambda: performer_attention(QKV, QKV, QKV, W.unsqueeze(0)), ValueError, "w must be 2-D, got 3-D of shape (1, 4, 8)",
    ),
    "performer_attention: features of other heads": (
        lambda: performer_attention(HEADS, HEADS, HEADS, W.expand(3, 4, 8)), ValueError,
        "w must have shape (1, 4, 8) (heads of q, random features, token width), got (3, 4, 8)",
    ),
    "performer_attention: v without channels": (
        lambda: performer_attention(QKV, QKV, QKV[..., :0], W), ValueError, "v must have at least one channel, got shape (2, 5, 0)",
    ),
    "performer_attention: causal is no bool": (
        lambda: performer_attention(QKV, QKV, QKV, W, causal=1), TypeError, "causal must be True or False, got 1",
    ),
    "performer_attention: normalize is no bool": (
        lambda: performer_attention(QKV, QKV, QKV, W, normalize="sqrt"), TypeError, "normalize must be True or False, got 'sqrt'",
    ),
    "performer_attention: causal with other tokens": (
        lambda: performer_attention(QKV, QKV[:, :3], QKV[:, :3], W, causal=True), ValueError,
        "performer_attention: causal=True needs q with as many tokens as k, got 5 and 3",
    ),
    "performer_attention: device of the key mask": (
        lambda: performer_attention(QKV, QKV, QKV, W, key_mask=KEEP.to("meta")), ValueError,
        "key_mask must be on the device of q (cpu), got meta",
    ),
    "token_mlp: v shape": (lambda: token_mlp(QKV, QKV[:1], **mlp()), ValueError, "v must have shape (2, 5, 8) (the shape of y)"),
    "token_mlp: fc2 shape": (
        lambda: token_mlp(QKV, QKV, **mlp(fc2_weight=torch.randn(8, 11))), ValueError, "fc2_weight must have shape (8, 12)",
    ),
    "token_mlp: missing weight": (
        lambda: token_mlp(QKV, QKV, **mlp(fc1_weight=None)), TypeError, "fc1_weight must be a torch.Tensor, got NoneType",
    ),
    "token_mlp: probability": (
        lambda: token_mlp(QKV, QKV, **mlp(), mlp_drop=1.0), ValueError, "mlp_drop must be at least 0 and below 1, got 1.0",
    ),
    "token_mlp: seed": (
        lambda: token_mlp(QKV, QKV, **mlp(), mlp_drop=0.1, seed=torch.tensor(1.0)), ValueError, "seed must be one of int64",
    ),
    "token_mlp: device of the seed": (
        lambda: token_mlp(QKV, QKV, **mlp(), mlp_drop=0.1, seed=torch.empty((), dtype=torch.int64, device="meta")), ValueError,
        "seed must be on the device of the tokens (cpu), got meta",
    ),
    "performer_layer: kqv width": (
        lambda: layer(kqv_weight=torch.randn(23, 147)), ValueError,
        "kqv_weight must have shape (24, 147) (3 * width of w, channels * window pixels), got (23, 147)",
    ),
    "performer_layer: norm1 width": (
        lambda: layer(norm1_weight=torch.ones(9)), ValueError, "norm1_weight must have shape (147,)",
    ),
    "performer_layer: norm1 eps": (lambda: layer(norm1_eps=0.0), ValueError, "norm1_eps must be above 0, got 0.0"),
    "performer_layer: mlp": (
        lambda: layer(proj_weight=torch.randn(8, 9)), ValueError, "performer_layer: proj_weight must have shape (8, 8)",
    ),
    "SoftSplit: stride": (lambda: SoftSplit(3, 0), ValueError, "SoftSplit: stride must be at least 1, got 0"),
    "TokenPerformer: no features": (
        lambda: TokenPerformer(9, 4, kernel_ratio=0.1), ValueError, "must be at least 1, got in_dim=4, head_cnt=1, kernel_ratio=0.1",
    ),
    "TokenTransformer: heads": (lambda: TokenTransformer(9, 4, num_heads=2), ValueError, "num_heads must be 1"),
    "T2TModule: tokens_type": (
        lambda: T2TModule(tokens_type="swin"), ValueError, "must be one of performer, transformer, convolution, got 'swin'",
    ),
    "T2TModule: windows": (lambda: T2TModule(windows=[(7, 4, 2)]), ValueError, "windows must be three"),
    "T2TViT: block": (lambda: models.T2TViT(block="conv"), ValueError, "block must be one of plain, se, ghost, dense"),
    "T2TViT: heads": (lambda: models.T2TViT(embed_dim=10, num_heads=3), ValueError, "num_heads must divide embed_dim"),
    "T2TViTGhost: mlp_ratio": (
        lambda: models.T2TViTGhost(embed_dim=12, num_heads=3, mlp_ratio=2.0, depth=1), ValueError, "mlp_ratio must be 3",
    ),
    "ViT: patch": (lambda: models.ViT(img_size=100), ValueError, "patch_size 16 must divide the image, got height 100"),
    "build_model: name": (lambda: models.build_model("t2t_vit_15"), ValueError, "name must be one of t2t_vit_7"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_error_text(name):
    call, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(text)):
        call()


SPLITS = [name for name in BAD if name.partition(":")[0] in ("soft_split", "soft_composition", "fused_fold_unfold")]


@pytest.mark.parametrize("backend", backends.ORDER)
@pytest.mark.parametrize("name", SPLITS)
def test_every_backend_gives_the_same_error(name, backend):
    """The same type and text, even for a backend that cannot run here: arguments are checked before it is selected."""
    call, error, _ = BAD[name]
    texts = []
    for chosen in ("auto", backend):
        with t2t_fast.backend(chosen), pytest.raises(error) as caught:
            call()
        texts.append((caught.type, str(caught.value)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("backend", backends.ORDER)
def test_checks_come_before_the_choice_given_as_an_argument(backend):
    with pytest.raises(ValueError, match="the window 21 x 21 must fit"):
        soft_split(IMAGE, 21, backend=backend)
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 147\)"):
        soft_split_linear(IMAGE, torch.randn(8, 148), None, 7, 4, 2, backend=backend)
