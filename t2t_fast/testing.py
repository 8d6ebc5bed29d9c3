"""Inputs, error measures and the one tolerance table that tests, ``verify`` and benchmarks share.

Errors are relative to the reference implementation in float64 on the same (already rounded) inputs. There are two
measures: of the whole tensor, and of the worst row (a token, a pixel, a weight's row), which shows a wrong border tile.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import functional
from .errors import BackendUnavailable
from .ops._common.spec import T2T_WINDOWS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The tolerances come from the error analysis of these formulas (about three times the error of an exact emulation) and
# are not fitted to this code. In brackets: the worst error over the cases below (aten and native, CPU), which
# `t2t-fast verify` measures on any machine.
_TABLE = """
operator             direction        fp64             fp32             fp16             bf16
soft_split           forward              0 (0)            0 (0)            0 (0)            0 (0)
soft_split           backward   1e-14 (8.6e-17)    1e-6 (3.7e-8)      1e-3 (3e-4)    6e-3 (2.4e-3)
soft_composition     forward          1e-14 (0)    1e-6 (3.7e-8)      1e-3 (3e-4)    6e-3 (2.4e-3)
soft_composition     backward             0 (0)            0 (0)            0 (0)            0 (0)
fused_fold_unfold    forward          1e-14 (0)    1e-6 (4.9e-8)    1e-3 (2.1e-4)    6e-3 (1.7e-3)
fused_fold_unfold    backward   1e-14 (1.2e-16)    1e-6 (4.9e-8)    1e-3 (2.1e-4)    6e-3 (1.7e-3)
soft_split_linear    forward    1e-13 (1.5e-15)    2e-6 (4.6e-7)    1e-3 (3.7e-4)      8e-3 (3e-3)
soft_split_linear    backward   1e-13 (1.8e-15)    6e-6 (1.3e-6)    1.2e-3 (4e-4)    1e-2 (2.6e-3)
performer_attention  forward    1e-13 (9.3e-16)    5e-6 (7.8e-7)  2.5e-3 (2.2e-4)    1.5e-2 (2e-3)
performer_attention  backward   1e-13 (1.5e-15)    6e-6 (9.9e-7)    4e-3 (2.4e-4)  2.5e-2 (1.9e-3)
token_mlp            forward    1e-13 (1.8e-16)    1e-6 (1.6e-7)    1e-3 (3.3e-4)    6e-3 (2.6e-3)
token_mlp            backward   1e-13 (6.5e-16)    2e-6 (3.6e-7)  1.5e-3 (5.4e-4)  1.2e-2 (5.2e-3)
performer_layer      forward      1e-13 (4e-16)    3e-6 (2.5e-7)    2e-3 (4.8e-4)  1.5e-2 (3.7e-3)
performer_layer      backward   1e-13 (1.4e-15)    1e-5 (9.1e-7)    8e-3 (6.2e-4)    4e-2 (5.1e-3)
add_layer_norm       forward     1e-13 (1e-16)    1e-6 (5.7e-8)    1e-3 (2.5e-4)      6e-3 (2e-3)
add_layer_norm       backward  1e-13 (1.8e-16)    2e-6 (1.5e-7)    1.5e-3 (3e-4)  1.2e-2 (2.7e-3)
layer_norm_linear    forward         1e-13 (0)    1e-6 (1.9e-7)    1e-3 (2.5e-4)      6e-3 (2e-3)
layer_norm_linear    backward        1e-13 (0)      2e-6 (3e-7)  1.5e-3 (3.6e-4)  1.2e-2 (2.6e-3)
layer_norm_mlp       forward   1e-13 (1.1e-15)    1e-6 (1.5e-7)      1e-3 (4e-4)    6e-3 (3.3e-3)
layer_norm_mlp       backward  1e-13 (5.1e-16)    2e-6 (4.2e-7)  1.5e-3 (6.8e-4)  1.2e-2 (5.3e-3)
transformer_block    forward    1e-13 (1.1e-15)    1e-6 (2.2e-7)  2e-3 (5.1e-4)  1.5e-2 (4.3e-3)
transformer_block    backward   1e-13 (1.2e-15)    2e-6 (7e-7)    4e-3 (1.1e-3)    2.5e-2 (1e-2)
t2t_module           forward    1e-13 (1.5e-15)    3e-6 (5.6e-7)    2e-3 (5.3e-4)  1.5e-2 (4.3e-3)
t2t_module           backward     1e-13 (2e-15)    1e-5 (1.2e-6)    8e-3 (8.7e-4)      4e-2 (1e-2)
"""


def _parse(table: str) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    rows = {}
    for line in table.strip().splitlines()[1:]:
        op, direction, *cells = line.replace("(", "").replace(")", "").split()
        numbers = [float(cell) for cell in cells]
        rows[op, direction] = dict(
            zip(("fp64", "fp32", "fp16", "bf16"), zip(numbers[::2], numbers[1::2], strict=True), strict=True)
        )
    return rows


TOLERANCES = _parse(_TABLE)
"""(operator, direction) -> dtype name -> (tolerance, measured error)."""

ROW_FACTOR = 8
"""The error of one row, relative to a mean row, may be this many times the tolerance."""


def tolerance(op: str, direction: str, dtype: torch.dtype) -> float:
    """The tolerance of ``op`` for a dtype; ``direction`` is "forward" or "backward"."""
    return TOLERANCES[op, direction][DTYPE_NAMES[dtype]][0]


def errors(value: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(relative error of the whole tensor, largest error of a row relative to a mean row); NaN counts as infinite."""
    value, expected = value.detach().double(), expected.detach().double()
    if value.shape != expected.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    if value.numel() == 0:
        return 0.0, 0.0
    rows = (1, -1) if value.ndim < 2 else (-1, value.shape[-1])
    difference, expected = (value - expected).reshape(rows), expected.reshape(rows)
    difference = torch.nan_to_num(difference, nan=torch.inf)
    scale = expected.norm()
    if scale == 0:
        size = difference.norm().item()
        return size, size
    mean_row = scale / expected.shape[0] ** 0.5
    return (difference.norm() / scale).item(), (difference.norm(dim=1).max() / mean_row).item()


