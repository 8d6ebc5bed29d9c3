"""The command ``t2t-fast``: exit codes, one-line errors, progress."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import t2t_fast
from support.command import run
from t2t_fast import backends, testing
from t2t_fast.cli import bench, env
from t2t_fast.cli.arguments import EXPORT_FORMATS
from t2t_fast.cli.common import CommandError, Progress, UsageError
from t2t_fast.interop.export import FORMATS
from t2t_fast.ops._common import native_library

ROOT = Path(t2t_fast.__file__).parents[1]


def test_help_and_version(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and not err
    commands = ("demo", "verify", "env", "bench", "export", "convert")
    assert all(re.search(rf"^    {name} ", out, re.M) for name in commands)
    assert run(capsys, "--version") == (0, f"t2t-fast {t2t_fast.__version__}\n", "")
    for name in commands:
        code, out, _ = run(capsys, name, "-h")
        assert code == 0 and out.startswith(f"usage: t2t-fast {name}") and "(default: None)" not in out


def test_module_runs_and_help_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['t2t-fast', '--help']; code = None\n"
        "try: runpy.run_module('t2t_fast', run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'matplotlib', 'PIL', 'onnx', 'onnxruntime', 'timm', 'torchvision', 'jinja2', 't2t_fast.demo'};"
        "sys.exit(code or ', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: t2t-fast"), done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["verify", "--nonsense"], 2, "unknown arguments: --nonsense"),
        (["verify", "--op", "nope"], 2, "--op must be one of soft_split"),
        (["verify", "--dtype", "fp8"], 2, "invalid choice: 'fp8'"),
        (["demo", "--photo", "no/such/photo.png"], 2, "there is no file no/such/photo.png"),
        (["demo", "--checkpoint", "no/such.pth"], 2, "there is no file no/such.pth"),
        (["demo", "--model", "resnet50"], 2, "--model must be one of t2t_vit_7"),
        (["demo", "--img-size", "100"], 2, "--img-size must be a multiple of 16"),
        (["demo", "--img-size", "0"], 2, "must be a whole number of at least 1"),
        (["demo", "--batch", "few"], 2, "must be a whole number of at least 1"),
        (["demo", "--seconds", "-1"], 2, "must be a number of seconds"),
        (["export", "t2t_vit_7"], 2, "required: --out"),
        (["export", "resnet50", "--out", "x"], 2, "unknown model 'resnet50'"),
        (["export", "t2t_vit_7", "--out", "x", "--img-size", "1", "2", "3"], 2, "a side or H W"),
        (["export", "t2t_vit_7", "--out", "x", "--format", "tflite"], 2, "invalid choice: 'tflite'"),
        (
            ["export", "t2t_vit_7", "--out", "x", "--format", "program", "--triton-repository", "y"],
            2,
            "needs --format onnx, onnx-int8, aoti, got program",
        ),
        (["export", "t2t_vit_7", "--out", "x", "--checkpoint", "no.pth"], 2, "there is no file no.pth"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line(capsys, argv, code, text):
    got, out, err = run(capsys, *argv)
    assert got == code and not out
    assert err.startswith("t2t-fast") and text in err and err.count("\n") == 1


def test_no_command_prints_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and out.startswith("usage: t2t-fast")


def test_cuda_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "verify", "--op", "soft_split", "--device", "cuda")
    assert code == 1 and "finds no CUDA device" in err and err.count("\n") == 1


def test_interrupt(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("t2t_fast.cli.env.collect", lambda: interrupted(None))
    assert run(capsys, "env") == (130, "", "t2t-fast: interrupted\n")


def test_verify_green(capsys):
    code, out, _ = run(
        capsys, "verify", "--device", "cpu", "--op", "soft_split", "--op", "token_mlp", "--dtype", "fp32"
    )
    assert code == 0
    assert "comparisons within their tolerances" in out
    assert "| token_mlp | aten |" in out and "| soft_split | aten |" in out


def test_verify_red(capsys, monkeypatch):
    sound = backends.implementation("soft_split_linear", "aten")
    wrong = sound._replace(call=lambda *args: sound.call(*args) * 1.001)
    monkeypatch.setitem(backends._tables["soft_split_linear"], "aten", wrong)
    code, out, _ = run(capsys, "verify", "--device", "cpu", "--op", "soft_split_linear", "--dtype", "fp32")
    assert code == 1 and "FAILED" in out
    assert re.search(r"\| soft_split_linear \| aten \| \*\*FAILED\*\*", out)


def test_verify_red_for_a_backend_that_is_not_there(capsys, monkeypatch):
    monkeypatch.delitem(backends._tables["soft_split"], "native", raising=False)
    monkeypatch.setitem(backends._absent["soft_split"], "native", "not here")
    code, out, _ = run(capsys, "verify", "--device", "cpu", "--op", "soft_split", "--backend", "native")
    assert code == 1 and "native: not here (soft_split)" in out


@pytest.fixture
def untested_kernels(monkeypatch):
    """Skip the Triton kernels' self-test, which ``env`` reports and which takes long in the interpreter."""
    for table in backends._tables.values():
        if "triton" in table:
            monkeypatch.setitem(table, "triton", table["triton"]._replace(supports=lambda request: "not tried"))


