"""``python -m benchmarks.questions.deployment``: exported files in other runtimes, with a small model."""

import copy

import pytest
import torch

from benchmarks.questions import deployment
from benchmarks.questions.deployment import FIXED, FREE, RESHAPED, UPSTREAM
from t2t_fast import reference, swap
from t2t_fast.models import T2TViT

TINY = dict(img_size=32, embed_dim=24, depth=1, num_heads=3, mlp_ratio=3, token_dim=16, num_classes=5)
PAGE = f"before\n{deployment.START}\nold\n{deployment.END}\nafter\n"


def small(name, size):
    torch.manual_seed(0)
    upstream = reference.T2T_ViT(**TINY).eval()
    swapped, free = copy.deepcopy(upstream), T2TViT(**TINY).eval()
    swap(swapped)
    free.load_state_dict(upstream.state_dict())
    return {UPSTREAM: upstream, FIXED: swapped, FREE: free}


def test_a_row():
    found = {form: {"times": [0.2, 0.4, 0.2], "error": 1e-6} for form in (UPSTREAM, FIXED)}
    found[FIXED]["times"] = [0.1, 0.1, 0.1]
    cells = deployment.row("small", 8, "AOTInductor", found)
    assert cells[:6] == ("small", 8, "AOTInductor", "200 ms", "100 ms", "2.00× (2.00 - 3.20)")
    assert cells[6:8] == ("-", "-") and len(cells) == len(deployment.HEADS)


def test_a_page_without_a_place(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="the page must contain <!-- deployment -->"):
        deployment.main(["--write", str(tmp_path / "page.md")])


@pytest.mark.slow
def test_a_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deployment, "models", small)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    options = ["--models", "small", "--batches", "2", "--size", "32", "--rounds", "2", "--threads", "1"]
    runtimes = ["--runtimes", "OpenVINO", "ONNX Runtime"]
    deployment.main([*options, *runtimes, "--folder", str(tmp_path), "--write", str(page)])
    text = page.read_text()
    assert "| small | 2 | OpenVINO |" in text and "| small | 2 | ONNX Runtime |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and "after `model.reshape`" in text
    assert len(list(tmp_path.glob("*.onnx"))) == 3 and len(list(tmp_path.glob("*.json"))) == 2
    # what is there is not made again
    monkeypatch.setattr(deployment, "models", None)
    deployment.main([*options, *runtimes, "--folder", str(tmp_path)])
    assert capsys.readouterr().out.count("| small | 2 |") == 4
    kept = deployment.measure(tmp_path, "small", 2, "OpenVINO", 2, 1, 32)
    assert set(kept) == {UPSTREAM, FIXED, FREE, RESHAPED} and all(each["error"] < 1e-4 for each in kept.values())
