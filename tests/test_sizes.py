"""What counts as a size: any integer that ``F.unfold`` takes, and the sizes that tracers make, which stay free."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from t2t_fast.functional import fused_fold_unfold, soft_composition, soft_split, soft_split_linear, window
from t2t_fast.models.patch import PatchEmbed
from t2t_fast.modules import FusedFoldUnfold, SoftComposition, SoftSplit, T2TModule


class Three:
    def __index__(self):
        return 3


SIZES = {
    "int": 3,
    "NumPy int64": np.int64(3),
    "NumPy uint8": np.uint8(3),
    "0-d array": np.array(3),
    "0-d tensor": torch.tensor(3),
    "0-d tensor of bytes": torch.tensor(3, dtype=torch.uint8),
    "index": Three(),
    "list": [3, 3],
    "torch.Size": torch.Size([3, 3]),
    "array": np.array([3, 3], dtype=np.int32),
    "tensor": torch.tensor([3, 3]),
    "mixed": (np.int64(3), torch.tensor(3)),
}
NO_SIZES = {
    "bool": True,
    "NumPy bool": np.True_,
    "bool tensor": torch.tensor(True),
    "pair with bool": (True, 3),
    "float": 3.0,
    "NumPy float": np.float64(3),
    "float tensor": torch.tensor(3.0),
    "array of floats": np.array([3.0, 3.0]),
    "str": "3",
    "None": None,
    "one": (3,),
    "three": (3, 3, 3),
    "nested": ((3, 3), 3),
}
IMAGE = torch.randn(2, 3, 9, 9)
TOKENS = torch.randn(2, 9, 4)


@pytest.mark.parametrize("name", SIZES)
def test_integers_are_sizes(name):
    size = SIZES[name]
    expected = F.unfold(IMAGE, 3, stride=3, padding=3)
    assert torch.equal(soft_split(IMAGE, size, size, size).mT, expected)
    assert soft_split(TOKENS, 1, grid=size).shape == TOKENS.shape
    tokens = expected.mT
    assert soft_composition(tokens, 9, size, size, size).shape == IMAGE.shape
    assert fused_fold_unfold(torch.randn(1, 1, 9), size, size).shape == (1, 1, 9)
    sizes = [
        *window(size, size, size),
        *SoftSplit(size, size, size).window,
        SoftComposition(size, 1).output_size,
        FusedFoldUnfold(1, output_size=size).output_size,
        T2TModule(size, token_dim=4, embed_dim=4).img_size,
        PatchEmbed(size, 3, embed_dim=4).img_size,
    ]
    assert sizes == [(3, 3)] * len(sizes) and all(type(n) is int for pair in sizes for n in pair)


@pytest.mark.parametrize("name", NO_SIZES)
def test_nothing_else_is_a_size(name):
    value = NO_SIZES[name]
    with pytest.raises((TypeError, RuntimeError)):
        F.unfold(IMAGE, value)
    for argument, call in {
        "kernel_size": lambda: soft_split(IMAGE, value),
        "stride": lambda: SoftSplit(3, value),
        "padding": lambda: window(3, 1, value),
        "grid": lambda: soft_split(TOKENS, 1, grid="" if value is None else value),  # no grid is another error
        "output_size": lambda: soft_composition(TOKENS, value, 1),
        "img_size": lambda: T2TModule(value),
    }.items():
        with pytest.raises(TypeError, match=rf"\w+: {argument} must be an int or a pair of ints, got "):
            call()


WEIGHT = torch.randn(4, 27)
PROGRAMS = {
    "soft_split": lambda x, backend: soft_split(x, 3, 2, 1, backend=backend),
    "soft_composition": lambda x, backend: soft_composition(_tokens(x), x.shape[2:], 3, 2, 1, backend=backend),
    "fused_fold_unfold": lambda x, backend: fused_fold_unfold(_tokens(x), x.shape[2:], 3, 2, 1, backend=backend),
    "soft_split_linear": lambda x, backend: soft_split_linear(
        x, WEIGHT.to(x), None, 3, 2, 1, norm_eps=1e-5, backend=backend
    ),
    "grid": lambda x, backend: soft_split(x.flatten(2).mT, 3, 2, 1, grid=x.shape[2:], backend=backend),
}
over_programs = pytest.mark.parametrize("name", PROGRAMS)
over_backends = pytest.mark.parametrize("backend", ["aten", "reference"])


def _tokens(x):
    return F.unfold(x, 3, stride=2, padding=1).mT


class Program(torch.nn.Module):
    def __init__(self, name, backend):
        super().__init__()
        self.name, self.backend = name, backend

    def forward(self, x):
        return PROGRAMS[self.name](x, self.backend)


def _check_free(program, name, backend):
    """The program, made with a 16 x 20 image, gives the numbers of a 31 x 9 one."""
    x = torch.randn(1, 3, 31, 9)
    torch.testing.assert_close(program(x), PROGRAMS[name](x, backend))


@over_backends
@over_programs
def test_jit_trace_keeps_free_sizes_without_a_warning(name, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(Program(name, backend), torch.randn(1, 3, 16, 20), check_trace=False)
    _check_free(program, name, backend)


@over_backends
@over_programs
def test_symbolic_make_fx_keeps_free_sizes(name, backend):
    program = make_fx(Program(name, backend), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    _check_free(program(torch.randn(1, 3, 16, 20)), name, backend)


@over_backends
@over_programs
def test_export_keeps_free_sizes(name, backend):
    free = {2: Dim("height", min=4), 3: Dim("width", min=4)}
    _check_free(
        export(Program(name, backend), (torch.randn(1, 3, 16, 20),), dynamic_shapes=[free]).module(), name, backend
    )
