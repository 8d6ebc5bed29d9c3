"""``python -m benchmarks.questions.neutrality``: its data, its verdicts, and runs of a few steps."""

import json
import math

import pytest
import torch

from benchmarks.questions import neutrality
from benchmarks.questions.neutrality import BASE, OTHER_SEED, Run


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from more threads, which wait for each other on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_crops_are_labelled_by_their_place():
    """The picture's first two channels hold a pixel's x and y from -1 to 1; about half of the crops are mirrored."""
    place = torch.linspace(-1, 1, 64)
    picture = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    images, labels = neutrality.crops(picture, 16, 200, torch.Generator().manual_seed(0))
    assert images.shape == (200, 3, 16, 16)
    assert labels.min() >= 0 and labels.max() < neutrality.CELLS**2 and len(labels.unique()) > 10
    for channel, cell in ((0, labels % neutrality.CELLS), (1, labels // neutrality.CELLS)):
        means = images[:, channel].mean((1, 2))
        averages = [means[cell == number].mean().item() for number in range(neutrality.CELLS)]
        assert averages == sorted(averages) and averages[-1] - averages[0] > 0.5
        assert images[:, channel].abs().max() <= 1
    mirrored = images[:, 0, 0, 0] > images[:, 0, 0, -1]
    assert 60 < mirrored.sum() < 140
    again, _ = neutrality.crops(picture, 16, 200, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_models_start_alike():
    """Both forms start with the same weights, without dropout; a change or another seed gives other weights."""
    base, swapped = (neutrality.model_for(Run(form, "fp32"), 32) for form in ("upstream", "t2t_fast"))
    weights = base.state_dict()
    for name, value in swapped.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not [m for m in base.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    changed = neutrality.model_for(BASE._replace(change=1), 32).head.weight
    distance = (changed - base.head.weight).norm() / base.head.weight.norm()
    assert 0.5 < distance / neutrality.CHANGE < 2
    other = neutrality.model_for(BASE._replace(seed=OTHER_SEED), 32).head.weight
    assert not torch.allclose(other, base.head.weight)


STEPS = 40


def made(dtypes=("fp32", "bf16", "fp16"), **apart):
    """Loss curves: half types 0.01 above upstream's in float32, other weights 0.1; ``apart``: run -> its offset."""
    found = {}
    for run in neutrality.plan(dtypes):
        offset = 1e-6 if run.change else 0.1 if run.seed == OTHER_SEED else 0.0 if run.dtype == "fp32" else 0.01
        offset = apart.get(f"{run.form}_{run.dtype}", offset) if run.seed != OTHER_SEED and not run.change else offset
        found[run] = ([2.0 + offset - 0.01 * step for step in range(STEPS)], [])
    return found


def verdicts(found, dtypes=("fp32", "bf16", "fp16")):
    return {verdict["dtype"]: verdict for verdict in neutrality.judge(found, dtypes, STEPS)}


def test_verdict_of_close_curves():
    judged = verdicts(made(t2t_fast_fp32=5e-6))
    assert all(verdict["ok"] for verdict in judged.values())
    assert judged["fp32"]["allowed"] == pytest.approx(1e-5) and judged["bf16"]["allowed"] == pytest.approx(0.1)


def test_chaotic_training_is_judged_by_other_weights():
    judged = verdicts(made(upstream_bf16=0.08, upstream_fp16=0.12))
    assert judged["bf16"]["allowed"] == pytest.approx(0.1) and judged["fp16"]["allowed"] == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("apart", "wrong"),
    [
        pytest.param({"t2t_fast_fp32": 1e-3}, "fp32", id="further than rounding"),
        pytest.param({"t2t_fast_bf16": 0.3}, "bf16", id="further than other weights"),
        pytest.param({"t2t_fast_fp16": math.nan}, "fp16", id="not finite"),
    ],
)
def test_verdict_of_a_distant_curve(apart, wrong):
    assert [dtype for dtype, verdict in verdicts(made(**apart)).items() if not verdict["ok"]] == [wrong]


def test_non_finite_upstream_in_float16_is_ignored():
    judged = verdicts(made(upstream_fp16=math.nan))
    assert judged["fp16"]["ok"] and judged["fp16"]["allowed"] == judged["bf16"]["allowed"]
    alone = verdicts(made(("fp32", "fp16"), upstream_fp16=math.nan), ("fp32", "fp16"))
    assert alone["fp16"]["allowed"] == pytest.approx(0.1)


def test_a_skipped_step_after_the_warm_up_is_a_fault():
    found = made()
    losses, _ = found[Run("t2t_fast", "fp16")]
    found[Run("t2t_fast", "fp16")] = (losses, [1, 20])
    judged = verdicts(found)
    assert judged["fp16"]["skipped"] == [20] and not judged["fp16"]["ok"]
    report = list(neutrality.report(found, judged.values()))
    assert report[-1].startswith("fp16: NOT neutral") and "[20]" in report[-1]
    assert report[-2].startswith("bf16: neutral")


def test_smoothing():
    assert neutrality.smooth([1.0] * 40).shape == (39,)
    assert neutrality.distance([1.0, 2.0, 3.0], [1.0, 2.0, 6.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtypes", "steps"), [(["fp32"], 2), pytest.param(["fp32", "bf16"], 4, marks=pytest.mark.slow)]
)
def test_a_few_steps(dtypes, steps, tmp_path, monkeypatch, capsys):
    """The whole command; a few steps do not amplify rounding, so the float32 curves agree closely."""
    if len(dtypes) == 1:  # naming the backend would run every kernel in the interpreter
        monkeypatch.setattr(neutrality, "selected", lambda op, device, names: dict.fromkeys(names, "native"))
    sizes = ["--size", "32", "--batch", "2", "--steps", str(steps)]
    assert neutrality.main(["--device", "cpu", "--dtypes", *dtypes, *sizes, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "neutrality.json").read_text())
    names = [f"{form} {dtype}" for dtype in dtypes for form in ("upstream", "t2t_fast")]
    assert [run["name"] for run in found["runs"]][: len(names)] == names
    assert all(len(run["losses"]) == steps for run in found["runs"])
    assert [verdict["ok"] for verdict in found["verdicts"]] == [True] * len(dtypes)
    assert found["verdicts"][0]["distance"] < 1e-5 and found["backends"]["fp32"]
    assert "fp32: neutral" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    assert neutrality.main(["--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
