"""``t2t-fast demo``: photographs of every kind, the report, and its measurements."""

import base64
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import t2t_fast
from support.command import run
from t2t_fast import reference
from t2t_fast.demo import measure

ROOT = Path(t2t_fast.__file__).parents[1]

image = pytest.importorskip("PIL.Image", reason="pillow is not installed (extra: demo)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")


PICTURES = ("photo", "windows", "tokens", "restructured", "logits", "time", "memory", "half")


def picture(mode, size=(40, 30)):
    """An image in a given mode that shows a gradient."""
    pixels = torch.arange(size[0] * size[1]).reshape(size[1], size[0])
    if mode in ("I", "F"):
        return image.fromarray((pixels * 50).numpy().astype("int32" if mode == "I" else "float32"))
    if mode == "I;16":
        return image.fromarray((pixels * 50).numpy().astype("uint16"))
    return image.fromarray((pixels % 256).numpy().astype("uint8")).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    from t2t_fast.demo.photo import batch, load_photo

    path = tmp_path / "photo.png"
    picture(mode).save(path)
    photo = load_photo(path)
    assert photo.image.mode == "RGB" and photo.image.size == (40, 30) and photo.box == (5, 0, 35, 30)
    x = batch(photo, 32, 3)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all()
    assert x[0].std() > 0.1, "the gradient is gone"


@pytest.mark.parametrize("mode", ["CMYK", "F", "I"])
def test_modes_of_other_files(tmp_path, mode):
    from t2t_fast.demo.photo import load_photo

    path = tmp_path / "photo.tiff"
    picture(mode).save(path)
    photo = load_photo(path)
    assert photo.image.mode == "RGB"
    assert all(high - low > 100 for low, high in photo.image.getextrema()), "the gradient is gone"


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (5, 7)], ids=lambda size: "x".join(map(str, size)))
def test_odd_sizes(tmp_path, size):
    from t2t_fast.demo.photo import batch, load_photo

    path = tmp_path / "photo.png"
    image.new("RGB", size, (200, 30, 90)).save(path)
    assert batch(load_photo(path), 32, 4).isfinite().all()


def test_transparent_is_white(tmp_path):
    from t2t_fast.demo.photo import load_photo

    path = tmp_path / "photo.png"
    image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    assert load_photo(path).image.getpixel((3, 3)) == (255, 255, 255)


def test_the_cameras_rotation_is_applied(tmp_path):
    from t2t_fast.demo.photo import load_photo

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
    from t2t_fast.demo.photo import SAMPLE_CREDIT, load_photo

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
    """The demo of a small model, once for all tests: (folder, printed summary, progress)."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "t2t_fast", *map(str, SMALL), "--no-compile", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


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
        assert "scores are meaningless" in text and "Matplotlib" in text and "http" not in text

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
        assert "logits   same" in printed and "scores are meaningless" in printed
        assert progress.startswith("[ 1/11] ") and "[11/11] write the report" in progress and "\r" not in progress

    @pytest.mark.slow
    def test_failures_are_reported(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("t2t_fast.demo.run.PARITY", -1.0)
        monkeypatch.setattr(torch, "compile", lambda module: torch.nn.Module())
        checkpoint, photo = tmp_path / "weights.pth", tmp_path / "<photo>.png"
        torch.save(reference.t2t_vit_7(img_size=32, num_classes=7).state_dict(), checkpoint)
        picture("RGB", (64, 48)).save(photo)
        code, out, err = run(
            capsys, *SMALL, "--out", tmp_path / "a" / "b", "--checkpoint", checkpoint, "--photo", photo
        )
        assert code == 1, err
        text = (tmp_path / "a" / "b" / "report.html").read_text(encoding="utf-8")
        assert "different logits" in text and "logits   DIFFERENT" in out
        assert "torch.compile was not timed" in out
        assert "&lt;photo&gt;.png" in text and "<photo>" not in text
        assert "weights of the checkpoint" in out and "meaningless" not in text

    @pytest.mark.slow
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
