"""``python -m benchmarks.questions.stability``: error against norm, of upstream's form and of ours."""

import importlib.util
import math
import re

import pytest
import torch

from benchmarks.questions import stability
from support import ROOT
from t2t_fast import backends, functional
from t2t_fast.testing import exact_attention

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
OP = "performer_attention"
CELLS = stability.COLUMNS


@pytest.fixture(scope="module")
def found():
    """Results at norms below, at and beyond the gate, with few tokens."""
    return stability.measure("cpu", "aten", norms=(0, 2, 4, 8, 40), seeds=2, length=24)


@pytest.fixture
def short(monkeypatch):
    """A function that restricts ``main`` to the given norms, with one seed and few tokens."""

    def use(*norms):
        def measure(device, backend):
            return full(device, backend, norms=norms, seeds=1, length=12)

        monkeypatch.setattr(stability, "measure", measure)

    full = stability.measure
    return use


def test_the_truth_is_the_defining_form():
    """In float64 at moderate norms the reference agrees with the truth, including gate and gradients."""
    for norm in (0.0, 2.0, 5.5):
        *tensors, w, gradient = stability.inputs(norm, seed=3, length=20)
        assert all(t.norm(dim=-1).sub(norm).abs().max() < 1e-5 for t in tensors[:2])
        results = []
        for function in (
            lambda q, k, v, w: exact_attention(q, k, v, w)[0],
            lambda q, k, v, w: functional.performer_attention(q, k, v, w.double(), backend="reference"),
        ):
            results.append(stability._run(function, [t.double() for t in tensors], w, gradient))
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_upstream_breaks_in_float16_and_ours_does_not(found):
    """Beyond the gate upstream divides 0 by 0 in float16, forward and backward; ours is finite in every dtype."""
    for norm in (8, 40):
        assert all(math.isnan(value) for value in found[norm]["upstream", "fp16"])
    assert not any(math.isnan(value) for norm in (0, 2, 4) for value in found[norm]["upstream", "fp16"])
    for cells in found.values():
        assert not any(math.isnan(value) for name in ("fp32", "bf16", "fp16") for value in cells["t2t_fast", name])


def test_ours_is_at_least_as_exact(found):
    """At norms where both are finite; in the half types only the results are rounded, to 2^-11 or 2^-8."""
    for norm in (0, 2, 4):
        for name, allowed in (("fp32", 5e-6), ("bf16", 2.0**-8), ("fp16", 2.0**-11)):
            ours, theirs = found[norm]["t2t_fast", name], found[norm]["upstream", name]
            assert max(ours) <= allowed
            if name != "fp32":
                assert all(a < b for a, b in zip(ours, theirs, strict=True))


def test_the_gate_closes_as_norms_grow(found):
    gates = [cells["gate"] for cells in found.values()]
    assert gates == sorted(gates, reverse=True)
    assert gates[0] > 0.999 and gates[-1] < 1e-6
    for form, name in CELLS:
        if (form, name) != ("upstream", "fp16"):
            assert max(found[40][form, name]) == 0, "beyond the gate everything is 0, and so is its error"


def test_planted_errors_are_reported(monkeypatch):
    """Outputs and gradients that are 1 % too large or not finite appear in the errors."""

    def spoil(factor):
        def attend(q, k, v, w, backend):
            y = exact_attention(q, k, v, w)[0]
            return y + (factor - 1) * (y - y.detach()) if backend == "aten" else y * factor

        monkeypatch.setattr(stability, "performer_attention", attend)

    spoil(1.01)
    for backend, forward in (("aten", 0.0), ("native", 0.01)):
        cells = stability.measure("cpu", backend, norms=(2,), seeds=1, length=8)[2]
        assert cells["t2t_fast", "fp32"] == pytest.approx((forward, 0.01), abs=1e-6)
    spoil(math.inf)
    found = stability.measure("cpu", "native", norms=(2,), seeds=1, length=8)
    assert all(math.isnan(value) for value in found[2]["t2t_fast", "fp32"])


def test_table(found):
    lines = stability.table(found).splitlines()
    assert len(lines) == 2 + len(found) and {line.count("|") for line in lines} == {3 + len(CELLS)}
    for norm, line in zip(found, lines[2:], strict=True):
        assert line.startswith(f"| {norm} | ")
        assert line.count("NaN") == (2 if norm >= 8 else 0)
        assert all(re.fullmatch(r"\S+ / \S+", cell.strip()) for cell in line.split("|")[3:-1])


def test_main_prints_the_table(short, capsys):
    short(1, 8)
    assert stability.main(["--device", "cpu", "--backend", "aten"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 1 | 1.00 |") and lines[3].startswith("| 8 | ")
    assert lines[5].startswith("t2t_fast: fp32 aten, bf16 aten, fp16 aten. cpu, torch ")


def test_auto_names_the_selected_backends():
    assert re.match(
        r"t2t_fast: fp32 (native|aten), bf16 (native|aten), fp16 (native|aten)\. cpu", stability.heading("cpu")
    )


def test_main_fails_where_ours_is_not_finite(short, monkeypatch):
    short(1)
    monkeypatch.setattr(stability, "performer_attention", lambda q, *rest, **options: q * math.nan)
    monkeypatch.setattr(stability, "_run", lambda function, leaves, w, gradient: [function(*leaves, w)] * 4)
    assert stability.main(["--device", "cpu"]) == 1


def test_a_backend_that_cannot_run_is_an_error_with_its_reason(short, monkeypatch, capsys):
    short(1)
    implementations = {name: each for name, each in backends._tables[OP].items() if name != "native"}
    monkeypatch.setitem(backends._tables, OP, implementations)
    monkeypatch.setitem(backends._absent, OP, {**backends._absent[OP], "native": "left out by this test"})
    with pytest.raises(SystemExit) as stopped:
        stability.main(["--device", "cpu", "--backend", "native"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "backend 'native' cannot run on cpu" in message and "native: left out by this test" in message


@needs_matplotlib
def test_figure(found, tmp_path, monkeypatch):
    """A PNG with two panels; crosses mark the values that are not finite, and only these."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: (drawn.append(figure), save(figure, *args, **more))
    )
    stability.draw(found, "words", tmp_path / "figure.png")
    (figure,) = drawn
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and len(figure.axes) == 2
    for axis in figure.axes:
        crosses = [(line.get_color(), list(line.get_xdata())) for line in axis.lines if line.get_marker() == "x"]
        assert [each for each in crosses if each[1]] == [(stability.COLORS["fp16"], [3, 4])]


def test_documented_table_is_current():
    """docs/performer.md: the table's columns, norms and gates (measured again), and NaN only in upstream's float16."""
    text = (ROOT / "docs" / "performer.md").read_text()
    header, _, *rows = [
        line for line in text.splitlines() if line.startswith("|") and line.count("|") == 3 + len(CELLS)
    ]
    empty = {"gate": 0.0, **dict.fromkeys(CELLS, (0.0, 0.0))}
    assert header == stability.table({0: empty}).splitlines()[0]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [f"{norm:g}" for norm in stability.NORMS]
    for norm, (_, gate, *numbers) in zip(stability.NORMS, cells, strict=True):
        assert float(gate) == pytest.approx(stability.mean_gate(norm), rel=0.06)
        lost = ["NaN" in number for number in numbers]
        assert lost == [norm >= 5 and column == ("upstream", "fp16") for column in CELLS]
