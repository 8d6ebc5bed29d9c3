"""Every public function refuses every kind of bad argument with the same exception and message for all backends.

Two tables: valid calls by function, and bad values by kind of argument. The message begins with the function's name and
names the argument.
"""

import re
import warnings

import numpy as np
import pytest
import torch

import t2t_fast
from t2t_fast import functional
from t2t_fast.config import BACKENDS
from t2t_fast.models import T2TViT, lanl
from t2t_fast.modules import (
    Fold,
    FusedFoldUnfold,
    SoftComposition,
    SoftSplit,
    T2TModule,
    TokenPerformer,
    TokenTransformer,
    Unfold,
)
from t2t_fast.testing import token_mlp_parameters, transformer_block_parameters

GENERATOR = torch.Generator().manual_seed(0)
WINDOW = {"kernel_size": 3, "stride": 2, "padding": 1}
NORM = {"norm_weight": torch.ones(27), "norm_bias": torch.zeros(27)}
IMAGE = torch.randn(2, 3, 8, 8)
BYTES = IMAGE.to(torch.uint8)
PIXEL_NORM = ((0.5,) * 3, (0.2,) * 3)
TOKENS = torch.randn(2, 16, 27)
QKV = {name: torch.randn(2, 5, 8) for name in ("q", "k", "v")}
DROP = {"proj_drop": 0.1, "mlp_drop": 0.1, "seed": torch.tensor(1)}
TOKEN_MLP = {**token_mlp_parameters(GENERATOR, 8, 12), "norm_eps": 1e-5, **DROP}
LAYER = {
    "kqv_weight": torch.randn(24, 27), "kqv_bias": torch.randn(24), "w": torch.randn(4, 8), **WINDOW, "eps": 1e-8,
    **{name.replace("norm", "norm1"): value for name, value in NORM.items()}, "norm1_eps": 1e-5,
    **{name.replace("norm", "norm2"): value for name, value in TOKEN_MLP.items()},
}  # fmt: skip
BLOCK = transformer_block_parameters(GENERATOR, 8, 12)
BLOCK_NORM = {"norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "norm_eps": 1e-5}
CALLS = {
    "window": WINDOW,
    "image_values": {"x": BYTES, "pixel_norm": PIXEL_NORM, "dtype": torch.float32},
    "soft_split": {"x": IMAGE, **WINDOW},
    "soft_split of tokens": {"x": IMAGE.flatten(2).mT, **WINDOW, "grid": (8, 8)},
    "soft_composition": {"tokens": TOKENS, "output_size": (8, 8), **WINDOW},
    "fused_fold_unfold": {"tokens": TOKENS, "output_size": (8, 8), **WINDOW},
    "soft_split_linear": {
        "x": IMAGE, "weight": torch.randn(5, 27), "bias": torch.randn(5), **WINDOW, **NORM, "norm_eps": 1e-5,
    },
    "soft_split_linear of bytes": {
        "x": BYTES, "weight": torch.randn(5, 27), **WINDOW, "pixel_norm": PIXEL_NORM,
    },
    "performer_attention": {**QKV, "w": torch.randn(4, 8), "eps": 1e-8, "key_mask": torch.ones(2, 5, dtype=torch.bool)},
    "performer_attention of heads": {
        **{name: torch.randn(2, 3, 5, 8) for name in QKV}, "w": torch.randn(3, 4, 8), "key_mask": torch.ones(2, 3, 5),
        "causal": True, "normalize": True,
    },
    "token_mlp": {"y": QKV["q"], "v": QKV["v"], **TOKEN_MLP},
    "performer_layer": {"x": IMAGE, **LAYER, "recompute": False},
    "add_layer_norm": {
        "x": QKV["q"], "branch": QKV["k"], **BLOCK_NORM, "drop": 0.1, "drop_path": 0.1, "seed": torch.tensor(1),
    },
    "layer_norm_linear": {"x": QKV["q"], **BLOCK_NORM, "weight": torch.randn(5, 8), "bias": torch.randn(5)},
    "layer_norm_mlp": {
        "x": QKV["q"], "branch": QKV["k"], **BLOCK_NORM,
        **{name: value for name, value in TOKEN_MLP.items() if name.startswith("fc")},
        **dict.fromkeys(("branch_drop", "branch_path", "hidden_drop", "drop", "drop_path"), 0.1),
        "residual": True, "recompute": False, "seed": torch.tensor(1),
    },
    "transformer_block": {
        "x": QKV["q"], **BLOCK, "heads": 2, "scale": 0.5, "norm1_eps": 1e-5, "norm2_eps": 1e-5, "drop_path1": 0.1,
        "drop_path2": 0.1, "seed": torch.tensor(1),
    },
    "performer_layer of bytes": {"x": BYTES, **LAYER, "pixel_norm": PIXEL_NORM},
}  # fmt: skip


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns that some of them are in beta or deprecated
    KINDS_OF_TENSOR = {
        "list": [1.0],
        "array": np.ones((2, 3), np.float32),
        "str": "x",
        "sparse COO": torch.eye(3).to_sparse(),
        "sparse CSR": torch.eye(3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8),
        "mkldnn": torch.ones(2, 3).to_mkldnn(),
    }
SPOILT = {
    "complex": lambda t: t.to(torch.complex64),
    "int32": lambda t: t.to(torch.int32),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "another dtype": lambda t: t.to(torch.float64),
    "rank + 1": lambda t: t[None],
    "rank + 2": lambda t: t[None, None],
    "0-d": lambda t: t.flatten()[0].clone() if t.ndim else t[None],
    "one longer": lambda t: torch.cat([t, t.narrow(-1, 0, 1)], -1) if t.ndim else t.expand(2),
    "empty": lambda t: t.narrow(-1, 0, 0) if t.ndim else t.expand(0),
    "meta": lambda t: t.to("meta"),
}
OPTIONAL = {
    "bias", "norm_weight", "norm_bias", "kqv_bias", "proj_bias", "fc1_bias", "fc2_bias", "norm1_weight", "norm1_bias",
    "norm2_weight", "norm2_bias", "key_mask", "seed", "norm_eps", "pixel_norm",
    "branch", "qkv_bias", "scale",
}  # fmt: skip
SIZES = {
    "float": 1.5, "NaN": float("nan"), "str": "3", "None": None, "three": (1, 2, 3), "bool": True, "-1": -1,
    "negative in a pair": (3, -1), "too large": 2**31, "2**61": 2**61, "2**70": 2**70,
    "float tensor": torch.tensor(3.0),
}  # fmt: skip
NUMBERS = {
    "str": "1e-5", "NaN": float("nan"), "NumPy NaN": np.float64("nan"), "-1": -1.0, "complex": 1e-5j, "list": [1e-5],
    "tensor": torch.ones(1), "None": None,
}  # fmt: skip
BOOLS = {"str": "low", "None": None, "int": 1}
PROBABILITIES = NUMBERS | {"1": 1.0, "2": 2}
OPTIONS = {
    **dict.fromkeys(("kernel_size", "stride", "padding", "output_size", "grid"), SIZES),
    **dict.fromkeys(("eps", "norm_eps", "norm1_eps", "norm2_eps"), NUMBERS),
    "heads": SIZES | {"no divisor": 3},
    "scale": {kind: value for kind, value in NUMBERS.items() if kind != "-1"},
    **dict.fromkeys(("proj_drop", "mlp_drop", "drop", "drop_path", "drop_path1", "drop_path2"), PROBABILITIES),
    **dict.fromkeys(("branch_drop", "branch_path", "hidden_drop"), PROBABILITIES),
    **dict.fromkeys(("residual", "recompute", "causal", "normalize"), BOOLS),
    "backend": {"str": "cuda", "None": None, "int": 1},
    "pixel_norm": {
        "str": "x", "number": 0.5, "one": ((0.5,) * 3,), "None": None, "too long": ((0.5,) * 4, (0.2,) * 4),
        "str inside": (("x",) * 3, (0.2,) * 3), "None inside": ((None,) * 3, (0.2,) * 3),
        "std 0": ((0.5,) * 3, (0.0,) * 3),
        "NaN": ((float("nan"),) * 3, (0.2,) * 3), "std NaN": ((0.5,) * 3, (float("nan"),) * 3),
    },
}  # fmt: skip
# kinds that are valid or not depending on another argument, which the message may name
RELATIONS = ("another dtype", "rank + 1", "one longer", "empty", "meta")
# valid calls: the dtype, size or device agrees with the other arguments
RIGHT = {
    *((name, kind) for name in ("x", "tokens", "input") for kind in ("another dtype", "one longer", "meta")),
    ("weight", "another dtype"),
    ("v", "one longer"),
}


def bad_values(name, value):
    """Kind -> a bad value of an argument."""
    if isinstance(value, torch.Tensor):
        kinds = {**KINDS_OF_TENSOR, **{kind: spoil(value) for kind, spoil in SPOILT.items()}}
        return kinds if name in OPTIONAL else {**kinds, "None": None}
    return {kind: bad for kind, bad in OPTIONS[name].items() if not (bad is None and name in OPTIONAL)}


def refusal(call, backend):
    """The exception's type and text, or ``None``; ``BackendUnavailable`` means that the arguments were accepted."""
    with t2t_fast.backend(backend):
        try:
            call()
        except t2t_fast.errors.BackendUnavailable:
            return None
        except Exception as error:  # noqa: BLE001 - the test checks its type
            return type(error), str(error)
    return None


def check_refusals(owner, name, value, call, *, others=(), right=()):
    """Every backend refuses ``call(bad)`` in the same way for each bad value, except for the ``right`` kinds."""
    for kind, bad in bad_values(name, value).items():
        found = {backend: refusal(lambda bad=bad: call(bad), backend) for backend in BACKENDS}
        first = found["auto"]
        if first is None and ((name, kind) in RIGHT or kind in right):
            continue
        assert set(found.values()) == {first}, (kind, found)
        assert first is not None, f"{kind}: accepted"
        error, text = first
        assert error in (TypeError, ValueError), (kind, first)
        named = [name, "x", "tokens", *(others if kind in RELATIONS else ())]
        assert re.match(rf"{owner}: .*\b({'|'.join(named)})\b", text, re.DOTALL), (kind, text)


ROWS = [
    (call, name)
    for call, arguments in CALLS.items()
    for name in (*arguments, *(() if call in ("window", "image_values") else ("backend",)))
    if name != "dtype"
]


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("call", "name"), ROWS, ids=[" ".join(row) for row in ROWS])
def test_functions(call, name, autocast):
    owner, arguments = call.split()[0], CALLS[call]
    function = getattr(functional, owner)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        function(**arguments)
        check_refusals(
            owner,
            name,
            arguments.get(name, "auto"),
            lambda bad: function(**{**arguments, name: bad}),
            others=arguments,
            right=("another dtype", "empty")[: 2 if call == "image_values" else int(autocast)],
        )


