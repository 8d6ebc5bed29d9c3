"""Files that are not checkpoints, and bad arguments, raise clear errors and leave the model unchanged."""

import pickle
import random
import tarfile
import warnings
import zipfile

import pytest
import torch
from torch import nn

from support.checkpoints import fingerprint, saved, tiny
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint


class Payload:
    """Pickles as a call of ``random.seed``."""

    def __reduce__(self):
        return random.seed, (1,)


def _truncated(path, **options):
    content = saved(path, tiny().state_dict(), **options).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _tar(path):
    text = path.parent / "readme.txt"
    text.write_text("hello")
    with tarfile.open(path, "w") as archive:
        archive.add(text, "readme.txt")


BAD = {
    "empty": ("m.pth", lambda p: p.write_bytes(b""), "could not be read"),
    "text": ("m.pth", lambda p: p.write_text("hello, this is no checkpoint\n" * 9), "could not be read"),
    "zip": ("m.pth", _zip, "could not be read"),
    "tar": ("m.pth.tar", _tar, "could not be read"),
    "truncated": ("m.pth", _truncated, "could not be read"),
    "truncated legacy": ("m.pth", lambda p: _truncated(p, _use_new_zipfile_serialization=False), "could not be read"),
    "pickle": ("m.pth", lambda p: p.write_bytes(pickle.dumps({"a": Payload()}, 2)), r"pickled random\.|could not be"),
    "forbidden class": (
        "m.pth",
        lambda p: saved(p, {"state_dict": {}, "x": Payload()}),
        r"it holds a pickled (getattr|random)",
    ),
    "whole module": ("m.pth", lambda p: saved(p, nn.Linear(2, 2)), r"it holds a pickled torch\.nn\.modules\.linear"),
    "list": ("m.pth", lambda p: saved(p, [torch.ones(2)]), "must hold a dict of tensors.*got list"),
    "numbers": ("m.pth", lambda p: saved(p, {"epoch": 3}), r"it holds no tensors; its entries are epoch \(int\)"),
    "no tensors": ("m.pth", lambda p: saved(p, {"state_dict": {}}), "holds no tensors"),
    "same name twice": (
        "m.pth",
        lambda p: saved(p, {"norm.bias": torch.ones(48), "module.norm.bias": torch.ones(48)}),
        "with and without the prefix",
    ),
    "directory": ("folder", lambda p: p.mkdir(), "is a directory"),
}


@pytest.mark.parametrize(("name", "make", "text"), BAD.values(), ids=BAD)
def test_bad_files_are_clear_errors(tmp_path, name, make, text):
    make(tmp_path / name)
    model = tiny()
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load warns about unusual pickles
        with pytest.raises(CheckpointError, match=text) as error:
            load_checkpoint(model, tmp_path / name, num_classes=4)
    assert str(tmp_path / name) in str(error.value) and fingerprint(model) == before


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_bad_safetensors_are_clear_errors(tmp_path, content):
    pytest.importorskip("safetensors")
    (tmp_path / "m.safetensors").write_bytes(content)
    model = tiny()
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match="could not be read as safetensors"):
        load_checkpoint(model, tmp_path / "m.safetensors")
    assert fingerprint(model) == before


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        load_checkpoint(tiny(), tmp_path / "none.pth")


def test_safetensors_missing_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"t2t_fast\[checkpoints\]"):
        load_checkpoint(tiny(), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(num_classes="10"), TypeError, "num_classes must be an int or None, got '10'"),
        (dict(num_classes=True), TypeError, "num_classes must be an int or None, got True"),
        (dict(num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        (dict(source_grid="14x14"), TypeError, "source_grid must be an int or a pair of ints, got '14x14'"),
        (dict(grid=(0, 3)), ValueError, r"grid must be at least 1, got \(0, 3\)"),
        (dict(trained_with="timm"), ValueError, "trained_with must be None or 'mmpretrain', got 'timm'"),
    ],
    ids=["class text", "class bool", "class negative", "grid text", "grid zero", "trained with"],
)
def test_bad_arguments(tmp_path, options, error, text):
    path = saved(tmp_path / "m.pth", tiny().state_dict())
    with pytest.raises(error, match=text):
        load_checkpoint(tiny(), path, **options)


def test_bad_models(tmp_path):
    path = saved(tmp_path / "m.pth", {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_checkpoint({}, path)
    with pytest.raises(ValueError, match="num_classes needs a model with a linear head"):
        load_checkpoint(nn.Linear(2, 2), path, num_classes=3)
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(nn.Linear(2, 2, device="meta"), path)
