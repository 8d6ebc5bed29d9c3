"""Random shapes, windows, memory layouts and dtypes: every operator and CPU backend against the float64 reference.

By default a few fixed cases run; ``make properties`` runs 20,000 (tests/README.md has the figures of the last run).
"""

import math
import time

import pytest
import torch

from t2t_fast import backends, functional
from t2t_fast.errors import BackendUnavailable
from t2t_fast.testing import (
    DTYPE_NAMES,
    ROW_FACTOR,
    TOLERANCES,
    Case,
    assert_close,
    errors,
    features,
    token_mlp_parameters,
    tolerance,
    transformer_block_parameters,
)

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

OPERATORS = [op for op in backends.operators() if (op, "forward") in TOLERANCES]
BACKENDS = ["aten", "native"]
OFFSETS = [0.0, 0.0, 3.0, 50.0]  # of images, whose standard deviation is 1
LAYOUTS = ["contiguous", "reversed", "slice", "expanded", "odd strides"]
FEW, MANY = 20, -(-20000 // (len(OPERATORS) * len(BACKENDS)))  # per operator and backend

sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33])


def lay_out(t, layout):
    """The values of ``t`` in another memory layout; "expanded" repeats its first row (sample or output)."""
    if t.ndim == 0 or t.numel() == 0:
        return t
    if layout == "reversed":
        order = tuple(reversed(range(t.ndim)))
        return t.permute(order).contiguous().permute(order)
    if layout == "slice":
        return t.new_zeros([2 * n + 1 for n in t.shape])[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "odd strides":  # an axis of size 1 may have any stride
        strides = [s if n > 1 else 2**40 for n, s in zip(t.shape, t.contiguous().stride(), strict=True)]
        return t.contiguous().as_strided(t.shape, strides)
    return t.contiguous()


@st.composite
def windows(draw):
    """An image's (H, W) and the options of a window that fits into it."""
    size, window = [], []
    for _ in range(2):
        kernel, stride, padding = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(0, 3))
        size.append(max(1, kernel - 2 * padding + draw(st.integers(0, 12))))
        window.append((kernel, stride, padding))
    options = dict(zip(("kernel_size", "stride", "padding"), zip(*window, strict=True), strict=True))
    return tuple(size), options