def test_every_function_is_in_the_table():
    assert {call.split()[0] for call in CALLS} == set(functional.__all__) - {"clear_weight_cache"}


MODULES = {
    "SoftSplit": (SoftSplit(3, 2, 1), "x", IMAGE, "soft_split"),
    "SoftComposition": (SoftComposition(8, 3, 2, 1), "tokens", TOKENS, "soft_composition"),
    "FusedFoldUnfold": (
        FusedFoldUnfold(3, 2, 1, output_size=8),
        "tokens",
        TOKENS,
        "(FusedFoldUnfold|fused_fold_unfold)",
    ),
    "Unfold": (Unfold(3, stride=2, padding=1), "input", IMAGE, "(Unfold|soft_split)"),
    "TokenPerformer": (TokenPerformer(27, 8).eval(), "x", TOKENS, "(TokenPerformer|performer_layer)"),
    "TokenTransformer": (TokenTransformer(27, 8).eval(), "x", TOKENS, "(TokenTransformer|soft_split_linear)"),
    "T2TModule": (T2TModule(8, embed_dim=8, token_dim=4).eval(), "x", IMAGE, "(T2TModule|performer_layer)"),
    "T2TViT": (
        T2TViT(8, embed_dim=12, depth=1, num_heads=3, token_dim=4).eval(),
        "x",
        IMAGE,
        "(T2TModule|performer_layer)",
    ),
    "Tokens2Token": (
        lanl.Tokens2Token((3, 8, 8), token_chan=4, token_len=8).eval(),
        "x",
        IMAGE,
        "(Tokens2Token|soft_split_linear)",
    ),
    "Fold": (Fold(8, 3, stride=2, padding=1), "input", TOKENS.mT, "(Fold|soft_composition)"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module, argument, value, owner = MODULES[name]
    module(value)
    check_refusals(owner, argument, value, module, others=("weight", "kqv_weight"))


@pytest.mark.parametrize("convert", [np.float64, np.float32, torch.tensor, np.float16], ids=lambda each: each.__name__)
def test_numbers_of_other_types(convert):
    """Every type that PyTorch's own functions accept as a float is accepted."""
    torch.nn.functional.layer_norm(IMAGE, (8,), eps=convert(0.25))
    options = {"norm1_eps": 0.25, "norm2_eps": 0.25, "eps": 0.25, "proj_drop": 0.25, "mlp_drop": 0.5}
    arguments = {"x": IMAGE, **LAYER}
    expected = functional.performer_layer(**arguments | options)
    found = functional.performer_layer(**arguments | {name: convert(value) for name, value in options.items()})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor], ids=lambda each: each.__name__)
def test_pixel_norm_of_other_types(convert):
    expected = functional.image_values(BYTES, PIXEL_NORM, torch.float64)
    found = functional.image_values(BYTES, convert(PIXEL_NORM), torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
