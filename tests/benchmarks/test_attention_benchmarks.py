"""Benchmarks of Performer attention: its peers, the lengths, and where it overtakes softmax attention."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measure import harness, rows, run_file
from benchmarks.measure.run_file import RunFile
from benchmarks.report import __main__ as report
from benchmarks.report import crossover
from benchmarks.report.frame import frame
from benchmarks.report.goals import judge
from benchmarks.suites import attention, groups, operators, subjects
from benchmarks.suites.groups import Group, LeftOut
from benchmarks.suites.providers import Provider, providers
from support.rows import ENVIRONMENT, made_row
from t2t_fast import functional
from t2t_fast.ops._common import costs
from t2t_fast.testing import DTYPES, errors, tolerance

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def _group(tokens=77, batch=2, dtype="fp32", mode="training"):
    return Group("op", f"performer_attention-L{tokens}", None, batch, dtype, mode)


def _tensors(tokens=77, batch=2, norm=None):
    moving, parameters = attention.inputs(tokens, batch, torch.Generator().manual_seed(3))
    scale = 1.0 if norm is None else norm / attention.NORM
    q, k, v = (t.double().requires_grad_() for t in (scale * moving["q"], scale * moving["k"], moving["v"]))
    return {"q": q, "k": k, "v": v, "w": parameters["w"].double()}


def _run(subject, source):
    """The errors of output and worst gradient after the harness's own check."""
    implementation = subject.make(source)
    forward = harness._forward(subject, Provider("made up", "", source), implementation, "cpu")
    out = forward(0)
    subject.backward(out)(out)
    return subject.check(out.detach(), implementation.gradients(0), implementation)


@pytest.mark.parametrize("source", sorted(attention.FUNCTIONS))
def test_sources_agree_with_float64_at_any_length(source):
    error, gradient_error = _run(subjects.build(_group(), "cpu"), source)
    assert max(error, gradient_error) < 3e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_two_sdpa_is_no_straw_man_in_half_precision(dtype):
    """Within the tolerance that binds this package, which is ten times stricter than what a peer must keep."""
    error, gradient_error = _run(subjects.build(_group(dtype=dtype), "cpu"), "two-sdpa")
    assert error < tolerance("performer_attention", "forward", DTYPES[dtype])
    assert gradient_error < tolerance("performer_attention", "backward", DTYPES[dtype])


def test_two_sdpa_is_the_same_function_with_its_gate():
    """At norm 6 the gate is half open; the eps of the defining form decides the result."""
    tensors = _tensors(norm=6.0)
    expected = functional.performer_attention(**tensors, backend="reference")
    without_eps = functional.performer_attention(**tensors, eps=0.0, backend="reference")
    assert errors(attention.two_sdpa(**tensors), expected)[0] < 1e-12
    assert errors(without_eps, expected)[0] > 0.05


def test_truth_of_causal_attention():
    tensors = _tensors(tokens=130)
    out = attention.causal(**tensors)
    found = torch.autograd.grad(out.sum(), [tensors[name] for name in "qkv"])
    weights = (
        attention.positive_features(tensors["q"], tensors["w"])
        @ attention.positive_features(tensors["k"], tensors["w"]).mT
    ).tril()
    expected = weights @ tensors["v"] / weights.sum(-1, keepdim=True)
    gradients = torch.autograd.grad(expected.sum(), [tensors[name] for name in "qkv"])
    assert errors(out, expected)[0] < 1e-13
    for value, gradient in zip(found, gradients, strict=True):
        assert errors(value, gradient)[0] < 1e-11


def test_truth_of_softmax_attention_in_blocks(monkeypatch):
    tensors = _tensors(tokens=70)
    inputs = [tensors[name] for name in "qkv"]
    expected = attention.sdpa(**tensors)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    monkeypatch.setattr(attention, "BLOCK", 16 * 2 * 70)
    out = attention.softmax_in_blocks(**tensors)
    assert errors(out, expected)[0] < 1e-13
    for value, gradient in zip(torch.autograd.grad(out.square().sum(), inputs), gradients, strict=True):
        assert errors(value, gradient)[0] < 1e-12


def test_performer_pytorch_agrees_with_float64():
    try:
        attention.load("performer-pytorch", 77, 2, "training", "cpu")
    except LeftOut as reason:
        pytest.skip(str(reason))
    error, gradient_error = _run(subjects.build(_group(), "cpu"), "performer-pytorch")
    assert max(error, gradient_error) < 3e-6


def test_flash_linear_attention_says_what_it_lacks_on_a_cpu():
    with pytest.raises(LeftOut, match=r"flash-linear-attention.*(not installed|need a GPU|cannot be imported)"):
        attention.load("flash-linear-attention", 77, 2, "inference", "cpu")


