"""Selection of a backend: argument, context, environment, reasons."""

import subprocess
import sys

import pytest
import torch

import t2t_fast
from t2t_fast import backends, functional
from t2t_fast.backends import Request
from t2t_fast.errors import BackendUnavailable

CPU = Request("cpu", torch.float32, {})


@pytest.mark.parametrize("op", backends.operators())
def test_auto_selects_the_first_supported_backend(op):
    """Native where it is built and has a kernel, otherwise aten; never interpreted kernels."""
    reasons = {name: backends.reason(op, name, CPU) for name in backends.ORDER if name != "triton"}
    assert reasons["aten"] is None and reasons["reference"] is None
    assert backends.resolve(op, CPU) == next(name for name, reason in reasons.items() if reason is None)


@pytest.mark.parametrize("op", backends.operators())
@pytest.mark.parametrize("name", ["triton", "native"])
def test_explicit_backend_runs_or_raises_with_every_reason(op, name):
    reason = backends.reason(op, name, CPU)
    if reason is None:
        assert backends.resolve(op, CPU, name) == name
        return
    with pytest.raises(BackendUnavailable) as caught:
        backends.resolve(op, CPU, name)
    text = str(caught.value)
    assert op in text and f"  {name}: {reason}" in text and all(f"  {each}: " in text for each in backends.ORDER)


def test_functional_argument_wins_over_the_context():
    x = torch.randn(1, 3, 8, 8)
    with t2t_fast.backend("triton"):
        with pytest.raises(BackendUnavailable, match="soft_split: backend 'triton'"):
            functional.soft_split(x, 3)
        functional.soft_split(x, 3, backend="reference")


def test_backend_skipped_by_auto_runs_by_name(monkeypatch):
    table = dict(backends._tables["soft_split"])
    slow = backends.Implementation(table["aten"].call, backends.always, lambda request: f"slow on {request.device}")
    monkeypatch.setitem(backends._tables, "soft_split", {**table, "native": slow})
    verdicts = {name: verdict for _, name, verdict in t2t_fast.explain("soft_split", device="cpu").rows}
    assert verdicts["native"] == "available, passed over by auto: slow on cpu" and verdicts["aten"] == "chosen"
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(functional.soft_split(x, 3, backend="native"), functional.soft_split(x, 3, backend="aten"))


def test_contexts_nest_and_are_restored_after_an_error():
    unset = t2t_fast.explain("token_mlp").chosen("token_mlp")
    with t2t_fast.backend("reference"):
        assert t2t_fast.explain("token_mlp").chosen("token_mlp") == "reference"
        with t2t_fast.backend("aten", op="token_mlp"):
            assert t2t_fast.explain().chosen("token_mlp") == "aten"
            assert t2t_fast.explain().chosen("soft_split") == "reference"
        with pytest.raises(KeyError), t2t_fast.backend("auto"):
            assert t2t_fast.explain().chosen("token_mlp") == unset
            raise KeyError
        assert t2t_fast.explain().chosen("token_mlp") == "reference"
    assert t2t_fast.explain("token_mlp").chosen("token_mlp") == unset


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"backend: name must be one of auto, .*got 'fast'"), t2t_fast.backend("fast"):
        pass
    with (
        pytest.raises(ValueError, match=r"backend: op must be one of .*got 'softsplit'"),
        t2t_fast.backend("aten", "softsplit"),
    ):
        pass
    with pytest.raises(ValueError, match="explain: op must be one of"):
        t2t_fast.explain("nothing")
    with pytest.raises(ValueError, match=r"soft_split: backend must be one of .*got 'cuda'"):
        functional.soft_split(torch.randn(1, 1, 4, 4), 2, backend="cuda")


def test_explain_has_a_verdict_for_every_operator_and_backend():
    explanation = t2t_fast.explain(device="cpu")
    assert len(explanation.rows) == len(backends.operators()) * len(backends.ORDER)
    text = str(explanation)
    for op, name, verdict in explanation.rows:
        assert verdict and op in text and name in text
    assert "chosen" in text and "no Triton kernel" in text


def test_auto_falls_back_on_a_reason_not_on_an_exception(monkeypatch):
    """``auto`` skips a backend that reports a reason; it never hides an exception of an implementation."""
    table = dict(backends._tables["soft_split"])

    def broken(*arguments):
        raise RuntimeError("broken kernel")

    table["native"] = backends.Implementation(broken, lambda request: None)
    monkeypatch.setitem(backends._tables, "soft_split", table)
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="broken kernel"):
        functional.soft_split(x, 2)
    table["native"] = backends.Implementation(broken, lambda request: f"no {request.device} kernel")
    functional.soft_split(x, 2)
    assert ("soft_split", "native", "no cpu kernel") in t2t_fast.explain(device="cpu").rows


def test_register_without_a_reason_for_an_absent_backend_raises():
    with pytest.raises(ValueError, match="new_op: every backend needs an implementation or a reason"):
        backends.register("new_op", {"aten": None}, {"triton": "no"})
    assert "new_op" not in backends.operators()


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "reference"), ("gpu", "T2T_FAST_BACKEND must be one of")]
)
def test_environment_sets_the_default(value, expected):
    code = "import t2t_fast; print(t2t_fast.explain('soft_split', device='cpu').chosen('soft_split'))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"T2T_FAST_BACKEND": value, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert expected in run.stdout + run.stderr
