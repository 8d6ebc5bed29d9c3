"""The command ``t2t-fast``: exit codes, one-line errors, and the demo's report."""

import base64
import json
import math
import os
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import t2t_fast
from t2t_fast import backends, cli, reference, testing
from t2t_fast.cli import bench, demo, measure
from t2t_fast.cli.common import CommandError, Progress, UsageError

image = pytest.importorskip("PIL.Image", reason="pillow is not installed (extra: demo)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")

ROOT = Path(t2t_fast.__file__).parents[1]
PICTURES = ("photo", "windows", "tokens", "restructured", "logits", "time", "memory", "half")


def run(capsys, *argv):
    """Exit code, standard output and standard error of the command."""
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_and_version(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and not err
    assert all(re.search(rf"^    {name} ", out, re.M) for name in ("demo", "verify", "env", "bench", "export"))
    assert run(capsys, "--version") == (0, f"t2t-fast {t2t_fast.__version__}\n", "")
    for name in ("demo", "verify", "env", "bench", "export"):
        code, out, _ = run(capsys, name, "-h")
        assert code == 0 and out.startswith(f"usage: t2t-fast {name}") and "(default: None)" not in out


def test_module_runs_and_help_imports_nothing_heavy():
    code = (
        "import sys; from t2t_fast.cli import main; code = main(['--help']);"
        "heavy = {'matplotlib', 'PIL', 'onnx', 'onnxruntime', 'timm', 'torchvision', 't2t_fast.cli.demo'};"
        "sys.exit(code or ', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    for command in (["-c", code], ["-m", "t2t_fast", "--version"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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


def test_env_text(capsys):
    code, out, _ = run(capsys, "env")
    assert code == 0
    for words in ("versions", "system", "GPUs", "native build", "settings", "backends on cpu", torch.__version__):
        assert words in out
    for op in backends.operators():
        assert re.search(rf"^  {op} +\w+", out, re.M)


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


@pytest.mark.parametrize(
    ("value", "words"),
    [("gpu", "must be one of auto, "), ("triton", "none: the backend that was asked for")],
)
def test_a_backend_that_the_environment_should_not_have_set(value, words):
    """``env`` says what is wrong; every other command stops at it, in one line."""

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "t2t_fast", *arguments],
            cwd=ROOT,
            env={**os.environ, "T2T_FAST_BACKEND": value},
            capture_output=True,
            text=True,
        )

    done = command("env")
    assert done.returncode == 0 and words in done.stdout, done.stderr
    if value == "gpu":
        done = command("demo")
        assert done.returncode == 2 and done.stderr.startswith("t2t-fast: error: T2T_FAST_BACKEND must be one of")


def test_env_says_why_there_is_no_native_build(capsys, monkeypatch):
    monkeypatch.setattr("t2t_fast._extension.build_info", lambda: None)
    monkeypatch.setattr("t2t_fast._extension.load_error", lambda: "not built, for a test")
    _, out, _ = run(capsys, "env")
    assert re.search(r"native build\n +missing +not built, for a test", out)


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
    assert seen == [["--quick", "--out", "here", "--filter", "module"]]


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


def picture(mode, size=(40, 30)):
    """An image of a mode with a gradient in it."""
    pixels = torch.arange(size[0] * size[1]).reshape(size[1], size[0])
    if mode in ("I", "F"):
        return image.fromarray((pixels * 50).numpy().astype("int32" if mode == "I" else "float32"))
    if mode == "I;16":
        return image.fromarray((pixels * 50).numpy().astype("uint16"))
    return image.fromarray((pixels % 256).numpy().astype("uint8")).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    from t2t_fast.cli.photo import batch, load_photo

    path = tmp_path / "photo.png"
    picture(mode).save(path)
    photo = load_photo(path)
    assert photo.image.mode == "RGB" and photo.image.size == (40, 30) and photo.box == (5, 0, 35, 30)
    x = batch(photo, 32, 3)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all()
    assert x[0].std() > 0.1, "the gradient is gone"


@pytest.mark.parametrize("mode", ["CMYK", "F", "I"])
def test_modes_of_other_files(tmp_path, mode):
    from t2t_fast.cli.photo import load_photo

    path = tmp_path / "photo.tiff"
    picture(mode).save(path)
    photo = load_photo(path)
    assert photo.image.mode == "RGB"
    assert all(high - low > 100 for low, high in photo.image.getextrema()), "the gradient is gone"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (5, 7)], ids=lambda size: "x".join(map(str, size)))
def test_odd_sizes(tmp_path, size):
    from t2t_fast.cli.photo import batch, load_photo

    path = tmp_path / "photo.png"
    image.new("RGB", size, (200, 30, 90)).save(path)
    assert batch(load_photo(path), 32, 4).isfinite().all()


def test_transparent_is_white(tmp_path):
    from t2t_fast.cli.photo import load_photo

    path = tmp_path / "photo.png"
    image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    assert load_photo(path).image.getpixel((3, 3)) == (255, 255, 255)


def test_rotation_of_the_camera_counts(tmp_path):
    from t2t_fast.cli.photo import load_photo

    path = tmp_path / "photo.jpg"
    turned = image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    assert load_photo(path).image.size == (10, 20)


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no image", b"\x89PNG\r\n\x1a\nbroken"], ids=["empty", "text", "cut"]
)
def test_not_an_image(capsys, tmp_path, content):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    code, _, err = run(capsys, "demo", "--photo", path, "--out", tmp_path / "out", "--model", "t2t_vit_7")
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert code == 1 and len(lines) == 1 and "cannot be read as an image" in lines[0]


