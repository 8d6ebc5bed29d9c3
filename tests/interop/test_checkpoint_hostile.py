"""Files that are broken, lie, or were made to harm: refused soon, with the reason, and the model is as it was."""

import gzip
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from support import hostile
from support.checkpoints import exact_state, paddle_file, saved, small
from support.hostile import Call, View, archive, legacy, long, opcodes, safetensors
from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint

NAME = "norm.bias"
VALUE = torch.ones(8)


def _linked(target):
    return lambda path: path.symlink_to(target)


def _fifo_behind_link(path):
    os.mkfifo(path.parent / "fifo")
    path.symlink_to(path.parent / "fifo")


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # an absolute path may be too long for a socket


def _loop(path):
    path.symlink_to(path)


def _sparse(start, size=1 << 33):
    """A file of holes, which takes no room on the disk."""

    def make(path):
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def _zip_of_text(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


def _tar(path):
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("storages"))


def _cut(share, **options):
    def make(path):
        content = saved(path, small().state_dict(), **options).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def _lying_record(path):
    """The directory says that a record has 2 GB."""
    archive(path, {NAME: View()})
    size = struct.pack("<L", 4 * 48)
    hostile.rewritten(path, size + size, struct.pack("<L", 1 << 31) * 2)


def _numpy_dtype(*state):
    """A NumPy scalar whose dtype has the given state."""
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R" + pickle.dumps(state, 2)[2:-1] + b"b"
    return opcodes(b"cnumpy.core.multiarray\nscalar\n", dtype, b"U\x08abcdefgh\x86R")


