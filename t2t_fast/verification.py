"""``verify``: the fast path against the float64 reference on this machine, each backend and dtype that runs here."""

import copy
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from . import config, testing
from .backends import ORDER, backend, explain
from .environment import environment
from .errors import NothingToSwap

MODEL = "model"
"""What :func:`verify` takes for the built-in small models alone."""

MODEL_FACTOR = 1.5
"""A whole model rounds in layers that are not this package's, so its error may also be this many times that of the
same model, unfused, in the same dtype."""

GRADIENT_FLOOR = 1e-3
"""A parameter's gradient error is taken relative to its norm, or to this share of the whole gradient's if larger."""


@dataclass(frozen=True)
class VerifyRow:
    """One comparison.

    Attributes:
        what: an operator's name, or the model; backend; dtype ("fp32", "fp16", "bf16", "fp64").
        direction: "forward", or "backward" for the worst of all gradients.
        error, tolerance: relative to the float64 reference; ``None`` where nothing was computed.
        worst: the case and the tensor with that error.
        ok: ``None`` where nothing was computed and nobody asked for exactly that.
        note: why nothing was computed, or what it raised.
    """

    what: str
    backend: str
    dtype: str
    direction: str
    error: float | None = None
    tolerance: float | None = None
    worst: str = ""
    ok: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """Rows and the environment they were computed in; ``str()`` is a table, :meth:`paste` a block for a bug report."""

    rows: tuple[VerifyRow, ...]
    environment: dict[str, str]
    seconds: float

    @property
    def checked(self):
        """The rows that compared something or failed to."""
        return [row for row in self.rows if row.ok is not None]

    @property
    def failures(self):
        """The rows that are not as they should be."""
        return [row for row in self.rows if row.ok is False]

    @property
    def ok(self):
        """Whether something was compared and all of it is within its tolerance."""
        return bool(self.checked) and not self.failures

    @property
    def verdict(self):
        """One line."""
        if not self.checked:
            return "FAILED: nothing could be compared"
        if self.failures:
            return f"FAILED: {len(self.failures)} of {len(self.checked)} comparisons"
        return f"ok: {len(self.checked)} comparisons within their tolerances"

    def _lines(self):
        """(what, backend, dtype) -> its checked rows by direction."""
        lines = {}
        for row in self.checked:
            lines.setdefault((row.what, row.backend, row.dtype), {})[row.direction] = row
        return lines

    def notes(self):
        """Lines on what did not run or failed without a number, and why; and on how models ran."""
        held = {}
        for row in sorted((row for row in self.rows if row.note), key=lambda row: row.backend):
            held.setdefault((row.backend, row.note), {})[row.what] = None
        lines = [f"{name}: {note} ({', '.join(what)})" for (name, note), what in held.items()]
        if any(row.what not in testing.CASES for row in self.checked):
            lines.append("models run in fp16 and bf16 under autocast, as they are trained and served")
        return lines

    def __str__(self):
        table = [("what", "backend", "dtype", "forward", "of", "backward", "of", "", "worst")]
        for key, found in self._lines().items():
            numbers = []
            for direction in ("forward", "backward"):
                row = found.get(direction)
                numbers += ["-", "-"] if row is None else [f"{row.error:.1e}", f"{row.tolerance:.1e}"]
            worst = max(found.values(), key=_severity)
            table.append((*key, *numbers, "ok" if worst.ok else "FAILED", worst.worst or "see below"))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        return "\n".join(
            [*lines, *self.notes(), f"{self.verdict} ({self.environment['device']}, {self.seconds:.0f} s)"]
        )

    def paste(self):
        """A compact Markdown block: environment, then worst forward / backward error per backend and dtype."""
        dtypes = [name for name in testing.DTYPES if any(row.dtype == name for row in self.checked)]
        table = {}
        for (what, name, dtype), found in self._lines().items():
            errors = " / ".join(f"{row.error:.1e}" for row in found.values() if row.error is not None)
            ok = all(row.ok for row in found.values())
            table.setdefault((what, name), {})[dtype] = errors if ok else f"**FAILED** {errors}"
        lines = [f"**t2t-fast verify: {self.verdict}**", ""]
        lines += [f"- {name}: {value}" for name, value in self.environment.items()]
        lines += [
            "",
            f"| forward / backward error of | backend | {' | '.join(dtypes)} |",
            "|---|---|" + "---|" * len(dtypes),
        ]
        for (what, name), cells in table.items():
            lines.append(f"| {what} | {name} | {' | '.join(cells.get(dtype, '-') for dtype in dtypes)} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())])


def _severity(row):
    """What orders rows from harmless to worst: failed or not, then the share of the tolerance used."""
    return row.ok is False, (row.error or 0.0) / (row.tolerance or 1.0)


def verify(model_or_op=None, x=None, *, dtypes=None, backends=None, device=None, progress=None):
    """Compare the fast path with the float64 reference on this machine, forward and every gradient.

    Args:
        model_or_op: ``None`` for every operator and two small T2T-ViT models; an operator's name; "model" for the two
            models; or an ``nn.Module``. A module with fast parts (swapped or built so) is taken as it is, another one
            as :func:`swap` would make it; only copies of it are run, in eval mode.
        x: the module's input, (B, C, H, W); made up from the module's image size if ``None``.
        dtypes: names ("fp32", "fp16", "bf16", "fp64") or ``torch.dtype``; all four by default.
        backends: names. By default every one for operators (what cannot run, or what ``auto`` passes over, is a
            note) and "auto" for models. A backend asked for by name that runs nothing of what was asked is a failure.
        device: by default the module's, else "cuda" if there is one.
        progress: called as ``progress(done, total, what)``.

    Returns:
        :class:`VerifyReport`. Operators are held to the table of ``t2t_fast/testing.py`` (whole tensor, and the worst
        row), models to its "t2t_module" line or :data:`MODEL_FACTOR` times the unfused model's own error.

    Raises:
        TypeError, ValueError: an unknown operator, dtype or backend, or a module that does not take the input.
        NothingToSwap: the module has nothing that this package makes fast.
    """
    dtypes = _checked_dtypes(dtypes)
    asked = backends is not None
    names = _checked_backends(backends) if asked else None
    device = torch.device(_default_device(model_or_op) if device is None else device)
    ops, subjects = _subjects(model_or_op, x)
    jobs = [(f"{op}, {dtype}", _op_rows, op, dtype, names) for op in ops for dtype in dtypes]
    jobs += [(f"{s.what}, {dtype}", _model_rows, s, dtype, names or ["auto"]) for s in subjects for dtype in dtypes]
    started, rows = time.perf_counter(), []
    with _full_float32():
        for done, (label, compare, *what) in enumerate(jobs):
            if progress is not None:
                progress(done, len(jobs), label)
            rows += compare(*what, device)
    if progress is not None:
        progress(len(jobs), len(jobs), "compared")
    if asked:
        ran = {row.backend for row in rows if row.error is not None}
        rows = [replace(row, ok=False) if row.ok is None and row.backend not in ran else row for row in rows]
    return VerifyReport(tuple(rows), environment(device), time.perf_counter() - started)


def _checked_dtypes(dtypes):
    given = list(testing.DTYPES) if dtypes is None else dtypes
    given = [given] if isinstance(given, (str, torch.dtype)) else list(given)
    names = [testing.DTYPE_NAMES.get(each) if isinstance(each, torch.dtype) else each for each in given]
    if not names or any(name not in testing.DTYPES for name in names):
        raise ValueError(f"verify: dtypes must be of {', '.join(testing.DTYPES)}, got {dtypes!r}")
    return names


def _checked_backends(backends):
    names = [backends] if isinstance(backends, str) else list(backends)
    if not names or any(name not in config.BACKENDS for name in names):
        raise ValueError(f"verify: backends must be of {', '.join(config.BACKENDS)}, got {backends!r}")
    return names


def _default_device(model):
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        return parameter.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _subjects(model_or_op, x):
    """The operators and the models to compare."""
    if isinstance(model_or_op, nn.Module):
        return [], [_users_model(model_or_op, x)]
    if x is not None:
        raise TypeError("verify: x is the input of a module, but no module was given")
    if model_or_op is None:
        return list(testing.CASES), [_small_model("performer"), _small_model("transformer")]
    if model_or_op == MODEL:
        return [], [_small_model("performer"), _small_model("transformer")]
    if isinstance(model_or_op, str):
        if model_or_op not in testing.CASES:
            known = ", ".join([*testing.CASES, MODEL])
            raise ValueError(f"verify: the operator must be one of {known}, got {model_or_op!r}")
        return [model_or_op], []
    raise TypeError(f"verify: expected an operator's name or a torch.nn.Module, got {type(model_or_op).__name__}")


@contextmanager
def _full_float32():
    """Matrix products in true float32 meanwhile: what is verified is the package, not the user's choice of TF32.

    The newer per-backend flags cannot be read here without disturbing them; who set those keeps them.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _raised(error):
    lines = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {lines[0] if lines else ''}"


def _obstacle(op, name, device, dtype, asked=True):
    """Why backend ``name`` cannot run ``op``, or, unless it was asked for, why ``auto`` passes it over; or ``None``."""
    if name == "auto":
        return None
    rows = explain(op, device=device, dtype=dtype).rows
    verdict = next(verdict for _, candidate, verdict in rows if candidate == name)
    runs = verdict in ("chosen", "available") or (asked and verdict.startswith("available"))
    return None if runs else verdict


def _op_rows(op, dtype_name, names, device):
    """``names`` is ``None`` where no backend was asked for: then all that ``auto`` does not pass over."""
    dtype = testing.DTYPES[dtype_name]
    for name in ORDER if names is None else names:
        reason = _obstacle(op, name, device, dtype, asked=names is not None)
        if reason is not None:
            yield VerifyRow(op, name, dtype_name, "", note=reason)
            continue
        worst = {"forward": (-1.0, ""), "backward": (-1.0, "")}
        try:
            for case, part, whole, row in testing.measure(op, dtype, name, device):
                direction = "forward" if part == "forward" else "backward"
                worst[direction] = max(worst[direction], (max(whole, row / testing.ROW_FACTOR), f"{case}: {part}"))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is a finding, and the report shows it
            yield VerifyRow(op, name, dtype_name, "", ok=False, note=_raised(error))
            continue
        for direction, (error, where) in worst.items():
            allowed = testing.tolerance(op, direction, dtype)
            yield VerifyRow(op, name, dtype_name, direction, error, allowed, where, error <= allowed)


@dataclass(frozen=True)
class _Subject:
    """Two forms of one model with the same weights, in eval mode, and an input; ``left`` is what swap did not take."""

    what: str
    plain: nn.Module
    fast: nn.Module
    x: torch.Tensor
    left: str = ""
    left_is_wrong: bool = False


def _small_model(tokens_type):
    """A small T2T-ViT in upstream's form with every term exercised, and the same swapped."""
    from .interop.swap import swap
    from .reference import T2T_ViT

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU alone, which is put back
        model = T2T_ViT(
            64, tokens_type, num_classes=10, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0, token_dim=32
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at identity, which would leave terms untried
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    fast = copy.deepcopy(model)
    try:
        left = _left(swap(fast))
    except NothingToSwap as refusal:  # swap proves its parts, so a wrong operator can end here
        left = " ".join(str(refusal).split())
    x = testing.natural_images(2, 3, 64, 64)
    return _Subject(f"small T2T-ViT, {tokens_type}", model, fast, x, left, left_is_wrong=True)


def _frozen(model):
    """A copy in eval mode; tensors that autograd made are constants in it."""
    from .interop.swap import copied

    found = copied(model, lambda t: copy.deepcopy(t) if t.is_leaf else t.detach().clone())
    found.eval()  # a train() of somebody else's may return nothing
    return found


def _left(report):
    """What a swap left as it was, in words."""
    reasons = "; ".join(f"{path}: {reason}" for path, reason in report.left.items())
    return reasons and f"swap left {reasons}"


def _users_model(model, x):
    """A user's module beside its plain form, copies both."""
    from .interop.swap import FAST, swap, unswap

    x = _example(model) if x is None else x
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"verify: x must be a floating torch.Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    name, left = type(model).__name__, ""
    fast, plain = _frozen(model), _frozen(model)
    if not any(isinstance(module, FAST) for module in model.modules()):
        left = _left(swap(fast))
        name = f"{name}, swapped"
    elif unswap(plain).rows and _refusal(plain, x) is not None:
        plain = copy.deepcopy(fast)  # upstream's form takes square images only; the reference backend takes any
    refusal = _refusal(plain, x)
    if refusal is not None:
        raise ValueError(f"verify: {name} does not take x of shape {tuple(x.shape)}; {refusal}")
    return _Subject(name, plain, fast, x.detach(), left)


def _example(model):
    """A made-up image of the size that the model was built for, 224 x 224 if it does not say."""
    sizes = (getattr(module, "img_size", None) for module in model.modules())
    size = next((size for size in sizes if size is not None), None)
    patches = next((m.num_patches for m in model.modules() if hasattr(m, "num_patches")), None)
    if size is None:
        size = 224 if patches is None else 16 * round(patches**0.5)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return testing.natural_images(2, getattr(model, "in_chans", 3), height, width)


def _refusal(model, x):
    """What ``model`` raises on ``x``, or ``None``."""
    parameter = next(model.parameters(), x)
    try:
        with torch.no_grad():
            model(x.to(parameter.device, parameter.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return _raised(error)
    return None


@contextmanager
def _preferring(name, device, dtype):
    """Backend ``name`` for the operators that it can run; yields how many those are."""
    with ExitStack() as stack:
        able = [op for op in testing.CASES if _obstacle(op, name, device, dtype) is None]
        for op in able:
            stack.enter_context(backend(name, op))
        yield len(able)


def _model_rows(subject, dtype_name, names, device):
    """Half dtypes run under autocast: upstream's Performer mixes float32 in and does not run in a half type alone."""
    if subject.left:
        verdict = False if subject.left_is_wrong else None
        yield VerifyRow(subject.what, "auto", dtype_name, "", ok=verdict, note=subject.left)
    dtype = testing.DTYPES[dtype_name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain, fast = (copy.deepcopy(model).to(device, wide) for model in (subject.plain, subject.fast))
    exact = copy.deepcopy(plain).to("cpu", torch.float64)
    x = subject.x.to(device, wide)
    with backend("reference"):
        expected = _run(exact, x.to("cpu", torch.float64), torch.float64, wide)
        try:
            own = _model_errors(_run(plain, x, dtype, wide), expected)
        except (RuntimeError, NotImplementedError) as error:
            yield VerifyRow(subject.what, "reference", dtype_name, "", note=f"the plain model {_raised(error)}")
            return
    for name in names:
        with _preferring(name, device, dtype) as able:
            if not able:
                yield VerifyRow(subject.what, name, dtype_name, "", note="it runs no operator here")
                continue
            try:
                found = _model_errors(_run(fast, x, dtype, wide), expected)
            except Exception as error:  # noqa: BLE001 - as for operators
                yield VerifyRow(subject.what, name, dtype_name, "", ok=False, note=_raised(error))
                continue
        for direction, (error, where) in found.items():
            allowed = testing.tolerance("t2t_module", direction, dtype)
            if own[direction][0] < float("inf"):
                allowed = max(allowed, MODEL_FACTOR * own[direction][0])
            yield VerifyRow(subject.what, name, dtype_name, direction, error, allowed, where, error <= allowed)


def _tensors(value):
    """The floating tensors in a model's result, in order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _run(model, x, dtype, round_to):
    """Results and gradients of the parameters by name, for a random upstream gradient rounded to ``round_to``.

    A half ``dtype`` means autocast.
    """
    model.zero_grad(set_to_none=True)
    half = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(x.device.type, dtype if half else None, enabled=half):
        results = _tensors(model(x))
    followed = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(round_to).to(r) for r in followed]
    if followed:
        torch.autograd.backward(followed, upstream)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return [result.detach() for result in results], gradients


def _model_errors(result, expected):
    """Direction -> (worst error, where)."""
    (outputs, gradients), (exact_outputs, exact_gradients) = result, expected
    if len(outputs) != len(exact_outputs) or set(gradients) != set(exact_gradients):
        differing = sorted(set(gradients) ^ set(exact_gradients))
        raise AssertionError(f"not the same outputs and gradients as the plain model: {', '.join(differing)}")

    def size(value, exact):
        whole, row = testing.errors(value.cpu(), exact)
        return max(whole, row / testing.ROW_FACTOR)

    pairs = zip(outputs, exact_outputs, strict=True)
    worst = {"forward": max((size(v, e), f"output {i}") for i, (v, e) in enumerate(pairs))}
    if gradients:
        floor = GRADIENT_FLOOR * torch.stack([g.norm() for g in exact_gradients.values()]).norm().item()
        shares = {name: g.norm().item() / floor if floor else 1.0 for name, g in exact_gradients.items()}
        worst["backward"] = max(
            (size(gradients[name], exact) * min(1.0, shares[name] or 1 / floor), name)
            for name, exact in exact_gradients.items()
        )
    return worst