@pytest.mark.usefixtures("untested_kernels")
def test_env_text(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0
    for words in ("versions", "system", "GPUs", "native build", "settings", "backends on cpu", torch.__version__):
        assert words in out
    for op in backends.operators():
        assert re.search(rf"^  {op} +\w+", out, re.M)
    if native_library.instruction_set() is not None:
        assert re.search(r"^  CPU kernels +float32 by \w+, bfloat16 by \w+", out, re.M)


def test_env_says_how_bfloat16_is_multiplied(monkeypatch):
    for unit in ("amx", "avx512_bf16"):
        monkeypatch.setattr(native_library, "instruction_set", lambda bf16=False, unit=unit: unit if bf16 else "avx512")
        assert env._native()["CPU kernels"] == f"float32 by avx512, bfloat16 by {unit}"
    monkeypatch.setattr(native_library, "instruction_set", lambda bf16=False: "avx2")
    words = "float32 by avx2, bfloat16 by float32 products of avx2: neither AMX nor AVX512_BF16"
    assert env._native()["CPU kernels"] == words


@pytest.mark.usefixtures("untested_kernels")
def test_env_json(capsys, monkeypatch):
    monkeypatch.setenv("T2T_FAST_SOMETHING", "shown")
    code, out, _ = run(capsys, "env", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["T2T_FAST_SOMETHING"] == "shown"
    assert set(report["backends"]["cpu"]) == set(backends.operators())
    for entry in report["backends"]["cpu"].values():
        assert set(entry["chosen"]) == set(testing.DTYPES)
        assert set(entry["reasons"]) == set(backends.ORDER) and "chosen" in entry["reasons"].values()


class TestInvalidBackendVariable:
    """``env`` says what is wrong; every other command stops with one line."""

    @pytest.mark.parametrize(
        ("value", "words"),
        [("gpu", "must be one of auto, "), ("triton", "none: the requested backend cannot run")],
    )
    @pytest.mark.usefixtures("untested_kernels")
    def test_env(self, capsys, monkeypatch, value, words):
        monkeypatch.setattr(backends, "_DEFAULT", value)
        code, out, _ = run(capsys, "env")
        assert code == 0 and words in out

    def test_other_commands(self):
        environment = {**os.environ, "T2T_FAST_BACKEND": "gpu"}
        command = [sys.executable, "-m", "t2t_fast", "demo"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("t2t-fast: error: T2T_FAST_BACKEND must be one of")
        assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("untested_kernels")
def test_env_says_why_there_are_no_operators_for_cuda(capsys, monkeypatch):
    info = dict.fromkeys(("mode", "compiler", "torch", "cuda"))
    monkeypatch.setattr("t2t_fast._extension.build_info", lambda: info)
    monkeypatch.setattr("t2t_fast._extension.lacking", lambda device: f"not built for {device}, for a test")
    _, out, _ = run(capsys, "env")
    assert re.search(r"operators for CUDA +not built for cuda, for a test\n", out)


@pytest.mark.usefixtures("untested_kernels")
def test_env_says_why_there_is_no_native_build(capsys, monkeypatch):
    monkeypatch.setattr("t2t_fast._extension.build_info", lambda: None)
    monkeypatch.setattr("t2t_fast._extension.load_error", lambda: "not built, for a test")
    monkeypatch.setattr("t2t_fast._extension.operators_error", lambda: "broken, for a test")
    _, out, _ = run(capsys, "env")
    assert re.search(r"native build\n +t2t_fast\._C +not built, for a test\n", out)
    assert re.search(r"\n +t2t_fast\._ops +broken, for a test\n", out)


def test_bench_outside_the_source_tree(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    code, _, err = run(capsys, "bench")
    assert code == 1 and "part of the source tree" in err and err.count("\n") == 1


def test_bench_hands_its_arguments_on(capsys, monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").touch()
    seen = []
    suite = types.ModuleType("benchmarks.__main__")
    suite.main = lambda argv: seen.append(argv) or 5
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "benchmarks", types.ModuleType("benchmarks"))
    monkeypatch.setitem(sys.modules, "benchmarks.__main__", suite)
    assert run(capsys, "bench", "--quick", "--out", "here", "--filter", "module")[0] == 5
    assert run(capsys, "bench", "--resume", "--report", "there", "--compare", "a", "b")[0] == 5
    assert seen == [
        ["--quick", "--report", "here", "--filter", "module"],
        ["--resume", "--report", "there", "--compare", "a", "b"],
    ]


class TestExport:
    def test_arguments(self, capsys, monkeypatch):
        seen = {}

        def record(model, folder, **options):
            seen.update(options, model=model, folder=folder)
            return "a table"

        monkeypatch.setattr("t2t_fast.interop.export.export_model", record)
        code, out, _ = run(
            capsys,
            "export",
            "t2t_vit_7",
            "--out",
            "there",
            "--img-size",
            32,
            48,
            "--format",
            "onnx",
            "--num-classes",
            4,
        )
        assert code == 0 and "a table" in out and "weights are random" in out
        assert isinstance(seen.pop("model"), t2t_fast.T2TViT)
        expected = {"folder": "there", "img_size": (32, 48), "formats": ("onnx",), "name": "t2t_vit_7"}
        assert expected.items() <= seen.items()

    def test_formats(self, capsys, monkeypatch):
        seen = {}
        monkeypatch.setattr("t2t_fast.interop.export.export_model", lambda *_, **options: seen.update(options))
        common = ("export", "t2t_vit_7", "--out", "there", "--img-size", 32, "--dynamic-batch", "--dynamic-size")
        assert run(capsys, *common, "--format", "both", "--format", "openvino", "--format", "onnx")[0] == 0
        assert seen["formats"] == ("onnx", "program", "openvino")
        assert run(capsys, *common, "--aoti")[0] == 0
        assert seen["formats"] == ("aoti",)
        assert seen["dynamic_batch"] is True and seen["dynamic_size"] is True
        assert set(EXPORT_FORMATS) == {"both", *FORMATS}

    def test_failure_is_one_line(self, capsys, monkeypatch):
        def refuse(*_, **__):
            raise ImportError("export_model: format 'onnx' needs onnx")

        monkeypatch.setattr("t2t_fast.interop.export.export_model", refuse)
        code, _, err = run(capsys, "export", "t2t_vit_7", "--out", "x", "--img-size", 32)
        assert (code, err) == (1, "t2t-fast: error: export_model: format 'onnx' needs onnx\n")

    def test_corrupt_checkpoint(self, capsys, tmp_path):
        path = tmp_path / "weights.pth"
        path.write_bytes(b"not a checkpoint")
        code, _, err = run(capsys, "export", "t2t_vit_7", "--out", tmp_path, "--checkpoint", path)
        assert code == 1 and err.startswith("t2t-fast: error: ") and "could not be read" in err

    @pytest.mark.slow
    def test_program(self, capsys, tmp_path):
        code, out, _ = run(
            capsys,
            "export",
            "t2t_vit_7",
            "--out",
            tmp_path,
            "--img-size",
            32,
            "--format",
            "program",
            "--num-classes",
            3,
        )
        assert code == 0 and "program" in out
        program = torch.export.load(str(tmp_path / "t2t_vit_7.pt2"))
        assert program.module()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


class Terminal:
    """A stream that reports whether it is a terminal."""

    def __init__(self, live):
        self.live, self.text = live, ""

    def isatty(self):
        return self.live

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "pipe"])
def test_progress(live):
    stream = Terminal(live)
    progress = Progress(2, stream)
    progress.step("first")
    progress.detail("half way")
    progress.step("second")
    progress.close()
    if live:
        assert "\n" not in stream.text and "[1/2] first: half way" in stream.text
    else:
        assert stream.text == "[1/2] first\n[2/2] second\n"


def test_exit_codes_of_errors():
    assert (CommandError.code, UsageError.code) == (1, 2)