# name: (file name, function that makes it, pattern of the reason)
NO_FILE = {
    "directory": ("m.pth", lambda p: p.mkdir(), "is a directory"),
    "FIFO": ("m.pth", os.mkfifo, "is a FIFO"),
    "FIFO behind a link": ("m.pth", _fifo_behind_link, "is a FIFO"),
    "FIFO, safetensors": ("m.safetensors", os.mkfifo, "is a FIFO"),
    "FIFO, Paddle": ("m.pdparams", os.mkfifo, "is a FIFO"),
    "socket": ("m.pth", _socket, "is a socket"),
    "endless device": ("m.pth", _linked("/dev/zero"), "is a character device"),
    "file of the kernel": ("m.pth", _linked("/proc/self/environ"), "it is empty"),
    "loop of links": ("m.pth", _loop, "could not be opened"),
    "name too long": ("m" * 300, lambda p: None, "could not be opened: File name too long"),
}
BYTES = {
    "empty": ("m.pth", lambda p: p.write_bytes(b""), "it is empty"),
    "one byte": ("m.pth", lambda p: p.write_bytes(b"\x80"), "could not be read"),
    "text": ("m.pth", lambda p: p.write_text("hello, this is no checkpoint\n" * 9), "not written by torch.save"),
    "web page": ("m.pth", lambda p: p.write_text("<!DOCTYPE html><html>404</html>"), "not written by torch.save"),
    "picture": ("m.pth", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "not written by torch.save"),
    "gzip": ("m.pth", lambda p: p.write_bytes(gzip.compress(bytes(999))), "not written by torch.save"),
    "random bytes": ("m.pth", lambda p: p.write_bytes(random.Random(0).randbytes(9999)), "not written by torch.save"),
    "zeros": ("m.pth", lambda p: p.write_bytes(bytes(9999)), "not written by torch.save"),
    "8 GB of zeros": ("m.pth", _sparse(b""), "not written by torch.save"),
    "8 GB after a pickle's start": ("m.pth", _sparse(b"\x80\x02X\xff\xff\xff\xff"), "a string of 4294967295 bytes"),
    "8 GB after a line's start": ("m.pth", _sparse(b"\x80\x02c"), "could not be read"),
    "8 TB": ("m.pth", _sparse(b"\x80\x02", 1 << 43), "more than this machine's memory"),
    "8 GB after a zip's start": ("m.pth", _sparse(b"PK\x03\x04"), "could not be read"),
    "8 GB, safetensors": ("m.safetensors", _sparse(struct.pack("<Q", 2) + b"{}"), "its tensors declare 0 bytes"),
    "8 GB of zeros, Paddle": ("m.pdparams", _sparse(b""), "could not be read"),
    "tar": ("m.pth.tar", _tar, "not written by torch.save"),
    "truncated at 10 %": ("m.pth", _cut(0.1), "could not be read"),
    "truncated at 99 %": ("m.pth", _cut(0.99), "could not be read"),
    "truncated legacy at 10 %": ("m.pth", _cut(0.1, _use_new_zipfile_serialization=False), "declare more bytes"),
    "truncated legacy at 99 %": ("m.pth", _cut(0.99, _use_new_zipfile_serialization=False), "could not be read"),
}
ARCHIVES = {
    "start of a zip": ("m.pth", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "could not be read"),
    "zip of text": ("m.pth", _zip_of_text, "but not one of torch.save"),
    "TorchScript": ("m.pth", lambda p: archive(p, {}, extra=[("m/constants.pkl", b"")]), "could not be read"),
    "compressed": ("m.pth", lambda p: archive(p, {NAME: View()}, compress=True), "compressed archive"),
    "zip bomb": (
        "m.pth",
        lambda p: archive(p, {NAME: View()}, {"0": bytes(1 << 28)}, compress=True),
        "compressed archive",
    ),
    "record of 2 GB": ("m.pth", _lying_record, "declare more bytes than it has"),
    "no pickle": (
        "m.pth",
        lambda p: archive(p, b"", extra=[]) or hostile.rewritten(p, b"data.pkl", b"data.txt"),
        "but not one of torch.save",
    ),
    "two pickles": ("m.pth", lambda p: archive(p, {}, extra=[("n/data.pkl", b"")]), "but not one of torch.save"),
    "record twice": (
        "m.pth",
        lambda p: archive(p, {NAME: View()}, extra=[("m/data/0", bytes(192))]),
        "but not one of torch.save",
    ),
    "record missing": ("m.pth", lambda p: archive(p, {NAME: View()}, {}), "could not be read"),
    "record too short": ("m.pth", lambda p: archive(p, {NAME: View()}, {"0": bytes(64)}), "could not be read"),
    "record too long": ("m.pth", lambda p: archive(p, {NAME: View()}, {"0": bytes(999)}), "could not be read"),
    "storage of 2 ** 40": ("m.pth", lambda p: archive(p, {NAME: View(numel=2**40)}), "declare more bytes than it has"),
    "negative storage": ("m.pth", lambda p: archive(p, {NAME: View(numel=-1)}), "it has the size -1"),
    "storage of text": ("m.pth", lambda p: archive(p, {NAME: View(numel="48")}), "it has the size '48'"),
    "view past its storage": ("m.pth", lambda p: archive(p, {NAME: View(size=(49,))}), "larger than its storage"),
    "view far past it": ("m.pth", lambda p: archive(p, {NAME: View(size=(2**50,))}), "larger than its storage"),
    "offset past it": ("m.pth", lambda p: archive(p, {NAME: View(offset=2**62)}), "larger than its storage"),
    "expanded to 2 ** 40": (
        "m.pth",
        lambda p: archive(p, {NAME: View((2**40,), (0,))}),
        "a tensor of 1099511627776 elements in",
    ),
    "negative size": ("m.pth", lambda p: archive(p, {NAME: View(size=(-48,))}), "it has the size -48"),
    "negative stride": ("m.pth", lambda p: archive(p, {NAME: View(stride=(-1,))}), "it has the size -1"),
    "fraction as size": ("m.pth", lambda p: archive(p, {NAME: View(size=(48.0,))}), r"it has the size 48\.0"),
    "no stride": ("m.pth", lambda p: archive(p, {NAME: View(stride=())}), "without a storage"),
}
CODE = {
    "shell": ("m.pth", lambda p: archive(p, {NAME: Call(os.system, "exit 1")}), r"a pickled posix\.system"),
    "eval": ("m.pth", lambda p: archive(p, {NAME: Call(eval, "1 / 0")}), "a pickled eval"),
    "process": ("m.pth", lambda p: archive(p, {NAME: Call(subprocess.Popen, ["false"])}), r"a pickled \w+\.Popen"),
    "getattr": ("m.pth", lambda p: archive(p, {NAME: Call(getattr, "", "join")}), "a pickled getattr"),
    "whole module": ("m.pth", lambda p: saved(p, nn.Linear(2, 2)), r"a pickled torch\.nn\.modules\.linear\.Linear"),
    "class as a value": ("m.pth", lambda p: archive(p, {NAME: random.Random}), "could not be read"),
    "legacy, shell": ("m.pth", lambda p: legacy(p, {NAME: Call(os.system, "exit 1")}), r"a pickled posix\.system"),
    "Paddle, shell": ("m.pdparams", lambda p: p.write_bytes(pickle.dumps(Call(os.system, "exit 1"))), r"posix\.system"),
    "Paddle, eval": ("m.pdparams", lambda p: p.write_bytes(pickle.dumps(Call(eval, "1 / 0"))), "a pickled eval"),
    "state for a class": ("m.pth", lambda p: archive(p, opcodes(b"ctorch\nSize\n)R}b")), r"a pickled torch\.Size"),
    "plain pickle": ("m.pth", lambda p: p.write_bytes(pickle.dumps({NAME: 1}, 2)), "not written by torch.save"),
    "NumPy's objects": ("m.pth", lambda p: archive(p, opcodes(b"cnumpy\ndtype\nX\x02\0\0\0O8\x85R")), "dtype 'O8'"),
    "NumPy's fields": (
        "m.pth",
        lambda p: archive(p, _numpy_dtype(3, "<", None, ("a",), {"a": 1}, 8, 1, 0)),
        "dtype that is no number",
    ),
}
PICKLES = {
    # a hash recurses: without the check this ends the process
    "deep tuple as key": ("m.pth", lambda p: archive(p, opcodes(b")" + b"\x85" * 10**6 + b"K\x01s")), "nested tuples"),
    # and takes 2 ** 60 steps
    "shared tuples as key": (
        "m.pth",
        lambda p: archive(p, opcodes(b")" + b"q\0h\0\x86" * 60 + b"K\x01s")),
        "nested tup",
    ),
    "long tuple as key": ("m.pth", lambda p: archive(p, opcodes(b"}(" + b"N" * 2000 + b"tNs")), "a tuple of 2001 ent"),
    "set of long tuples": (
        "m.pth",
        lambda p: archive(p, opcodes(b"cbuiltins\nset\n](" + b"N" * 2000 + b"ta\x85R")),
        "a tuple of 2001 entries",
    ),
    "deep list": ("m.pth", lambda p: archive(p, b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "got list"),
    "memo bomb": ("m.pth", lambda p: archive(p, opcodes(b"Nr\xff\xff\xff\xff")), "it holds no tensors"),
    "memo bomb, Paddle": ("m.pdparams", lambda p: p.write_bytes(opcodes(b"Nr\xff\xff\xff\xff")), "it holds no tensors"),
    "string of 4 GB": ("m.pth", lambda p: archive(p, opcodes(b"X\xff\xff\xff\xff")), "declares more bytes"),
    "line without an end": ("m.pth", lambda p: archive(p, b"\x80\x02c" + b"a" * 10**6), "could not be read"),
    "bytearray of 2 ** 40": (
        "m.pth",
        lambda p: archive(p, opcodes(b"cbuiltins\nbytearray\n", long(2**40), b"\x85R")),
        "a bytearray of a given size",
    ),
    "tensor of 2 ** 40": (
        "m.pth",
        lambda p: archive(p, opcodes(b"ctorch\nTensor\n", long(2**40), b"\x85R")),
        r"a pickled torch\.Tensor",
    ),
    "storage by its class": (
        "m.pth",
        lambda p: archive(p, opcodes(b"ctorch.storage\nUntypedStorage\n", long(2**40), b"\x85\x81")),
        r"a pickled torch\.storage\.UntypedStorage",
    ),
    "outside object": ("m.pth", lambda p: archive(p, opcodes(b"K\x01Q")), "objects outside of it"),
    "unknown opcode": ("m.pth", lambda p: archive(p, opcodes(b"\xff")), "could not be read"),
    "opcode of extensions": ("m.pth", lambda p: archive(p, opcodes(b"\x82\x01")), "opcode EXT1"),
    "empty stack": ("m.pth", lambda p: archive(p, b"\x80\x02s."), "could not be read"),
    "no end": ("m.pth", lambda p: archive(p, b"\x80\x02}"), "could not be read"),
    "protocol 5": ("m.pth", lambda p: archive(p, pickle.dumps({NAME: 1}, 5)), "could not be read"),
    "key without a hash": ("m.pth", lambda p: archive(p, opcodes(b"}]Ns")), "could not be read"),
    "dict of itself": ("m.pth", lambda p: archive(p, b"\x80\x02}q\0X\x01\0\0\0wh\0s."), "it holds no tensors"),
    "numbers as names": ("m.pth", lambda p: saved(p, {1: torch.ones(2)}), "it holds no tensors"),
    "names for a terminal": ("m.pth", lambda p: saved(p, {"\x1b[2J" * 99: torch.ones(2)}), r"'\\x1b\[2J"),
    "name of a million dots": ("m.pth", lambda p: saved(p, {"a." * 10**6: torch.ones(2)}), "a name of 2000000 char"),
    "many dicts": (
        "m.pth",
        lambda p: saved(p, {str(i): {"norm.bias": VALUE} for i in range(20_000)}),
        "several state dicts that fit equally well",
    ),
}
LEGACY = {
    "wrong magic": ("m.pth", lambda p: legacy(p, {}, magic=1), "not written by torch.save"),
    "wrong protocol": ("m.pth", lambda p: legacy(p, {}, protocol=1), "Invalid protocol version"),
    "storage of 2 ** 36": ("m.pth", lambda p: legacy(p, {NAME: View(numel=2**36)}), "declare more bytes than it has"),
    # without the check the storage grows, and the tensor's end is whatever lay in memory
    "view past its storage": ("m.pth", lambda p: legacy(p, {NAME: View(size=(99,))}), "larger than its storage"),
    "two sizes of a storage": (
        "m.pth",
        lambda p: legacy(p, {NAME: View(numel=4, size=(4,)), "b": View(numel=48)}),
        "larger than its storage",
    ),
    "unknown storage": ("m.pth", lambda p: legacy(p, {NAME: View()}, keys=["7"]), "could not be read"),
    "storages missing": ("m.pth", lambda p: legacy(p, {NAME: View()}, {}, keys=["0"]), "could not be read"),
}
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


def _header(**changes):
    return {NAME: {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]} | changes}