class Maker:
    """Random tensors of one case, from one generator."""

    def __init__(self, draw, offsets):
        self.draw, self.offsets = draw, offsets
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(self, *shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(*shape, generator=self.generator)

    def maybe(self, **tensors):
        return tensors if self.draw(st.booleans()) else {}

    def batch(self):
        return self.draw(st.integers(0, 3))

    def image(self, size):
        offset = self.draw(st.sampled_from(self.offsets))
        return self.normal(self.batch(), self.draw(st.integers(1, 20)), *size, mean=offset)

    def bytes(self, size):
        return torch.randint(0, 256, (self.batch(), 3, *size), generator=self.generator, dtype=torch.uint8)

    # ---- the operators

    def soft_split(self):
        size, options = self.draw(windows())
        return {"x": self.image(size)}, options

    def soft_composition(self):
        size, options = self.draw(windows())
        win = functional.window(**options)
        h, w = win.grid(*size)
        tokens = self.normal(self.batch(), h * w, self.draw(st.integers(1, 20)) * win.taps)
        return {"tokens": tokens}, {"output_size": size, **options}

    fused_fold_unfold = soft_composition

    def _linear(self, prefix, outputs, std):
        size, options = self.draw(windows())
        tokens = math.prod(functional.window(**options).grid(*size))
        taken = self.draw(st.booleans())
        x = self.bytes(size) if taken else self.image(size)
        columns = x.shape[1] * functional.window(**options).taps
        options |= {"pixel_norm": ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))} if taken else {}
        weights = {f"{prefix}weight": self.normal(outputs, columns, std=std / columns**0.5)}
        weights |= self.maybe(**{f"{prefix}bias": self.normal(outputs, std=0.05)})
        return {"x": x, **weights}, options, columns, tokens

    def _norm(self, name, columns):
        return self.maybe(**{
            f"{name}_weight": self.normal(columns, std=0.1, mean=1.0),
            f"{name}_bias": self.normal(columns, std=0.1),
        })  # fmt: skip

    def soft_split_linear(self):
        tensors, options, columns, _ = self._linear("", self.draw(sizes), 1.0)
        if self.draw(st.booleans()):
            return tensors, options
        return tensors | self._norm("norm", columns), options | {"norm_eps": 1e-5}

    def performer_attention(self):
        heads = self.draw(st.sampled_from([(), (1,), (3,)]))
        batch, width, m = self.batch(), self.draw(sizes), self.draw(st.integers(1, 20))
        queries, keys = (self.draw(st.integers(1, 150)) for _ in range(2))
        norm = self.draw(st.sampled_from([0.5, 1.0, 2.0, 4.0]))
        q, k = (self.normal(batch, *heads, n, width, std=norm / width**0.5) for n in (queries, keys))
        tensors = {
            "q": q,
            "k": k,
            "v": self.normal(batch, *heads, keys, width),
            "w": features(self.generator, m, width),
        }
        if self.draw(st.booleans()):
            mask = torch.rand(batch, keys, generator=self.generator) < 0.7
            tensors["key_mask"] = mask.index_fill_(1, torch.tensor(0), True)  # the first key is never masked
        return tensors, {"eps": self._eps(min(keys, m))}

    def _eps(self, choices):
        """With one key or one feature all gradients except that of v pass through the gate, so it must be half open."""
        return self.draw(st.sampled_from([1e-8, 1e-3, 0.1] if choices > 1 else [0.1]))

    def _mlp(self, width, norm="norm"):
        parameters = token_mlp_parameters(self.generator, width, self.draw(sizes), norm=norm)
        parameters = {
            name: None if value.ndim == 1 and self.draw(st.booleans()) else value for name, value in parameters.items()
        }
        options = {name: self.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])) for name in ("proj_drop", "mlp_drop")}
        return {**parameters, "seed": torch.tensor(self.draw(st.integers(-(2**63), 2**63 - 1)))}, options

    def token_mlp(self):
        shape = self.batch(), self.draw(st.integers(1, 150)), self.draw(sizes)
        mlp, options = self._mlp(shape[-1])
        return {"y": self.normal(*shape), "v": self.normal(*shape), **mlp}, options

    def _probabilities(self, *names):
        options = {name: self.draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])) for name in names}
        return {"seed": torch.tensor(self.draw(st.integers(-(2**63), 2**63 - 1)))}, options

    def _tokens(self):
        return self.batch(), self.draw(st.integers(1, 60)), self.draw(sizes)

    def _affine(self, width):
        """LayerNorm's parameters, both or none."""
        return {"norm_weight": None, "norm_bias": None} | self._norm("norm", width)

    def _bias(self, width):
        return self.draw(st.sampled_from([None, self.normal(width, std=0.05)]))

    def add_layer_norm(self):
        shape = self._tokens()
        seed, options = self._probabilities("drop", "drop_path")
        return {"x": self.normal(*shape), "branch": self.normal(*shape), **self._affine(shape[-1]), **seed}, options

    def layer_norm_linear(self):
        shape, outputs = self._tokens(), self.draw(sizes)
        weight = self.normal(outputs, shape[-1], std=shape[-1] ** -0.5)
        linear = {"weight": weight, "bias": self._bias(outputs)}
        return {"x": self.normal(*shape), **self._affine(shape[-1]), **linear}, {}

    def layer_norm_mlp(self):
        shape, hidden = self._tokens(), self.draw(sizes)
        width, residual = shape[-1], self.draw(st.booleans())
        outputs = width if residual else self.draw(sizes)
        names = ("hidden_drop", "drop", "drop_path")
        branch = self.maybe(branch=self.normal(*shape))
        seed, options = self._probabilities(*names, *(("branch_drop", "branch_path") if branch else ()))
        tensors = {"x": self.normal(*shape), "branch": None, **branch, **self._affine(width), **seed}
        tensors |= {"fc1_weight": self.normal(hidden, width, std=width**-0.5), "fc1_bias": self._bias(hidden)}
        tensors |= {"fc2_weight": self.normal(outputs, hidden, std=hidden**-0.5), "fc2_bias": self._bias(outputs)}
        if tensors["norm_weight"] is None:
            options["norm_eps"] = self.draw(st.sampled_from([None, 1e-5]))
        return tensors, {**options, "residual": residual, "recompute": self.draw(st.booleans())}

    def transformer_block(self):
        batch, heads = self.batch(), self.draw(st.sampled_from([1, 2, 3]))
        # more than 256 keys are two parts, more than 102 tokens two tiles
        tokens = self.draw(st.sampled_from([1, 2, 7, 31, 102, 103, 257]))
        width = heads * self.draw(st.sampled_from([1, 2, 5, 8, 16, 17]))
        tensors = transformer_block_parameters(self.generator, width, self.draw(sizes))
        for norm in ("norm1", "norm2"):
            if self.draw(st.booleans()):
                tensors[f"{norm}_weight"] = tensors[f"{norm}_bias"] = None
        for linear in ("qkv", "proj", "fc1", "fc2"):
            if self.draw(st.booleans()):
                tensors[f"{linear}_bias"] = None
        seed, options = self._probabilities("drop_path1", "drop_path2")
        return {"x": self.normal(batch, tokens, width), **tensors, **seed}, {"heads": heads, **options}

    def performer_layer(self):
        width, m = self.draw(sizes), self.draw(st.integers(1, 12))
        linear, options, columns, tokens = self._linear("kqv_", 3 * width, 2.0 / width**0.5)
        mlp, drops = self._mlp(width, "norm2")
        tensors = {**linear, "kqv_bias": linear.get("kqv_bias"), "w": features(self.generator, m, width), **mlp}
        options |= {"eps": self._eps(min(m, tokens)), "recompute": self.draw(st.booleans())}
        return tensors | self._norm("norm1", columns), options | drops


