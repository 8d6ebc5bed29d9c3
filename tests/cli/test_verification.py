"""``verify``: green on a sound build, red on a wrong one, and a note for what it did not run."""

import copy

import pytest
import torch
from torch import nn

from t2t_fast import backends, reference, testing
from t2t_fast.errors import NothingToSwap
from t2t_fast.interop.swap import swap
from t2t_fast.models import build_model
from t2t_fast.ops._common import triton_runtime
from t2t_fast.verification import MODEL, VerifyReport, VerifyRow, verify

OPS = list(testing.CASES)


@pytest.fixture
def small():
    """An upstream-shaped model that takes a second, with biases and norms off their initial values."""
    model = reference.T2T_ViT(32, num_classes=5, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, token_dim=16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def replace(monkeypatch, op, backend, change):
    """Apply ``change`` to the result of an operator's implementation."""
    sound = backends.implementation(op, backend)
    wrong = sound._replace(call=lambda *args: change(sound.call(*args)))
    monkeypatch.setitem(backends._tables[op], backend, wrong)


def default_backend(op):
    """The backend that ``auto`` selects on this CPU."""
    return backends.explain(op, device="cpu").chosen(op)


@pytest.mark.parametrize("op", OPS)
def test_operator_is_green(op):
    report = verify(op, device="cpu", dtypes=["fp32", "bf16"])
    assert report.ok, str(report)
    ran = {(row.backend, row.dtype, row.direction) for row in report.checked}
    for backend in ("aten", "reference"):
        for dtype in ("fp32", "bf16"):
            assert {(backend, dtype, "forward"), (backend, dtype, "backward")} <= ran
    assert all(row.error <= row.tolerance for row in report.checked)


def test_small_models_are_green_in_every_dtype():
    report = verify(MODEL, device="cpu")
    assert report.ok, str(report)
    assert {(row.dtype, row.direction) for row in report.checked} == {
        (dtype, direction) for dtype in testing.DTYPES for direction in ("forward", "backward")
    }
    assert len({row.what for row in report.checked}) == 2


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.001, lambda y: y.masked_fill(torch.arange(y.shape[-1]) == 0, torch.nan), lambda y: y[:, 1:]],
    ids=["scaled", "nan", "shape"],
)
def test_wrong_implementation_is_red(monkeypatch, change):
    replace(monkeypatch, "soft_split_linear", "aten", change)
    report = verify("soft_split_linear", dtypes="fp32", backends="aten", device="cpu")
    assert not report.ok and report.failures
    assert "FAILED" in str(report) and "FAILED" in report.paste() and "FAILED" in report.verdict


def test_raising_implementation_is_red_and_named(monkeypatch):
    def broken(_):
        raise RuntimeError("kernel fell over\nsecond line")

    replace(monkeypatch, "token_mlp", "aten", broken)
    report = verify("token_mlp", dtypes="fp32", device="cpu")
    assert [(row.backend, row.note) for row in report.failures] == [("aten", "raised RuntimeError: kernel fell over")]
    assert "raised RuntimeError: kernel fell over" in str(report)
    assert any(row.backend == "reference" and row.ok for row in report.rows)