SAFETENSORS = {
    "text": lambda p: p.write_bytes(b"not safetensors"),
    "header past the end": lambda p: safetensors(p, _header(), bytes(192), length=10**6),
    "header of 2 ** 63": lambda p: safetensors(p, _header(), bytes(192), length=2**63),
    "no header": lambda p: safetensors(p, b"", bytes(192)),
    "header of a list": lambda p: safetensors(p, [1], bytes(192)),
    "deep header": lambda p: safetensors(p, b"[" * 10**5, bytes(192)),
    "data missing": lambda p: safetensors(p, _header(), bytes(100)),
    "data left over": lambda p: safetensors(p, _header(), bytes(300)),
    "offsets past the end": lambda p: safetensors(p, _header(data_offsets=[0, 10**12]), bytes(192)),
    "offsets reversed": lambda p: safetensors(p, _header(data_offsets=[192, 0]), bytes(192)),
    "negative offset": lambda p: safetensors(p, _header(data_offsets=[-192, 192]), bytes(192)),
    "shape too large": lambda p: safetensors(p, _header(shape=[2**40]), bytes(192)),
    "shape that overflows": lambda p: safetensors(p, _header(shape=[2**63, 2**63]), bytes(192)),
    "unknown dtype": lambda p: safetensors(p, _header(dtype="F31"), bytes(192)),
    "overlapping": lambda p: safetensors(p, {"a": _header()[NAME], "b": _header()[NAME]}, bytes(192)),
    "not UTF-8": lambda p: safetensors(p, b'{"\xff":1}', bytes(192)),
}


