"""``examples/train.py``: what it trains, that a killed run continues to the same curve, several processes, errors."""

import csv
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import t2t_fast
from support import ROOT

EXAMPLES = ROOT / "examples"
MODEL = ["--model", "t2t_vit_7", "--model-kwargs", "embed_dim=16", "depth=1", "num_heads=2", "token_dim=8"]
TINY = [*MODEL, "--img-size", "16", "--workers", "0", "--log-every", "1", "--lr", "1e-2", "--cpu"]
TINY += ["--epochs", "2", "--warmup-epochs", "1", "--cooldown-epochs", "0", "--batch-size", "4"]
PLAIN = ["--aug", "none", "--mixup", "0", "--cutmix", "0", "--drop-path", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: 3 classes of one colour each, with noise; 24 training and 10 validation images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 10)):
        for index in range(count):
            pixels = generator.integers(0, 120, (20, 24, 3))
            pixels[..., index % 3] += 120
            path = root / part / ("red", "green", "blue")[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def train():
    """The script as a module."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("train")
    sys.path.remove(str(EXAMPLES))


def reset():
    """Forget accelerate's state, of which there is one per process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    environment = dict(os.environ)  # accelerate writes its options there
    reset()
    yield
    os.environ.clear()
    os.environ.update(environment)


def curve(output, table="train"):
    """The rows of a table as text."""
    with (output / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(output):
    return [float(row["loss"]) for row in curve(output)]


def call(words, processes=1, kill=()):
    """Run the script, by torchrun if in several processes, or killed_training.py with the words ``kill``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)]), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = ROOT / "tests" / "examples" / "killed_training.py" if kill else EXAMPLES / "train.py"
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *kill, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_a_run_writes_curves_weights_and_a_checkpoint(train, folder, tmp_path):
    output = tmp_path / "run"
    arguments = [*TINY, "--data", str(folder), "--output", str(output)]
    assert train.main([*arguments, "--model-ema-decay", "0.5", "--clip-grad", "1"]) == 0
    assert [row["update"] for row in curve(output)] == [str(n) for n in range(1, 13)]
    assert [row["update"] for row in curve(output, "val")] == ["6", "12"]
    assert [path.name for path in output.glob("checkpoint*")] == ["checkpoint-000000012"]
    assert list((output / "tensorboard").glob("events*"))
    weights = torch.load(output / "last.pth", weights_only=True)
    assert weights["arch"] == "t2t_vit_7" and weights["epoch"] == 1
    key = "head.weight"
    assert not torch.equal(weights["state_dict"][key], weights["state_dict_ema"][key])
    options = dict(embed_dim=16, depth=1, num_heads=2, token_dim=8, img_size=16, num_classes=3)
    model = t2t_fast.create_model("t2t_vit_7", checkpoint=output / "last.pth", **options)
    assert torch.equal(model.state_dict()[key], weights["state_dict_ema"][key])


def test_evaluation_of_the_weights_repeats_the_validation(train, folder, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [*TINY, *PLAIN, "--data", str(folder), "--no-model-ema"]
    train.train(train.parse([*arguments, "--output", str(output)]))
    again = ["--eval", "--checkpoint", str(output / "last.pth"), "--output", str(output)]
    figures = train.train(train.parse([*arguments, *again]))
    last = {f"val/{name}": float(value) for name, value in curve(output, "val")[-1].items() if name != "update"}
    assert figures == pytest.approx(last)
    assert len(curve(output, "val")) == 2


def test_it_learns(train, folder, tmp_path):
    output = tmp_path / "run"
    arguments = [*TINY, *PLAIN, "--data", str(folder), "--output", str(output), "--epochs", "12", "--smoothing", "0"]
    figures = train.train(train.parse([*arguments, "--model-ema-decay", "0.8", "--amp", "bf16"]))
    assert figures["val/top1"] == figures["ema/top1"] == 100


@pytest.mark.parametrize(
    "changed",
    [
        ["--batch-size", "2", "--grad-accum-steps", "2"],
        ["--workers", "2", "--batch-size", "4"],
        ["--reference", "--batch-size", "4"],
    ],
    ids=["accumulation", "workers", "reference"],
)
def test_the_curve_does_not_depend_on(train, folder, tmp_path, changed):
    """Accumulation, loader processes and fusion change rounding at most, with random augmentation and mixup."""
    arguments = [*TINY, "--data", str(folder), "--drop-path", "0"]
    for name, words in (("a", []), ("b", changed)):
        reset()
        assert train.main([*arguments, *words, "--output", str(tmp_path / name)]) == 0
    exact = changed[0] == "--workers"
    assert losses(tmp_path / "b") == (losses(tmp_path / "a") if exact else pytest.approx(losses(tmp_path / "a"), 1e-4))


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_curve(train, folder, tmp_path):
    """Killed in an epoch, then while it writes a checkpoint: data order, augmentation, mixup, dropout, drop path,
    averaged weights and schedule are as in one run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*TINY, "--data", str(folder), "--checkpoint-every", "2", "--sched-on-updates", "--drop-path", "0.3"]
    arguments += ["--model-kwargs", "embed_dim=16", "depth=2", "num_heads=2", "token_dim=8", "drop_rate=0.2"]
    arguments += ["--model-ema-decay", "0.7"]
    assert train.main([*arguments, "--output", str(whole)]) == 0
    resume = [*arguments, "--output", str(killed), "--resume"]  # also starts a run that has no checkpoint yet
    for kill, left in ((("logging", "3"), "checkpoint-000000002"), (("saving", "2"), "checkpoint-000000004")):
        stopped = call(resume, kill=kill)
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        assert [path.name for path in killed.glob("checkpoint-*")] == [left]
    assert (killed / "checkpoint.part").exists()
    reset()
    assert train.main(resume) == 0
    for table in ("train", "val", "ema"):
        assert curve(killed, table) == curve(whole, table)
    weights = [torch.load(output / "last.pth", weights_only=True) for output in (whole, killed)]
    for entry in ("state_dict", "state_dict_ema"):
        for name, value in weights[0][entry].items():
            assert torch.equal(value, weights[1][entry][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_follow_the_curve_of_one(train, folder, tmp_path, mode):
    """With the same global batch; the run by FSDP2 is killed between two checkpoints and resumed."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*TINY, *PLAIN, "--data", str(folder), "--model-ema-decay", "0.7"]
    assert train.main([*arguments, "--output", str(one)]) == 0
    words = [*arguments, "--batch-size", "2", "--output", str(two), *(["--fsdp"] if mode == "fsdp" else [])]
    if mode == "fsdp":
        stopped = call(words, processes=2, kill=("logging", "8"))
        assert stopped.returncode != 0
        assert [path.name for path in two.glob("checkpoint-*")] == ["checkpoint-000000006"], stopped.stderr
        words.append("--resume")
    result = call(words, processes=2)
    assert result.returncode == 0, result.stderr
    for table in ("train", "val", "ema"):
        values = [[float(row["loss"]) for row in curve(output, table)] for output in (one, two)]
        assert len(values[0]) == (12 if table == "train" else 2) and values[1] == pytest.approx(values[0], abs=1e-4)
    weights = [torch.load(output / "last.pth", weights_only=True) for output in (one, two)]
    for entry in ("state_dict", "state_dict_ema"):
        assert weights[0][entry].keys() == weights[1][entry].keys()
        for name, value in weights[0][entry].items():
            torch.testing.assert_close(weights[1][entry][name], value, atol=2e-2, rtol=1e-2)


@pytest.mark.slow
def test_the_digits_recipe_learns(train, tmp_path):
    """A shortened form; docs/training.md has the figures of the whole recipe."""
    words = ["--config", str(EXAMPLES / "recipes" / "digits.yaml"), "--epochs", "5", "--warmup-epochs", "1", "--cpu"]
    figures = train.train(train.parse([*words, "--output", str(tmp_path / "run")]))
    assert figures["ema/top1"] > 60


def write_cifar10(root, count):
    """CIFAR-10's files with random images."""
    generator = np.random.default_rng(0)
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        data = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [n % 10 for n in range(count)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_transfer_to_cifar_as_upstream(train, tmp_path, monkeypatch):
    """The recipe's rates: the head's follow upstream's cosine, the others are a hundredth of it."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar10(tmp_path / "data", 4)
    options = dict(embed_dim=16, depth=1, num_heads=2, token_dim=8)
    torch.save(t2t_fast.create_model("t2t_vit_7", img_size=32, **options).state_dict(), tmp_path / "imagenet.pth")
    made = []
    real = train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *args: made.append(real(*args)) or made[-1])
    words = [
        "--config",
        str(EXAMPLES / "recipes" / "cifar_transfer.yaml"),
        *MODEL,
        "--img-size",
        "16",
        "--cpu",
        "--batch-size",
        "4",
    ]
    words += ["--data", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "imagenet.pth"), "--log-every", "1"]
    with pytest.warns(UserWarning, match="no head of 10 classes"):
        assert train.main([*words, "--workers", "0", "--epochs", "3", "--output", str(tmp_path / "run")]) == 0
    rest, head = made[0].param_groups
    assert len(head["params"]) == 2 and len(rest["params"]) > 10
    assert rest["weight_decay"] == head["weight_decay"] == 5e-4 and not head["nesterov"]
    assert rest["lr"] == pytest.approx(head["lr"] / 100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(head["params"], lr=0.05), T_max=3, eta_min=2e-4)
    expected = []
    for _ in range(3):
        expected += [cosine.get_last_lr()[0]] * 5
        cosine.optimizer.step()
        cosine.step()
    assert [float(row["lr"]) for row in curve(tmp_path / "run")] == pytest.approx(expected)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_accepted(train, path):
    args = train.parse(["--config", str(path)])
    assert args.model in t2t_fast.list_models()
    if path.stem.startswith("imagenet"):
        rates = {"imagenet_lite": (1e-3, 0.03), "imagenet_14": (5e-4, 0.05), "imagenet_19_24": (5e-4, 0.065)}
        assert (args.lr, args.weight_decay) == rates[path.stem]
        assert args.batch_size * 8 == 512 and args.epochs + args.cooldown_epochs == 310


def test_the_command_line_comes_before_the_config(train, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 1e-2\nmodel-kwargs: {depth: 2}\nmodel-ema: false\nscale: [0.5, 1.0]\n")
    args = train.parse(["--config", str(path), "--lr", "1e-3"])
    assert (args.lr, args.model_kwargs, args.model_ema, args.scale) == (1e-3, {"depth": 2}, False, [0.5, 1.0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "{tmp}/none"], "there is no folder {tmp}/none/train (expected DIR/train/CLASS/IMAGE"),
        ([], "--dataset folder needs --data DIR"),
        (["--data", "{data}", "--num-classes", "10"], "--num-classes: the data has 3 classes, got 10"),
        (["--data", "{data}", "--model", "t2t_vit_8"], "--model must be one of t2t_vit_7,"),
        (["--data", "{data}", "--model-kwargs", "width=3"], "the model cannot be made: "),
        (["--data", "{data}", "--model-kwargs", "embed_dim=15"], "num_heads must divide embed_dim"),
        (["--data", "{data}", "--opt", "adamx"], "--opt must be one of timm.optim.list_optimizers(), got adamx"),
        (["--data", "{data}", "--amp", "fp16"], "--amp fp16 needs a GPU, and this run is on a CPU; use --amp bf16"),
        (["--data", "{data}", "--fsdp"], "--fsdp needs several processes"),
        (["--data", "{data}", "--eval"], "--eval needs --checkpoint FILE"),
        (["--data", "{data}", "--checkpoint", "{tmp}/a.pth"], "--checkpoint: there is no file {tmp}/a.pth"),
        (["--data", "{data}", "--batch-size", "3"], "--mixup and --cutmix need an even --batch-size, got 3"),
        (["--data", "{data}", "--batch-size", "32"], "24 training images are fewer than an update's 32"),
        (["--data", "{data}", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--data", "{data}", "--reference", "--model", "t2t_vit_c_14"], "--reference: upstream has no t2t_vit_c_14"),
        (["--dataset", "cifar10", "--data", "{data}"], "no cifar10 in {data}; give --download to fetch it"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(train, folder, tmp_path, capsys, words, message):
    words = [word.format(tmp=tmp_path, data=folder) for word in words]
    assert train.main([*TINY, *words, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ") and message.format(tmp=tmp_path, data=folder) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr: 1\n", "unrecognized arguments: --lrr 1"),
        ("lr: fast\n", "argument --lr: invalid float value"),
        ("- lr\n", "must be a mapping of arguments, got list"),
        (None, "--config: [Errno 2] No such file"),
    ],
)
def test_bad_configs_are_refused(train, tmp_path, capsys, text, message):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        train.parse(["--config", str(path)])
    assert message in capsys.readouterr().err


def test_train_and_val_must_have_the_same_classes(train, folder, tmp_path, capsys):
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / part / name / "1.png")
    assert train.main([*TINY, "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run")]) == 2
    assert "train has 2 classes and val 2" in (error := capsys.readouterr().err) and ": b, c" in error


def test_another_run_is_not_overwritten(train, folder, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").touch()
    arguments = [*TINY, "--data", str(folder), "--output", str(output)]
    assert train.main(arguments) == 2
    assert f"{output} is not empty; give --resume to continue its run" in capsys.readouterr().err
    (output / "arguments.json").write_text(json.dumps({"lr": 1.0}))
    assert train.main([*arguments, "--resume"]) == 2
    assert "lr: 1.0 is now 0.01" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["arguments.json", "mine.txt"]


def test_a_run_stops_when_the_loss_is_not_finite(train, folder, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = [*TINY, "--data", str(folder), "--output", str(output), "--opt", "sgd", "--warmup-lr", "1e30"]
    assert train.main([*arguments, "--lr", "1e30"]) == 2
    assert "the loss is nan at update" in capsys.readouterr().err
    assert not list(output.glob("*.pth"))