def test_wrong_gradient_is_red(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    replace(monkeypatch, "performer_attention", "aten", Wrong.apply)
    report = verify("performer_attention", dtypes="fp32", backends="aten", device="cpu")
    assert [row.direction for row in report.failures] == ["backward"]


@pytest.mark.parametrize("size", [1e-4, 1e-2], ids=["below swap's tolerance", "above"])
def test_wrong_operator_makes_the_model_red(monkeypatch, size):
    replace(monkeypatch, "performer_layer", default_backend("performer_layer"), lambda y: y * (1 + size))
    report = verify(MODEL, dtypes="fp32", device="cpu")
    assert {row.what for row in report.failures} == {"small T2T-ViT, performer"}
    assert "FAILED" in str(report) and "FAILED" in report.paste()


@pytest.fixture
def without_native(monkeypatch):
    """No operator has a native implementation."""
    for op in OPS:
        if "native" in backends._tables[op]:
            monkeypatch.delitem(backends._tables[op], "native")
        monkeypatch.setitem(backends._absent[op], "native", "not here")


@pytest.mark.usefixtures("without_native")
class TestUnavailable:
    def test_is_a_note_by_default(self):
        report = verify("soft_split", dtypes="fp32", device="cpu")
        row = next(row for row in report.rows if row.backend == "native")
        assert report.ok and row.ok is None and row.note == "not here"
        assert "native: not here (soft_split)" in str(report)

    def test_is_a_failure_if_asked_for(self):
        report = verify("soft_split", dtypes="fp32", backends="native", device="cpu")
        assert not report.ok and [row.note for row in report.failures] == ["not here"]

    def test_is_a_failure_for_a_model_if_asked_for(self):
        assert not verify(MODEL, dtypes="fp32", backends=["native"], device="cpu").ok

    def test_is_a_note_if_it_ran_elsewhere(self, monkeypatch):
        for op in ("soft_split", "soft_composition"):
            monkeypatch.setitem(backends._tables[op], "native", backends.implementation(op, "aten"))
        report = verify(dtypes="fp32", backends="native", device="cpu")
        assert report.ok, str(report)
        assert {row.what for row in report.checked} >= {"soft_split", "soft_composition"}


class TestPassedOver:
    """A backend that could run, but ``auto`` selects a faster one, as on a CPU without AVX2."""

    @pytest.fixture(autouse=True)
    def slow_native(self, monkeypatch):
        sound = backends.implementation("soft_split", "aten")
        slow = sound._replace(passed_over=lambda request: f"slow on {request.device}")
        monkeypatch.setitem(backends._tables["soft_split"], "native", slow)

    def test_is_a_note_by_default(self):
        report = verify("soft_split", dtypes="fp32", device="cpu")
        assert report.ok and "native" not in {row.backend for row in report.checked}
        assert "native: available, passed over by auto: slow on cpu (soft_split)" in str(report)

    def test_is_compared_if_asked_for(self):
        report = verify("soft_split", dtypes="fp32", backends="native", device="cpu")
        assert report.ok and {row.backend for row in report.checked} == {"native"}

    def test_is_compared_if_it_was_chosen(self):
        with backends.backend("native", "soft_split"):
            report = verify("soft_split", dtypes="fp32", device="cpu")
        assert report.ok and "native" in {row.backend for row in report.checked}


def test_interpreted_kernels_are_a_note_by_default():
    """They take minutes."""
    if not triton_runtime.INTERPRETED:
        pytest.skip("triton: its kernels are not interpreted here")
    report = verify("token_mlp", dtypes="fp32", device="cpu")
    assert report.ok and "triton: available, passed over by auto: Triton's interpreter is for tests" in str(report)


class TestModules:
    def test_plain_module_is_verified_as_swap_makes_it(self, small):
        before = copy.deepcopy(small.state_dict())
        report = verify(small, dtypes=["fp32", "fp64"])
        assert report.ok, str(report)
        assert {row.what for row in report.rows} == {"T2T_ViT, swapped"}
        assert type(small.tokens_to_token) is reference.T2T_module and small.training
        assert all(torch.equal(value, small.state_dict()[name]) for name, value in before.items())
        assert all(parameter.grad is None for parameter in small.parameters())

    def test_swapped_module_against_its_plain_form(self, small):
        swap(small)
        report = verify(small, testing.natural_images(1, 3, 32, 32), dtypes=["fp32", torch.bfloat16])
        assert report.ok, str(report)
        assert {(row.what, row.dtype) for row in report.rows} == {("T2T_ViT", "fp32"), ("T2T_ViT", "bf16")}

    def test_swapped_module_on_an_image_upstream_cannot_take(self, small):
        module = small.tokens_to_token
        swap(module)
        report = verify(module, testing.natural_images(1, 3, 32, 48), dtypes="fp32")
        assert report.ok, str(report)

    def test_own_model(self):
        model = build_model("t2t_vit_7", img_size=32, num_classes=3)
        assert verify(model, dtypes="fp32").ok

    def test_wrong_swap_is_red(self, small, monkeypatch):
        swap(small)
        replace(monkeypatch, "performer_layer", default_backend("performer_layer"), lambda y: y * 1.001)
        assert not verify(small, dtypes="fp32").ok

    def test_frozen_module_has_no_backward_rows(self, small):
        report = verify(small.requires_grad_(False), dtypes="fp32")
        assert report.ok and [row.direction for row in report.rows] == ["forward"]

    def test_nothing_to_verify(self):
        with pytest.raises(NothingToSwap):
            verify(nn.Linear(3, 3), torch.randn(2, 3))

    def test_wrong_input(self, small):
        with pytest.raises(ValueError, match=r"T2T_ViT, swapped does not take x of shape \(1, 3, 32, 64\)"):
            verify(small, torch.randn(1, 3, 32, 64))
        with pytest.raises(TypeError, match="x must be a floating"):
            verify(small, torch.zeros(1, 3, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        (("nope",), {}, ValueError, "operator must be one of soft_split"),
        ((3,), {}, TypeError, "got int"),
        (("soft_split", torch.zeros(1)), {}, TypeError, "no module was given"),
        (("soft_split",), {"dtypes": "fp8"}, ValueError, "dtypes must be of fp32"),
        (("soft_split",), {"dtypes": torch.int32}, ValueError, "dtypes must be of fp32"),
        (("soft_split",), {"dtypes": []}, ValueError, "dtypes must be of fp32"),
        (("soft_split",), {"backends": ["cuda"]}, ValueError, "backends must be of auto"),
    ],
    ids=["op", "type", "stray x", "dtype name", "dtype", "no dtype", "backend"],
)
def test_bad_arguments(args, options, error, text):
    with pytest.raises(error, match=text):
        verify(*args, **options)


def test_progress_and_precision_flag():
    seen = []
    torch.set_float32_matmul_precision("high")
    try:
        verify("soft_split", dtypes=["fp32", "fp64"], device="cpu", progress=lambda *args: seen.append(args))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [(done, total) for done, total, _ in seen] == [(0, 2), (1, 2), (2, 2)]


def test_empty_report_is_not_ok():
    environment = {"device": "none"}
    assert not VerifyReport((), environment, 0.0).ok
    assert not VerifyReport((VerifyRow("soft_split", "native", "fp32", "", note="why"),), environment, 0.0).ok


def test_paste_is_a_markdown_table():
    lines = verify("soft_split", dtypes=["fp32", "bf16"], device="cpu").paste().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| forward / backward error of | backend | fp32 | bf16 |"
    assert len({line.count("|") for line in table}) == 1 and len(table) >= 4
    assert any(line.startswith("- torch: ") for line in lines)