def _array(code="f4", shape=(2,), data=b"abcdefgh", state=(3, "<", None, None, None, -1, -1, 0)):
    """A NumPy array's pickle with the given dtype, shape and bytes."""
    dtype = b"cnumpy\ndtype\n" + pickle.dumps((code,), 2)[2:-1] + b"R" + pickle.dumps(state, 2)[2:-1] + b"b"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    return opcodes(made, b"(K\x01", pickle.dumps(shape, 2)[2:-1], dtype, b"\x89", pickle.dumps(data, 3)[2:-1], b"tb")


PADDLE = {
    "objects": (_array("O8"), "dtype 'O8'"),
    "text": (_array("U2"), "dtype 'U2'"),
    "dates": (_array("M8"), "dtype 'M8'"),
    "dtype of several fields": (_array(state=(3, "<", None, ("a",), {"a": 1}, 8, 1, 0)), "dtype is no number"),
    "dtype of no order": (_array(state=(3, "x", None, None, None, -1, -1, 0)), "dtype is no number"),
    "shape too large": (_array(shape=(2**40,)), "in 8 bytes"),
    "shape too small": (_array(shape=(1,)), "in 8 bytes"),
    "negative shape": (_array(shape=(-1, -2)), "could not be read"),
    "numbers for bytes": (_array(data=8), "something else than bytes"),
    "objects for bytes": (_array("O8", data=[1, 2]), "dtype 'O8'"),
    "codec": (opcodes(b"c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R"), r"pickled _codecs\.encode"),
    "LoD tensor": (pickle.dumps({"w": Call(eval, "data", {"data": 1})}, 2), "pickled eval"),
    "tensor of torch": (pickle.dumps({"w": torch.ones(2)}, 2), r"pickled torch\.storage\._load_from_bytes"),
    "truncated": (pickle.dumps({"w": np.ones(999)}, 4)[:-99], "truncated"),
    "file of torch": (b"PK\x03\x04", "could not be read"),
    "list": (pickle.dumps([1], 2), "must hold a dict"),
    "no arrays": (pickle.dumps({"epoch": 3, "StructuredToParameterName@@": {}}, 2), "holds no tensors"),
}
HOSTILE = {
    **{f"no file: {name}": case for name, case in NO_FILE.items()},
    **{f"bytes: {name}": case for name, case in BYTES.items()},
    **{f"archive: {name}": case for name, case in ARCHIVES.items()},
    **{f"code: {name}": case for name, case in CODE.items()},
    **{f"pickle: {name}": case for name, case in PICKLES.items()},
    **{f"legacy: {name}": case for name, case in LEGACY.items()},
    **{f"safetensors: {n}": ("m.safetensors", make, "could not be read as saf") for n, make in SAFETENSORS.items()},
    **{
        f"Paddle: {name}": ("m.pdparams", lambda p, data=data: p.write_bytes(data), text)
        for name, (data, text) in PADDLE.items()
    },
}


