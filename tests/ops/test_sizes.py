"""Valid sizes: any integer that ``F.unfold`` accepts, and the sizes in traced programs, which stay dynamic."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

from t2t_fast import _extension
from t2t_fast.functional import (
    fused_fold_unfold,
    soft_composition,
    soft_split,
    soft_split_linear,
    transformer_block,
    window,
)
from t2t_fast.models.patch import PatchEmbed
from t2t_fast.modules import FusedFoldUnfold, SoftComposition, SoftSplit, T2TModule
from t2t_fast.testing import transformer_block_parameters


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
    assert SoftSplit(1).forward_with_grid(TOKENS, grid=size)[1] == (3, 3)
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
def test_other_values_raise(name):
    value = NO_SIZES[name]
    with pytest.raises((TypeError, RuntimeError)):
        F.unfold(IMAGE, value)
    for argument, call in {
        "kernel_size": lambda: soft_split(IMAGE, value),
        "stride": lambda: SoftSplit(3, value),
        "padding": lambda: window(3, 1, value),
        "grid": lambda: soft_split(TOKENS, 1, grid="" if value is None else value),  # None is another error
        "output_size": lambda: soft_composition(TOKENS, value, 1),
        "img_size": lambda: T2TModule(value),
    }.items():
        with pytest.raises(TypeError, match=rf"\w+: {argument} must be an int or a pair of ints, got "):
            call()


WEIGHT = torch.randn(4, 27)
BLOCK = transformer_block_parameters(torch.Generator().manual_seed(0), 3, 5)
PROGRAMS = {
    "soft_split": lambda x, backend: soft_split(x, 3, 2, 1, backend=backend),
    "soft_composition": lambda x, backend: soft_composition(_tokens(x), x.shape[2:], 3, 2, 1, backend=backend),
    "fused_fold_unfold": lambda x, backend: fused_fold_unfold(_tokens(x), x.shape[2:], 3, 2, 1, backend=backend),
    "soft_split_linear": lambda x, backend: soft_split_linear(
        x, WEIGHT.to(x), None, 3, 2, 1, norm_eps=1e-5, backend=backend
    ),
    "transformer_block": lambda x, backend: transformer_block(
        x.flatten(2).mT, **{name: t.to(x) for name, t in BLOCK.items()}, heads=3, backend=backend
    ),
    "grid": lambda x, backend: soft_split(x.flatten(2).mT, 3, 2, 1, grid=x.shape[2:], backend=backend),
}
over_programs = pytest.mark.parametrize("name", PROGRAMS)
over_backends = pytest.mark.parametrize("backend", ["aten", pytest.param("reference", marks=pytest.mark.slow)])


def _tokens(x):
    return F.unfold(x, 3, stride=2, padding=1).mT


class Program(torch.nn.Module):
    def __init__(self, name, backend):
        super().__init__()
        self.name, self.backend = name, backend

    def forward(self, x):
        return PROGRAMS[self.name](x, self.backend)


def _check_free(program, name, backend):
    """The program, traced with a 16 x 20 image, gives the right result for a 31 x 9 image."""
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


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"])
@over_backends
@over_programs
def test_export_keeps_free_sizes(name, backend, strict):
    free = [{2: Dim("height", min=4), 3: Dim("width", min=4)}]
    program = export(Program(name, backend), (torch.randn(1, 3, 16, 20),), dynamic_shapes=free, strict=strict)
    _check_free(program.module(), name, backend)


TOO_LARGE = {
    "kernel_size": (lambda n: soft_split(IMAGE, n), "kernel_size must be at most 2147483647, got "),
    "stride": (lambda n: soft_split(IMAGE, 1, n, n), "stride must be at most 2147483647, got "),
    "padding": (lambda n: soft_split(IMAGE, 1, 1, (0, n)), "padding must be at most 2147483647, got "),
    "grid": (lambda n: soft_split(TOKENS, 1, grid=n), "grid must be at most 2147483647, got "),
    "output_size": (lambda n: soft_composition(TOKENS, n, 1), "output_size must be at most 2147483647, got "),
    "img_size": (lambda n: T2TModule((n, 3)), "img_size must be at most 2147483647, got "),
}


@pytest.mark.parametrize("size", [2**31, 2**61, 2**63 - 1, 2**63, 2**200])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_sizes_above_int32_raise(name, size):
    call, text = TOO_LARGE[name]
    with pytest.raises(ValueError, match=text):
        call(size)


def test_products_above_the_limit_raise():
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="padding must leave the padded image at most 2147483647 pixels along an axis"):
        soft_split(one, 1, 1, 2**30)
    with pytest.raises(
        ValueError, match=r"the unfolded tokens must have at most 2\*\*56 values, got 1 x 2147483647 x "
    ):
        soft_split(one, 1, 1, 2**30 - 1)
    with pytest.raises(ValueError, match=r"the image must have at most 2\*\*56 values, got 1 x 1 x 2147483647 x "):
        soft_composition(one[0], 2**31 - 1, 1, 2**31 - 1)
    with pytest.raises(ValueError, match=r"the result must have at most 2\*\*56 values, got 1 x 1 x 1 x "):
        soft_split_linear(one, torch.ones(1, 1).expand(2**57, 1))
    with pytest.raises(ValueError, match=r"q, k and v must have at most 2\*\*56 values, got 18014398509481984 x "):
        transformer_block(torch.ones(1, 1, 3).expand(2**54, 1, 3), **BLOCK, heads=3)


def gradient_of(call, x):
    x = x.clone().requires_grad_()
    call(x).square().sum().backward()
    return x.grad


# few windows far apart, or very many: (kernel, stride, padding, whether aten has enough memory)
EXTREMES = {
    "one window": (2, 2**31 - 1, 0, True),
    "two windows 2**30 apart": (1, 2**30, 2**30 - 6, False),
    "wider than a stride apart": (3, 2**30, 2**30 - 6, False),
    "rows far apart": ((1, 3), (2**30, 2), (2**30 - 6, 1), False),
    "columns far apart": ((3, 1), (2, 2**30), (1, 2**30 - 6), False),
    "padding of a million": ((2, 1), (3, 2**20), (10**6, 0), True),
    "one row of windows": ((1, 12), 1, (0, 4), True),
    "kernel as the padded image": ((209, 9), 7, (100, 0), True),
}


@pytest.mark.parametrize("backend", ["native", "aten"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_windows(name, backend):
    """They are valid, and the results equal the reference's."""
    *arguments, small = EXTREMES[name]
    if backend == "aten" and not small:
        pytest.skip("aten pads the image")
    if backend == "native" and not _extension.operators():
        pytest.skip(f"native: {_extension.operators_error()}")
    image = torch.randn(1, 2, 9, 9)
    win = window(*arguments)
    tokens = torch.randn(1, math.prod(win.grid(9, 9)), 2 * win.taps)
    weight = torch.randn(5, 2 * win.taps)
    for call in (
        lambda chosen: soft_split(image, *win, backend=chosen),
        lambda chosen: soft_composition(tokens, 9, *win, backend=chosen),
        lambda chosen: fused_fold_unfold(tokens, 9, *win, backend=chosen),
        lambda chosen: soft_split_linear(image, weight, None, *win, norm_eps=1e-5, backend=chosen),
        lambda chosen: gradient_of(lambda x: soft_split(x, *win, backend=chosen), image),
        lambda chosen: gradient_of(lambda x: soft_split_linear(x, weight, None, *win, backend=chosen), image),
    ):
        torch.testing.assert_close(call(backend), call("reference"), rtol=1e-4, atol=1e-4)