def test_how_flash_linear_attention_is_called(monkeypatch):
    """With a stand-in for its kernel: layout, scale, normalisation, same features."""
    seen = {}

    def chunk_linear_attn(q, k, v, scale, normalize):
        seen.update(shape=tuple(q.shape), dtype=q.dtype, scale=scale, normalize=normalize)
        weights = (q.squeeze(2) @ k.squeeze(2).mT).tril()
        return (weights @ v.squeeze(2) / weights.sum(-1, keepdim=True)).unsqueeze(2), None

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", SimpleNamespace(chunk_linear_attn=chunk_linear_attn))
    tensors = _tensors()
    out = attention.load("flash-linear-attention", 77, 2, "inference", "cuda")(**tensors)
    assert seen == {"shape": (2, 77, 1, 32), "dtype": torch.float64, "scale": 1.0, "normalize": True}
    assert errors(out, attention.causal(**tensors))[0] < 1e-13


class Missing:
    """A finder, asked first, for which a package is not there."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("source", "package"), [("performer-pytorch", "performer_pytorch"), ("flash-linear-attention", "fla")]
)
def test_a_package_that_is_missing_is_left_out(source, package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    results = harness.measure(_group(mode="inference"), ["upstream", source], "cpu", 0.0, lambda text: None)
    assert isinstance(results[source], LeftOut)
    assert str(results[source]) == f"the package {source} is not installed"
    assert results["upstream"].times


def test_a_package_that_cannot_be_imported_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "performer_pytorch").mkdir()
    (tmp_path / "performer_pytorch" / "__init__.py").write_text("import a_module_that_is_gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("performer_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LeftOut, match=r"performer-pytorch cannot be imported .*a_module_that_is_gone"):
        attention.load("performer-pytorch", 77, 2, "inference", "cpu")


def test_a_package_that_is_wrong_is_left_out_and_fails_no_run(monkeypatch):
    monkeypatch.setitem(attention.PACKAGES, "performer-pytorch", lambda device: lambda q, k, v, w: v)
    results = harness.measure(_group(mode="inference"), ["performer-pytorch"], "cpu", 0.0, lambda text: None)
    assert isinstance(results["performer-pytorch"], LeftOut)
    assert "failed: AssertionError: op-performer_attention-L77-crossover" in str(results["performer-pytorch"])


@pytest.mark.parametrize(
    ("tokens", "batch", "mode", "device", "measured"),
    [
        (12544, 2, "inference", "cpu", True),
        (12544, 2, "training", "cpu", False),
        (50176, 1, "inference", "cpu", False),
        (200704, 1, "training", "cuda", True),
        (1_000_000, 1, "inference", "cuda", False),
    ],
)
def test_softmax_attention_is_left_out_where_it_takes_too_long(tokens, batch, mode, device, measured):
    if measured:
        assert attention.load("sdpa", tokens, batch, mode, device) is attention.sdpa
    else:
        with pytest.raises(LeftOut, match=r"its cost is quadratic: .* FLOPs a call"):
            attention.load("sdpa", tokens, batch, mode, device)
    assert attention.load("two-sdpa", tokens, batch, mode, device) is attention.two_sdpa


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lengths(device):
    full = [group for group in groups.groups("ops", device, quick=False) if groups.CROSSOVER in group.id]
    assert {group.subject.partition("-")[0] for group in full} == {"performer_attention"}
    lengths = [int(group.subject.partition("-L")[2]) for group in full]
    assert (min(lengths), max(lengths)) == (196, 1_000_000)
    dtypes = {group.dtype for group in full if group.subject.endswith("-L3136")}
    assert dtypes == set(groups.DTYPES[device] if device == "cuda" else groups.DTYPES[device][:1])
    assert {group.dtype for group in full if not group.subject.endswith("-L3136")} == {groups.DTYPES[device][0]}
    quick = [group for group in groups.groups("ops", device, quick=True) if groups.CROSSOVER in group.id]
    assert [(group.subject, group.mode) for group in quick] == [
        ("performer_attention-L3136", mode) for mode in groups.MODES
    ]
    names = [provider.name for provider in providers(full[0], "cpu")]
    assert {"sdpa", "two-sdpa", "performer-pytorch", "flash-linear-attention"} <= set(names)


def test_an_operator_of_a_length_has_so_many_tokens():
    built = operators.build("performer_attention-L50", None, 3)
    assert built.moving["q"].shape == (3, 50, 64)
    assert operators.build("performer_attention-stage2", 64, 1).moving["q"].shape == (1, 64, 64)


@pytest.mark.parametrize("element", [2, 4])
def test_every_input_is_read_once_and_every_output_written_once(element):
    length, width, m = 3136, 64, 32
    tensor, state = length * width * element, 4 * m * (width + 1)
    cost = costs.performer_attention(length, element=element)
    # q, k, v read, y written; the key state once out and once in
    assert cost.bytes("inference") == 4 * tensor + 2 * state
    # q, k, v, dY read, dq, dk, dv written; the key state in twice, its gradient out and in
    assert cost.bytes("training") - cost.bytes("inference") == 7 * tensor + 4 * state
    assert cost.saved == 3 * tensor + state
    assert state == 8320


def test_a_row_has_its_share_of_a_copy_and_of_what_must_be_saved():
    group = _group(tokens=3136, batch=4)
    cost = costs.performer_attention(3136, element=4)
    facts = {**dict.fromkeys(rows.FACTS), "cost": cost, "saved_bytes": 8 * cost.saved, "peak_bytes": 0}
    participant = harness.Participant("t2t_fast", None, None, None, times=[0.5, 0.5], facts=facts)
    limits = {"bytes_per_s": 4 * cost.bytes("training"), "flop_per_s": {"fp32": 1e12}}
    found = rows.rows(group, {"t2t_fast": participant}, limits, "cpu", {})["t2t_fast"]
    assert found["copy_share"] == 2.0
    assert found["saved_share"] == 0.5


def _row(provider, tokens, seconds, mode="inference", dtype="fp32", batch=1, **more):
    group = _group(tokens, batch, dtype, mode)
    return made_row(provider, [seconds] * 3, **{**group._asdict(), "group": group.id, "suite": "ops"}, **more)


def _sweep(mode="inference"):
    """Ours is linear, softmax attention quadratic and equal at 1000 tokens."""
    found = []
    for tokens in (100, 500, 2500, 12500):
        found.append(_row("upstream", tokens, 8e-6 * tokens, mode))
        found.append(_row("t2t_fast", tokens, 1e-6 * tokens, mode))
        if tokens < 12500:
            found.append(_row("sdpa", tokens, 1e-9 * tokens**2, mode))
    return found


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(100, 0.1), (500, 0.5), (2500, 2.5)], 1000),
        ([(100, 0.5), (200, 2.0)], 2**0.5 * 100),
        ([(100, 2.0), (200, 0.5), (400, 2.0)], 2**0.5 * 200),
        ([(100, 1.5), (200, 3.0)], None),
        ([(100, 0.5), (200, 0.9)], None),
        ([(100, 2.0), (200, 0.9)], None),
        ([(100, 2.0)], None),
    ],
    ids=["logarithms", "halfway", "the last one counts", "always faster", "never", "slower at the end", "one length"],
)
def test_crossing(points, expected):
    assert crossover.crossing(points) == (None if expected is None else pytest.approx(expected))


def test_crossover_in_words():
    found = [*_sweep(), _row("upstream", 3136, 1.0, dtype="bf16")]
    run = RunFile(ENVIRONMENT, found, [])
    curves = crossover.curves(frame(run))
    assert {(name, tuple(rows["length"])) for name, rows in curves.groupby("provider")} == {
        ("upstream", (100, 500, 2500, 12500)),
        ("t2t_fast", (100, 500, 2500, 12500)),
        ("sdpa", (100, 500, 2500)),
    }
    assert crossover.sentences(curves, run) == [
        "fp32, inference: t2t_fast is faster than softmax attention from about 1000 tokens on "
        "(0.10x its speed at 100 tokens, 2.50x at 2500)"
    ]
    assert "at every measured length" in crossover.words("training", "bf16", [(100, 1.1), (200, 3.0)])
    assert "not faster than" in crossover.words("training", "bf16", [(100, 0.1), (200, 0.9)])


def test_one_length_is_no_curve():
    rows = [_row("upstream", 3136, 1.0), _row("t2t_fast", 3136, 0.5)]
    assert crossover.curves(frame(RunFile(ENVIRONMENT, rows, []))).empty


@needs_matplotlib
def test_report_draws_the_crossover(tmp_path):
    found = _sweep() + _sweep("training") + [_row("t2t_fast-compiled", 500, 1e-4, peak=None)]
    reasons = [{"group": _group(12500).id, "provider": "sdpa", "reason": "its cost is quadratic"}]
    reasons.append({**reasons[0], "group": _group(50000).id})
    source = tmp_path / "rows.json"
    run_file.write(source, RunFile(ENVIRONMENT, found, reasons))
    written = report.write(source, tmp_path)
    assert tmp_path / "crossover.png" in written
    assert (tmp_path / "crossover.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'alt="Time and peak memory a token' in text
    assert text.count("from about 1000 tokens on") == 2
    assert _group(12500, 1).id in text
    assert f"<td>{reasons[0]['group']}, {reasons[1]['group']}</td><td>sdpa</td><td>its cost is quadratic</td>" in text


def test_goals_against_a_floor():
    group = dict(dtype="bf16", batch=64)
    ours = _row("t2t_fast", 3136, 1e-4, copy_share=0.55, saved_share=None, **group)
    training = _row("t2t_fast", 3136, 2e-4, "training", copy_share=0.5, saved_share=1.0, **group)
    softmax = _row("sdpa", 3136, 6e-4, **group)
    found = {goal.what.partition(", L = 3136")[2]: goal for goal in judge([ours, training, softmax])}
    copied = found[", bfloat16, inference: bytes that must move, at the speed of a copy"]
    assert (copied.wanted, copied.measured, copied.verdict) == ("60 %", "55 %", "not reached")
    saved = found[", bfloat16, training: q, k, v and 8.3 kB a sequence of what is saved for backward"]
    assert (saved.measured, saved.verdict) == ("100 %", "reached")
    assert found[", bfloat16, inference: t2t_fast faster than sdpa"].measured.startswith("6.00x")
    assert len(found) == 3