@pytest.fixture
def soon():
    """Fail a test that takes more than 20 seconds, rather than wait without end."""

    def stop(*_):
        raise TimeoutError("the load does not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize(("name", "make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, monkeypatch, soon, name, make, reason, strict):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    model = small()
    before = exact_state(model)
    with warnings.catch_warnings(), hostile.peak_memory() as rise:
        warnings.simplefilter("ignore")  # of torch.load, about odd pickles
        with pytest.raises(CheckpointError, match=reason) as error:
            load_checkpoint(model, tmp_path / name, strict=strict, num_classes=4)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value)) < 4000
    assert "\x1b" not in str(error.value)
    assert exact_state(model) == before
    assert not rise or rise[0] < 200e6


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


def test_a_fifo_that_takes_the_files_place(tmp_path, monkeypatch, soon):
    path = saved(tmp_path / "m.pth", small().state_dict())
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *_, **__: status)
    with pytest.raises(CheckpointError, match="is a FIFO"):
        load_checkpoint(small(), path)


def test_links_to_files_are_followed_and_broken_ones_say_so(tmp_path):
    path = saved(tmp_path / "m.pth", small().state_dict())
    (tmp_path / "link.pth").symlink_to(path)
    assert load_checkpoint(small(), tmp_path / "link.pth").complete
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*link\.pth; it is a link to .*m\.pth"):
        load_checkpoint(small(), tmp_path / "link.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_checkpoint(small(), tmp_path / "link.pth" / "m.pth")


def test_harmless_files_built_by_hand_are_read(tmp_path):
    """The builders of this file make what is read if nothing is wrong with it."""
    model = nn.LayerNorm(48)
    for name, write in (("m.pth", archive), ("n.pth", legacy)):
        write(tmp_path / name, {"weight": View(), "bias": View(stride=(0,))})
        assert load_checkpoint(model, tmp_path / name).complete and not model.weight.any()
    safetensors(tmp_path / "m.safetensors", {"weight": _header()[NAME]}, bytes(192))
    assert load_checkpoint(model, tmp_path / "m.safetensors", strict=False).loaded == 1
    (tmp_path / "m.pdparams").write_bytes(_array())
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(2))
    assert load_checkpoint(module, tmp_path / "m.pdparams").complete
    assert module.w.detach().numpy().tobytes() == b"abcdefgh"
    archive(tmp_path / "s.pth", {"weight": View(), "bias": View(), "state": OrderedDict(a=(1, (2, 3)))})
    assert load_checkpoint(model, tmp_path / "s.pth").ignored == ("state",)


def written(path, state):
    """The state dict in a file of the kind that its name says."""
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
def test_loading_opens_the_file_alone(tmp_path, name):
    """No file is written, no other one is read, no process is started, no address is asked for."""
    path = written(tmp_path / name, small().state_dict())
    load_checkpoint(small(), path)  # modules are imported
    model, seen, watching = small(), [], False

    def hook(event, arguments):
        if watching and event.partition(".")[0] in ("open", "os", "subprocess", "socket", "shutil", "tempfile", "exec"):
            seen.append((event, *arguments))

    sys.addaudithook(hook)  # it cannot be removed, but stops watching
    watching = True
    load_checkpoint(model, path)
    watching = False
    assert seen
    for event, opened, _mode, flags in seen:
        assert event == "open" and (isinstance(opened, int) or str(opened) in (str(path), "/proc/self/maps"))
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize("name", KINDS_OF_FILES)
def test_files_with_wrong_bytes(tmp_path, soon, name):
    """Bytes changed, left out and put in at random: the file is refused or read, and nothing else happens."""
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_checkpoint(model, path, strict=chance.random() < 0.5)
            except CheckpointError:
                assert exact_state(model) == before