def assert_close(
    value: torch.Tensor, expected: torch.Tensor, op: str, direction: str, dtype: torch.dtype, label: str = ""
) -> None:
    """Raise ``AssertionError`` with both errors unless they are within the table's tolerance."""
    allowed = tolerance(op, direction, dtype)
    whole, row = errors(value, expected)
    if not (whole <= allowed and row <= ROW_FACTOR * allowed):
        raise AssertionError(
            f"{op} {direction} {DTYPE_NAMES[dtype]} {label}: error {whole:.2e} (worst row {row:.2e}), "
            f"tolerance {allowed:.1e} (row {ROW_FACTOR * allowed:.1e})"
        )


@dataclass
class Case:
    """One call of an operator: named tensors, other arguments, and the names of tensors that need a gradient."""

    op: str
    name: str
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    wants_gradient: tuple[str, ...] = ()

    def cast(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> "Case":
        """The same case with its floating tensors rounded to ``dtype`` on ``device``."""
        tensors = {
            name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in self.tensors.items()
        }
        return Case(self.op, self.name, tensors, self.options, self.wants_gradient)

    @property
    def call(self) -> Callable[..., torch.Tensor]:
        """The function of :mod:`t2t_fast.functional`; several results are concatenated along the last axis."""
        function = getattr(functional, self.op)

        def call(*arguments: Any, **named: Any) -> torch.Tensor:
            result = function(*arguments, **named)
            return torch.cat(result, dim=-1) if isinstance(result, tuple) else result

        return call

    def run(self, backend: str = "auto") -> torch.Tensor:
        """Forward only."""
        return self.call(**self.tensors, **self.options, backend=backend)

    def run_backward(
        self, backend: str = "auto", round_to: torch.dtype | None = None, seed: int = 1
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward with a random upstream gradient: the output and the named gradients.

        ``round_to`` rounds the upstream gradient first, so that a reference in a wider type sees the same numbers.
        """
        tensors = {
            name: t.detach().requires_grad_(name in self.wants_gradient) if t.is_floating_point() else t
            for name, t in self.tensors.items()
        }
        out = self.call(**tensors, **self.options, backend=backend)
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        out.backward(upstream.to(round_to or out.dtype).to(out))
        gradients: dict[str, Any] = {name: tensors[name].grad for name in self.wants_gradient}
        return out.detach(), gradients


def natural_images(batch: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise with the 1/f spectrum of photographs and an offset per image, clipped to ImageNet's normalised range."""
    if batch == 0:
        return torch.empty(0, channels, height, width)
    generator = torch.Generator().manual_seed(seed)
    fy, fx = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    amplitude = 1 / (fy[:, None] ** 2 + fx[None] ** 2 + 1 / max(height, width) ** 2).sqrt()

    def field(count: int) -> torch.Tensor:
        white = torch.randn(batch, count, height, width, generator=generator)
        shaped = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real
        return shaped / shaped.std()

    offset = 0.5 * torch.randn(batch, 1, 1, 1, generator=generator)
    return (field(1) + 0.3 * field(channels) + offset).clamp(-2.2, 2.6)


def _normal(generator: torch.Generator, *shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return mean + std * torch.randn(*shape, generator=generator)


def token_mlp_parameters(
    generator: torch.Generator, width: int, hidden: int | None = None, gain: float = 1.0, norm: str = "norm"
) -> dict[str, torch.Tensor]:
    """Random parameters of ``token_mlp``; every term contributes. ``norm``: how those of its LayerNorm are named."""
    hidden = width if hidden is None else hidden
    std = 0.125 * gain
    return {
        "proj_weight": _normal(generator, width, width, std=std),
        "proj_bias": _normal(generator, width, std=0.05),
        f"{norm}_weight": _normal(generator, width, std=0.1, mean=1.0),
        f"{norm}_bias": _normal(generator, width, std=0.1),
        "fc1_weight": _normal(generator, hidden, width, std=std),
        "fc1_bias": _normal(generator, hidden, std=0.05),
        "fc2_weight": _normal(generator, width, hidden, std=std),
        "fc2_bias": _normal(generator, width, std=0.05),
    }


def transformer_block_parameters(generator: torch.Generator, width: int, hidden: int) -> dict[str, torch.Tensor]:
    """Random parameters of ``transformer_block``; every term contributes, and logits have deviation 1."""
    tensors: dict[str, torch.Tensor] = {}
    shapes = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (hidden, width), "fc2": (width, hidden)}
    for name, (outputs, inputs) in shapes.items():
        if norm := {"qkv": "norm1", "fc1": "norm2"}.get(name):
            tensors[f"{norm}_weight"] = _normal(generator, width, std=0.1, mean=1.0)
            tensors[f"{norm}_bias"] = _normal(generator, width, std=0.1)
        tensors[f"{name}_weight"] = _normal(generator, outputs, inputs, std=inputs**-0.5)
        tensors[f"{name}_bias"] = _normal(generator, outputs, std=0.05)
    return tensors


def features(generator: torch.Generator, m: int, width: int) -> torch.Tensor:
    """Random features as upstream draws them: orthogonal rows of norm sqrt(m)."""
    return torch.nn.init.orthogonal_(torch.empty(m, width), generator=generator) * m**0.5


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor, eps: float = 1e-8
) -> tuple[torch.Tensor, torch.Tensor]:
    """``performer_attention`` and its gate in float64 and log space, also where the reference underflows.

    Returns:
        y (B, L, E), the gate (B, L, 1); differentiable.
    """
    q, k, v, w = (t.double() for t in (q, k, v, w))
    a = k @ w.mT - k.square().sum(-1, keepdim=True) / 2
    scores = q @ w.mT + a.logsumexp(-2, keepdim=True)
    y = scores.softmax(-1) @ (a.softmax(-2).mT @ v)
    if eps == 0:
        return y, torch.ones_like(y[..., :1])
    lse = scores.logsumexp(-1, keepdim=True) - q.square().sum(-1, keepdim=True) / 2
    gate = torch.sigmoid(lse - math.log(w.shape[0] * eps))
    return y * gate, gate


# (name, batch, channels, height, width, kernel, stride, padding); T2T's three stages, then awkward ones
WINDOW_CASES: list[tuple[Any, ...]] = [
    ("stage1", 2, 3, 64, 64, *T2T_WINDOWS[0]),
    ("stage2", 2, 64, 16, 16, *T2T_WINDOWS[1]),
    ("non-square image", 1, 3, 37, 61, 7, 4, 2),
    ("non-square window", 2, 5, 20, 31, (3, 5), (2, 3), (1, 2)),
    ("gaps between windows", 2, 4, 19, 23, 2, 3, 0),
    ("border not reached", 1, 8, 18, 21, 3, 2, 0),
    ("one token", 3, 3, 7, 7, 7, 4, 0),
    ("one pixel window", 2, 6, 9, 5, 1, 1, 0),
    ("large kernel", 1, 1, 60, 100, 31, 16, 8),
    ("batch 0", 0, 3, 16, 16, 7, 4, 2),
]


def soft_split_cases() -> list[Case]:
    """Cases of ``soft_split``."""
    return [
        Case(
            "soft_split",
            name,
            {"x": natural_images(b, c, h, w)},
            {"kernel_size": k, "stride": s, "padding": p},
            ("x",),
        )
        for name, b, c, h, w, k, s, p in WINDOW_CASES
    ]


def _token_cases(op: str, windows: Sequence[tuple[Any, ...]]) -> list[Case]:
    """Tokens of each window, for an operator that composes them."""
    cases: list[Case] = []
    for name, b, c, h, w, k, s, p in windows:
        win = functional.window(k, s, p)
        rows, columns = win.grid(h, w)
        tokens = torch.randn(b, rows * columns, c * win.taps, generator=torch.Generator().manual_seed(0))
        options = {"output_size": (h, w), "kernel_size": k, "stride": s, "padding": p}
        cases.append(Case(op, name, {"tokens": tokens}, options, ("tokens",)))
    return cases


def soft_composition_cases() -> list[Case]:
    """Cases of ``soft_composition``."""
    return _token_cases("soft_composition", WINDOW_CASES)


def fused_fold_unfold_cases() -> list[Case]:
    """Cases of ``fused_fold_unfold``, FuseFormer's window among them."""
    return _token_cases("fused_fold_unfold", [*WINDOW_CASES, ("FuseFormer", 1, 4, 60, 108, 7, 3, 3)])


def soft_split_linear_cases() -> list[Case]:
    """Cases of ``soft_split_linear``: with and without LayerNorm, its affine part and the bias."""
    cases: list[Case] = []
    for index, (name, b, c, h, w, k, s, p) in enumerate(WINDOW_CASES):
        generator = torch.Generator().manual_seed(index)
        win = functional.window(k, s, p)
        columns, out = c * win.taps, 24
        options = {"kernel_size": k, "stride": s, "padding": p}
        x = natural_images(b, c, h, w, seed=index)
        weight = _normal(generator, out, columns, std=0.02 if columns > 100 else 0.1)
        bias = _normal(generator, out, std=0.05)
        norm = {
            "norm_weight": _normal(generator, columns, std=0.1, mean=1.0),
            "norm_bias": _normal(generator, columns, std=0.1),
        }
        plain = {"x": x, "weight": weight}
        full = {**plain, "bias": bias}
        cases.append(
            Case(
                "soft_split_linear",
                f"{name}, LayerNorm",
                {**full, **norm},
                {**options, "norm_eps": 1e-5},
                tuple({**full, **norm}),
            )
        )
        cases.append(Case("soft_split_linear", f"{name}, Linear", full, options, tuple(full)))
    bare = cases[2]
    tensors = {name: bare.tensors[name] for name in ("x", "weight")}
    options = {**bare.options, "norm_eps": 1e-5}
    cases.append(
        Case("soft_split_linear", "stage2, LayerNorm without affine, no bias", tensors, options, tuple(tensors))
    )
    return cases


def performer_attention_cases() -> list[Case]:
    """Cases of ``performer_attention``; q and k have the norms of a freshly initialised model (2 to 4)."""
    cases: list[Case] = []
    for name, shape, m, norm, eps in [
        ("T2T stage 3", (2, 196, 64), 32, 2.0, 1e-8),
        ("norm 4", (2, 131, 64), 32, 4.0, 1e-8),
        ("norm 1", (1, 50, 32), 16, 1.0, 1e-8),
        ("heads", (2, 3, 37, 16), 8, 1.5, 1e-8),
        # one token attends to itself: only a half-open gate gives q, k and w a gradient worth comparing
        ("one token", (2, 1, 64), 32, 2.0, 0.1),
        ("odd sizes", (1, 77, 10), 5, 1.0, 1e-8),
        ("eps 0", (1, 20, 16), 8, 1.0, 0.0),
        ("batch 0", (0, 5, 16), 8, 1.0, 1e-8),
    ]:
        generator = torch.Generator().manual_seed(len(cases))
        q, k = (_normal(generator, *shape, std=norm / shape[-1] ** 0.5) for _ in range(2))
        tensors = {"q": q, "k": k, "v": _normal(generator, *shape), "w": features(generator, m, shape[-1])}
        cases.append(Case("performer_attention", name, tensors, {"eps": eps}, ("q", "k", "v", "w")))
    for name, shape, m, shares in [
        ("key mask", (3, 70, 32), 16, (0.7, 0.0, 0.05)),  # the second sample keeps no key
        ("key mask, heads", (2, 3, 37, 16), 8, (0.5, 0.9)),
    ]:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = _attention_tensors(generator, shape, m)
        drawn = torch.rand(shape[0], shape[-2], generator=generator)
        tensors["key_mask"] = drawn < torch.tensor(shares).unsqueeze(1)
        cases.append(Case("performer_attention", name, tensors, {"eps": 1e-8}, ("q", "k", "v", "w")))
    # name, shape, features, options, kind of mask, whether each head has its own features, width of v
    rows: list[tuple[Any, ...]] = [
        ("weights", (2, 37, 16), 8, {}, "weights", False, 16),
        ("weights per head, features per head, narrow v", (2, 3, 37, 16), 8, {}, "weights per head", True, 5),
        ("normalize", (2, 3, 37, 16), 8, {"normalize": True}, None, False, 16),
        ("causal, longer than two chunks", (2, 150, 16), 8, {"causal": True}, None, False, 16),
        ("causal, one chunk", (1, 64, 32), 16, {"causal": True}, None, False, 32),
        ("causal, one token", (2, 1, 16), 8, {"causal": True, "eps": 0.1}, None, False, 16),
        ("causal, eps 0", (1, 3, 67, 16), 8, {"causal": True, "eps": 0.0}, None, False, 16),
        ("causal, mask", (2, 70, 16), 8, {"causal": True}, "mask", False, 16),
        ("causal, everything", (2, 3, 70, 16), 8, {"causal": True, "normalize": True}, "weights per head", True, 24),
    ]
    for name, shape, m, options, mask, own, v_width in rows:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = _attention_tensors(generator, shape, m, v_width, shape[1] if own else None)
        wants: tuple[str, ...] = ("q", "k", "v", "w")
        if mask is not None:
            drawn = torch.rand(shape[:-1] if "per head" in mask else (shape[0], shape[-2]), generator=generator)
            keep = drawn < 0.6
            keep[0, ..., 0], keep[-1, ..., :4] = True, False  # causal queries before the first key have none
            tensors["key_mask"] = keep if mask == "mask" else drawn + 0.1
            wants += ("key_mask",) if mask != "mask" else ()
        cases.append(Case("performer_attention", name, tensors, {"eps": 1e-8, **options}, wants))
    return cases


def _attention_tensors(
    generator: torch.Generator, shape: tuple[int, ...], m: int, v_width: int | None = None, heads: int | None = None
) -> dict[str, torch.Tensor]:
    """q, k of ``shape`` and norm 1.5, v, and w: (m, E), or (heads, m, E)."""
    tensors = {each: _normal(generator, *shape, std=1.5 / shape[-1] ** 0.5) for each in ("q", "k")}
    tensors["v"] = _normal(generator, *shape[:-1], v_width or shape[-1])
    drawn = [features(generator, m, shape[-1]) for _ in range(heads or 1)]
    return {**tensors, "w": torch.stack(drawn) if heads else drawn[0]}


def token_mlp_cases() -> list[Case]:
    """Cases of ``token_mlp``, with and without dropout (a given seed makes the masks the same for every backend)."""
    cases: list[Case] = []
    for name, shape, hidden, drop in [
        ("T2T stage 3", (2, 196, 64), 64, 0.0),
        ("dropout", (2, 49, 64), 64, 0.1),
        ("wide MLP", (1, 30, 24), 96, 0.0),
        ("one token", (2, 1, 16), 16, 0.5),
        ("batch 0", (0, 5, 16), 16, 0.0),
    ]:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = {"y": _normal(generator, *shape), "v": _normal(generator, *shape)}
        tensors.update(token_mlp_parameters(generator, shape[-1], hidden))
        wants = tuple(tensors)
        tensors["seed"] = torch.tensor(1234567890123)
        options = {"proj_drop": drop, "mlp_drop": drop}
        cases.append(Case("token_mlp", name, tensors, options, wants))
    return cases


def _norm(generator: torch.Generator, width: int) -> dict[str, torch.Tensor]:
    return {
        "norm_weight": _normal(generator, width, std=0.1, mean=1.0),
        "norm_bias": _normal(generator, width, std=0.1),
    }


def add_layer_norm_cases() -> list[Case]:
    """Cases of ``add_layer_norm``: with and without dropout and stochastic depth."""
    cases: list[Case] = []
    for name, shape, drop, path in [
        ("T2T-ViT-7", (2, 50, 256), 0.0, 0.0),
        ("dropout, stochastic depth", (4, 13, 48), 0.1, 0.5),
        ("odd sizes", (3, 7, 19), 0.0, 0.3),
        ("batch 0", (0, 5, 16), 0.1, 0.0),
    ]:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = {"x": _normal(generator, *shape), "branch": _normal(generator, *shape)}
        tensors.update(_norm(generator, shape[-1]))
        wants = tuple(tensors)
        tensors["seed"] = torch.tensor(1234567890123)
        cases.append(Case("add_layer_norm", name, tensors, {"drop": drop, "drop_path": path}, wants))
    return cases


def layer_norm_linear_cases() -> list[Case]:
    """Cases of ``layer_norm_linear``: with and without the bias and LayerNorm's parameters."""
    cases: list[Case] = []
    for name, shape, outputs in [
        ("T2T-ViT-7", (2, 50, 256), 768),
        ("odd sizes", (3, 7, 19), 11),
        ("batch 0", (0, 5, 16), 8),
    ]:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = {"x": _normal(generator, *shape), **_norm(generator, shape[-1])}
        tensors["weight"] = _normal(generator, outputs, shape[-1], std=shape[-1] ** -0.5)
        tensors["bias"] = _normal(generator, outputs, std=0.05)
        cases.append(Case("layer_norm_linear", name, tensors, {}, tuple(tensors)))
    tensors = {name: cases[1].tensors[name] for name in ("x", "weight")}
    options: dict[str, Any] = {"norm_weight": None, "norm_bias": None}
    cases.append(Case("layer_norm_linear", "LayerNorm without affine, no bias", tensors, options, tuple(tensors)))
    return cases


def layer_norm_mlp_cases() -> list[Case]:
    """Cases of ``layer_norm_mlp``: with and without a branch, LayerNorm, the residual, and every dropout."""
    cases: list[Case] = []
    drops = {"branch_drop": 0.1, "branch_path": 0.5, "hidden_drop": 0.2, "drop": 0.1, "drop_path": 0.3}
    problems: list[tuple[str, tuple[int, int, int], int, bool, dict[str, Any]]] = [
        ("T2T-ViT-7", (2, 50, 256), 512, True, {}),
        ("every dropout", (4, 13, 48), 96, True, drops),
        ("recompute, no branch", (2, 17, 32), 64, False, {"recompute": True}),
        ("Mlp", (3, 7, 19), 33, False, {"norm_eps": None, "residual": False}),
        ("batch 0", (0, 5, 16), 32, True, {}),
    ]
    for name, shape, hidden, with_branch, options in problems:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = {"x": _normal(generator, *shape)}
        if with_branch:
            tensors["branch"] = _normal(generator, *shape)
        else:
            options = {**options, "branch": None}
        if options.get("norm_eps", 1e-5) is None:
            options = {**options, "norm_weight": None, "norm_bias": None}
        else:
            tensors.update(_norm(generator, shape[-1]))
        tensors["fc1_weight"] = _normal(generator, hidden, shape[-1], std=shape[-1] ** -0.5)
        tensors["fc1_bias"] = _normal(generator, hidden, std=0.05)
        tensors["fc2_weight"] = _normal(generator, shape[-1], hidden, std=hidden**-0.5)
        tensors["fc2_bias"] = _normal(generator, shape[-1], std=0.05)
        wants = tuple(tensors)
        tensors["seed"] = torch.tensor(1234567890123)
        cases.append(Case("layer_norm_mlp", name, tensors, options, wants))
    return cases


def transformer_block_cases() -> list[Case]:
    """Cases of ``transformer_block``: with and without stochastic depth, biases and LayerNorm's parameters."""
    cases: list[Case] = []
    problems: list[tuple[str, tuple[int, int, int], int, int, dict[str, float]]] = [
        ("T2T-ViT-7", (2, 50, 256), 4, 512, {}),
        ("stochastic depth", (5, 13, 48), 3, 96, {"drop_path1": 0.5, "drop_path2": 0.3}),
        ("odd sizes", (3, 7, 19), 1, 11, {"norm1_eps": 1e-6, "norm2_eps": 1e-3, "scale": 0.5}),
        ("more keys than one part", (1, 300, 36), 3, 40, {}),  # of 256; heads of 12 channels
        ("several tiles of tokens and of hidden units", (2, 211, 20), 2, 540, {}),
        ("one token", (2, 1, 16), 2, 16, {}),
        ("batch 0", (0, 5, 16), 2, 16, {}),
    ]
    for name, shape, heads, hidden, options in problems:
        generator = torch.Generator().manual_seed(len(cases))
        tensors = {"x": _normal(generator, *shape), **transformer_block_parameters(generator, shape[-1], hidden)}
        wants = tuple(tensors)
        tensors["seed"] = torch.tensor(1234567890123)
        cases.append(Case("transformer_block", name, tensors, {"heads": heads, **options}, wants))
    full = cases[2]
    kept = {name: t for name, t in full.tensors.items() if t.ndim != 1}
    absent = dict.fromkeys(full.tensors.keys() - kept.keys())
    wants = tuple(name for name in kept if name != "seed")
    cases.append(Case(full.op, "LayerNorm without affine, no biases", kept, full.options | absent, wants))
    return cases


def performer_layer_cases() -> list[Case]:
    """Cases of ``performer_layer``; k and q have the norms of a freshly initialised model."""
    cases: list[Case] = []
    problems: list[tuple[str, tuple[int, int, int, int], Any, int, int, float, float]] = [
        ("stage1", (2, 3, 64, 64), T2T_WINDOWS[0], 64, 32, 0.0, 1e-8),
        ("stage2", (2, 64, 16, 16), T2T_WINDOWS[1], 64, 32, 0.0, 1e-8),
        ("dropout", (2, 16, 13, 18), (3, 2, 1), 64, 32, 0.1, 1e-8),
        ("odd sizes", (1, 5, 9, 14), ((3, 2), (2, 1), (1, 0)), 10, 3, 0.0, 1e-8),
        # one token attends to itself: only a half-open gate gives k, q and w a gradient worth comparing
        ("one token", (2, 3, 7, 7), (7, 4, 0), 16, 8, 0.0, 0.1),
        ("batch 0", (0, 4, 5, 5), (3, 2, 1), 16, 8, 0.0, 1e-8),
    ]
    for name, image, win, width, m, drop, eps in problems:
        generator = torch.Generator().manual_seed(len(cases))
        kernel, stride, padding = win
        columns = image[1] * functional.window(kernel, stride, padding).taps
        tensors = {
            "x": natural_images(*image, seed=len(cases)),
            "kqv_weight": _normal(generator, 3 * width, columns, std=2.0 / (columns * width) ** 0.5),
            "kqv_bias": _normal(generator, 3 * width, std=0.05),
            "norm1_weight": _normal(generator, columns, std=0.1, mean=1.0),
            "norm1_bias": _normal(generator, columns, std=0.1),
            "w": features(generator, m, width),
        }
        tensors.update(token_mlp_parameters(generator, width, norm="norm2"))
        wants = tuple(tensors)
        tensors["seed"] = torch.tensor(1234567890123)
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        options |= {"proj_drop": drop, "mlp_drop": drop, "eps": eps}
        cases.append(Case("performer_layer", name, tensors, options, wants))
    return cases


CASES = {
    "soft_split": soft_split_cases,
    "soft_composition": soft_composition_cases,
    "fused_fold_unfold": fused_fold_unfold_cases,
    "soft_split_linear": soft_split_linear_cases,
    "performer_attention": performer_attention_cases,
    "token_mlp": token_mlp_cases,
    "performer_layer": performer_layer_cases,
    "add_layer_norm": add_layer_norm_cases,
    "layer_norm_linear": layer_norm_linear_cases,
    "layer_norm_mlp": layer_norm_mlp_cases,
    "transformer_block": transformer_block_cases,
}


def measure(
    op: str, dtype: torch.dtype, backend: str = "aten", device: str | torch.device = "cpu"
) -> Iterator[tuple[str, str, float, float]]:
    """Errors of an operator in each of its cases against the float64 reference.

    Cases that the backend does not support are skipped; it is an error if it supports none.

    Yields:
        (case name, "forward" or the gradient's name, whole error, worst row's error).
    """
    ran, refusal = False, None
    for case in CASES[op]():
        rounded = case.cast(dtype, device)
        try:
            out, gradients = rounded.run_backward(backend)
        except BackendUnavailable as error:
            refusal = error
            continue
        ran = True
        expected, expected_gradients = rounded.cast(torch.float64, "cpu").run_backward("reference", dtype)
        yield case.name, "forward", *errors(out.cpu(), expected)
        for name, gradient in gradients.items():
            yield case.name, name, *errors(gradient.cpu(), expected_gradients[name])
    if refusal is not None and not ran:
        raise refusal