@st.composite
def cases(draw, op, offsets):
    """A :class:`Case` in a random dtype, its tensors in random layouts, and the layout of the incoming gradient."""
    tensors, options = getattr(Maker(draw, offsets), op)()
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    laid = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            tensor = lay_out(tensor, draw(st.sampled_from(LAYOUTS)))
        laid[name] = tensor
    floating = [name for name, tensor in laid.items() if tensor is not None and tensor.is_floating_point()]
    wants = tuple(name for name in floating if draw(st.integers(0, 3)))
    return Case(op, f"{DTYPE_NAMES[dtype]}", laid, options, wants), dtype, draw(st.sampled_from(LAYOUTS))


def run(case, backend, upstream_dtype, layout, *, move=None):
    """The output, under "", and the required gradients by name.

    ``move`` (dtype, generator) perturbs all inputs by up to one rounding of that dtype.
    """

    def moved(t):
        if move is None:
            return t
        dtype, generator = move
        unit = torch.finfo(dtype).eps * (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5)
        return t * (1 + unit)

    tensors = {
        name: moved(t.detach()).requires_grad_(name in case.wants_gradient)
        if t is not None and t.is_floating_point()
        else t
        for name, t in case.tensors.items()
    }
    out = case.call(**tensors, **case.options, backend=backend)
    found = {"": out.detach()}
    if case.wants_gradient:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(lay_out(moved(upstream.to(upstream_dtype).to(out.dtype)), layout))
        found |= {name: tensors[name].grad for name in case.wants_gradient}
    return found


def in_double(case):
    """The case with its floating-point tensors in float64."""
    tensors = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in case.tensors.items()}
    return Case(case.op, case.name, tensors, case.options, case.wants_gradient)


