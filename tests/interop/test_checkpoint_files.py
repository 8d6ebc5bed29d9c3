"""Reading a checkpoint: entries of every kind, changing files, links, damaged files, and no access to other files."""

import os
import random
import sys
import warnings

import numpy as np
import pytest
import torch

from support.checkpoints import exact_state, paddle_file, saved, small
from support.hostile import soon
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint

ENTRIES = {
    "sparse": lambda value: value.to_sparse(),
    "compressed rows": lambda value: value[None].to_sparse_csr(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 1.0, 0, torch.qint8),
    "meta": lambda value: value.to("meta"),
    "complex": lambda value: value.to(torch.complex64),
    "integers": lambda value: value.to(torch.int64),
    "0-d": lambda value: value.sum(),
    "longer": lambda value: torch.cat([value, value]),
    "one axis more": lambda value: value[None],
    "text": lambda value: "norm",
    "list": lambda value: value.tolist(),
    "nothing": lambda value: None,
    "number": lambda value: 1.0,
    "dict": lambda value: {"bias": value},
}
TEXTS = {
    "sparse": "norm.bias (checkpoint sparse_coo, model (8,))",
    "compressed rows": "norm.bias (checkpoint sparse_csr, model (8,))",
    "quantised": "norm.bias (checkpoint quantised qint8, model (8,))",
    "meta": "norm.bias (checkpoint on the meta device, model (8,))",
    "complex": "norm.bias (checkpoint (8,) complex64, model (8,))",
    "integers": "norm.bias (checkpoint (8,) int64, model (8,))",
    "0-d": "norm.bias (checkpoint (), model (8,))",
    "longer": "norm.bias (checkpoint (16,), model (8,))",
    "one axis more": "norm.bias (checkpoint (1, 8), model (8,))",
    "text": "norm.bias (checkpoint str, model (8,))",
    "list": "norm.bias (checkpoint list, model (8,))",
    "nothing": "norm.bias (checkpoint NoneType, model (8,))",
    "number": "norm.bias (checkpoint (), model (8,))",
    "dict": "norm.bias (checkpoint dict, model (8,))",
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage", "ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("source", ["file", "object"])
def test_entries_that_are_no_dense_tensors(tmp_path, kind, source):
    state = small().state_dict()
    state["norm.bias"] = ENTRIES[kind](state["norm.bias"])
    model = small()
    before = exact_state(model)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, saved(tmp_path / "m.pth", state) if source == "file" else state)
    assert TEXTS[kind] in str(error.value)
    assert exact_state(model) == before
    bias = model.norm.bias.clone()
    report = load_checkpoint(model, state, strict=False)
    assert [name for name, *_ in report.mismatched] == ["norm.bias"] and torch.equal(model.norm.bias, bias)
    assert torch.equal(model.norm.weight, state["norm.weight"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
def test_nested_tensors(tmp_path, layout):
    state = small().state_dict()
    state["norm.bias"] = torch.nested.nested_tensor([torch.ones(3), torch.ones(5)], layout=layout)
    model = small()
    before = exact_state(model)
    with pytest.raises(CheckpointError, match=r"norm\.bias \(checkpoint (nested|a NestedTensor), model"):
        load_checkpoint(model, state)
    with pytest.raises(CheckpointError, match=r"_rebuild_nested_tensor|NestedTensor"):
        load_checkpoint(model, saved(tmp_path / "m.pth", state))
    assert exact_state(model) == before


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pth", small().state_dict())
    load = torch.load

    def changed(*args, **options):
        os.utime(path, ns=(0, 0))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", changed)
    model = small()
    before = exact_state(model)
    with pytest.raises(CheckpointError, match="it changed while it was read"):
        load_checkpoint(model, path)
    assert exact_state(model) == before


def test_a_fifo_that_takes_the_files_place(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.pth", small().state_dict())
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: status)
    with soon(), pytest.raises(CheckpointError, match="is a FIFO"):
        load_checkpoint(small(), path)


def test_links_are_followed_and_broken_links_raise(tmp_path):
    path = saved(tmp_path / "m.pth", small().state_dict())
    (tmp_path / "link.pth").symlink_to(path)
    assert load_checkpoint(small(), tmp_path / "link.pth").complete
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*link\.pth; it is a link to .*m\.pth"):
        load_checkpoint(small(), tmp_path / "link.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_checkpoint(small(), tmp_path / "link.pth" / "m.pth")


def written(path, state):
    """Write the state dict in the format that the file's name implies."""
    if path.name == "m.safetensors":
        pytest.importorskip("safetensors.torch").save_file({key: v.contiguous() for key, v in state.items()}, path)
    elif path.name == "m.pdparams":
        path.write_bytes(paddle_file(state))
    else:
        content = {"state_dict": state, "acc": np.float64(1)}
        saved(path, content, _use_new_zipfile_serialization=path.name == "m.pth")
    return path


KINDS_OF_FILES = ["m.pth", "legacy.pth", "m.safetensors", "m.pdparams"]


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_loading_opens_no_other_file(tmp_path, name):
    """No file is written, no other file is read, no process is started, no socket is used."""
    path = written(tmp_path / name, small().state_dict())
    load_checkpoint(small(), path)  # imports all modules
    model, seen, watching = small(), [], False

    def hook(event, arguments):
        if watching and event.partition(".")[0] in ("open", "os", "subprocess", "socket", "shutil", "tempfile", "exec"):
            seen.append((event, *arguments))

    sys.addaudithook(hook)  # it cannot be removed; ``watching`` turns it off
    watching = True
    load_checkpoint(model, path)
    watching = False
    assert seen
    for event, opened, _mode, flags in seen:
        assert event == "open" and (isinstance(opened, int) or str(opened) in (str(path), "/proc/self/maps"))
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_files_with_wrong_bytes(tmp_path, name):
    """Bytes are changed, deleted and inserted at random: the file is read or rejected, and nothing else happens."""
    path = written(tmp_path / name, small().state_dict())
    content, model, chance = path.read_bytes(), small(), random.Random(0)
    assert load_checkpoint(model, path).complete
    for _ in range(60):
        data = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            start, length = chance.randrange(min(len(data), 12000)), chance.choice([1, 2, 8])
            data[start : start + chance.choice([0, length, length])] = chance.randbytes(
                chance.choice([0, length, length])
            )
        path.write_bytes(data)
        before = exact_state(model)
        with warnings.catch_warnings(), soon():
            warnings.simplefilter("ignore")
            try:
                load_checkpoint(model, path, strict=chance.random() < 0.5)
            except CheckpointError:
                assert exact_state(model) == before