def test_sample_photograph_is_installed():
    from t2t_fast.cli.photo import SAMPLE_CREDIT, load_photo

    photo = load_photo()
    assert photo.credit == SAMPLE_CREDIT and min(photo.image.size) >= 224


class References(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.sources, self.stack = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes something else"


SMALL = ("demo", "--model", "t2t_vit_7", "--img-size", 32, "--batch", 1, "--seconds", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The demo of a small model, once for all tests: (folder, exit code, printed summary)."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "t2t_fast", *map(str, SMALL), "--no-compile", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


@pytest.mark.slow
class TestDemo:
    def test_files(self, report):
        out, _, _ = report
        assert {path.name for path in out.iterdir()} == {
            "report.html", "report.json", *(f"{name}.png" for name in PICTURES)
        }  # fmt: skip
        for name in PICTURES:
            with image.open(out / f"{name}.png") as drawn:
                drawn.load()
                assert drawn.width >= 1000 and drawn.height >= 300
                assert max(high - low for low, high in drawn.convert("RGB").getextrema()) > 100, "an empty picture"

    def test_page_is_complete_without_network(self, report):
        out, _, _ = report
        text = (out / "report.html").read_text(encoding="utf-8")
        page = References()
        page.feed(text)
        page.close()
        assert not page.stack
        pictures = {(out / f"{name}.png").read_bytes() for name in PICTURES}
        shown = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources}
        assert shown == pictures
        assert "carry no meaning" in text and "Matplotlib" in text and "http" not in text

    def test_numbers(self, report):
        out, _, _ = report
        data = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
        parity = data["parity"]
        assert parity["ok"] and parity["relative_difference"] < 1e-5 and parity["cosine"] > 1 - 1e-9
        assert parity["top5_before"] == parity["top5_after"] and parity["classes"] == 1000
        assert len(data["time"]) == 4 and len(data["memory"]) == 4, data["notes"]
        for row in data["time"]:
            assert all(0 < row[form]["low"] <= row[form]["median"] <= row[form]["high"] for form in ("before", "after"))
            assert math.isclose(row["ratio"], row["before"]["median"] / row["after"]["median"])
        for row in data["memory"]:
            assert row["before"] > 0 and row["after"] > 0
        kept = data["memory"][0]
        assert kept["what"] == "T2T module, kept for backward" and kept["ratio"] > 2
        assert not any(row["tokens_not_finite"] for row in data["half"] if row["form"] == "after")
        assert {row["dtype"] for row in data["half"]} == {"fp16", "bf16"}

    def test_summary(self, report):
        out, printed, progress = report
        assert f"report: {out / 'report.html'}" in printed
        assert "logits   same" in printed and "carry no meaning" in printed
        assert progress.startswith("[ 1/11] ") and "[11/11] write the report" in progress and "\r" not in progress

    def test_failures_are_reported(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(demo, "PARITY", -1.0)
        monkeypatch.setattr(torch, "compile", lambda module: torch.nn.Module())
        checkpoint, photo = tmp_path / "weights.pth", tmp_path / "<photo>.png"
        torch.save(reference.t2t_vit_7(img_size=32, num_classes=7).state_dict(), checkpoint)
        picture("RGB", (64, 48)).save(photo)
        code, out, err = run(
            capsys, *SMALL, "--out", tmp_path / "a" / "b", "--checkpoint", checkpoint, "--photo", photo
        )
        assert code == 1, err
        text = (tmp_path / "a" / "b" / "report.html").read_text(encoding="utf-8")
        assert "another answer" in text and "logits   DIFFERENT" in out
        assert "torch.compile was not timed" in out
        assert "&lt;photo&gt;.png" in text and "<photo>" not in text
        assert "weights of the checkpoint" in out and "carry no meaning" not in text

    def test_model_without_performer(self, capsys, tmp_path):
        code, out, _ = run(capsys, *SMALL, "--model", "t2t_vit_t_14", "--no-compile", "--out", tmp_path)
        assert code == 0 and "t2t_vit_t_14 has no Performer" in out


def test_demo_refuses_a_model_whose_logits_are_not_finite(capsys, tmp_path):
    model = reference.t2t_vit_7(img_size=32)
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    code, _, err = run(capsys, *SMALL, "--out", tmp_path, "--checkpoint", tmp_path / "weights.pth")
    assert code == 1 and "logits before the swap are not finite" in err.splitlines()[-1]


def test_demo_names_the_missing_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, *SMALL, "--out", tmp_path / "out")
    assert code == 1 and "t2t_fast[demo]" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interleaved_runs_in_turns():
    order = []
    timings = measure.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 0.0
    )
    rounds = ["ab" if index % 2 else "ba" for index in range(measure.MIN_ROUNDS)]
    assert "".join(order) == "ab" + "".join(rounds)
    assert all(timing.rounds == measure.MIN_ROUNDS and timing.low <= timing.median for timing in timings.values())


def test_training_step_trains_and_inference_does_not():
    module = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout(0.5))
    x = torch.randn(3, 4)
    measure.inference(module, x)()
    assert not module.training and module[0].weight.grad is None
    measure.training_step(module, x)()
    assert module.training and module[0].weight.grad is not None


class Terminal:
    """A stream that says it is a terminal."""

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