def uncertainty(case, dtype, layout, exact):
    """The error of upstream's computation in ``dtype``: name -> (whole error, largest row's error).

    It is the larger of two: the error of the reference in ``dtype``, and the largest change of the exact results in ten
    draws that perturb all inputs by a rounding.
    """
    others = [run(case, "reference", dtype, layout)]
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        others.append(run(in_double(case), "reference", dtype, layout, move=(dtype, generator)))
    return {
        name: tuple(map(max, zip(*(errors(other[name], value) for other in others), strict=True)))
        for name, value in exact.items()
    }


def check_against_reference(case, backend, dtype, layout):
    """Every result is within its operator's tolerance, or within four times upstream's error in the same dtype.

    The second bound applies where cancellation makes the tolerance unattainable. The error of a result is relative to
    at least a thousandth of the largest result, since the exact value may be 0; that of :func:`vanishing` gradients is
    relative to the largest result. Copies must be equal.
    """
    found = run(case, backend, dtype, layout)
    exact = run(in_double(case), "reference", dtype, layout)
    largest = max(value.norm().item() for value in exact.values())
    upstream = None
    for name, value in found.items():
        direction = "backward" if name else "forward"
        allowed, expected = tolerance(case.op, direction, dtype), exact[name]
        whole, row = errors(value, expected)
        size = expected.norm().item()
        scale = largest if name in vanishing(case) else 1e-3 * largest
        part = (size or 1) / max(size, scale) if largest else 1
        if whole * part <= allowed and row * part <= ROW_FACTOR * allowed:
            continue
        if allowed > 0:
            upstream = upstream or uncertainty(case, dtype, layout, exact)
            lost, lost_row = upstream[name]
            if whole <= allowed + 4 * lost and row <= ROW_FACTOR * allowed + 4 * lost_row:
                continue
            name += f" (upstream loses {lost:.1e}, row {lost_row:.1e})"
        assert_close(value, expected, case.op, direction, dtype, name)


def vanishing(case):
    """Names of gradients that are 0 except for eps: LayerNorm over one or two values, queries with one feature."""
    names = set()
    columns = case.tensors.get("weight" if case.op == "soft_split_linear" else "kqv_weight")
    if columns is not None and columns.shape[1] <= 2 and (case.op == "performer_layer" or "norm_eps" in case.options):
        names.add("x")
    if "layer_norm" in case.op and case.tensors["x"].shape[-1] <= 2 and "norm_eps" not in case.options:
        names |= {"x", "branch", "norm_weight"}
    if case.op == "transformer_block" and case.tensors["x"].shape[-1] <= 2:
        names |= {"norm1_weight", "norm2_weight"}
    if case.op == "performer_attention" and case.tensors["w"].shape[0] == 1:
        names.add("q")
    return names


def is_long():
    return settings.get_current_profile_name() == "long"


class Progress:
    """Counts cases of the long run and prints from time to time."""

    def __init__(self):
        self.begin = self.said = time.monotonic()
        self.count = 0

    def step(self):
        self.count += 1
        now = time.monotonic()
        if is_long() and now - self.said > 10:
            self.said = now
            print(f"\n{self.count} cases in {now - self.begin:.0f} s", flush=True)


progress = Progress()


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    if is_long():
        print(f"\n{progress.count} cases within tolerance, {time.monotonic() - progress.begin:.0f} s")


@pytest.mark.parametrize(
    ("op", "backend"), [(op, name) for op in OPERATORS for name in BACKENDS if name in backends._tables[op]]
)
def test_against_the_reference(op, backend):
    long = is_long()

    @settings(
        max_examples=MANY if long else FEW,
        derandomize=not long,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases(op, OFFSETS))
    def check(drawn):
        case, dtype, layout = drawn
        try:
            check_against_reference(case, backend, dtype, layout)
        except BackendUnavailable:
            assert backend == "native" and (dtype == torch.float64 or case.tensors.get("key_mask") is not None)
            hypothesis.reject()
        progress.step()

    check()
