"""Non-files, broken files and files with false sizes are rejected with the reason; the model is unchanged."""

import gzip
import os
import random
import socket
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from support import hostile
from support.checkpoints import saved, small
from support.hostile import NAME, View, archive, array_pickle, check_refused, header, legacy, safetensors
from t2t_fast.interop.checkpoints import load_checkpoint


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
    """A sparse file, which takes no disk space."""

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
    """The archive's directory declares a record of 2 GB."""
    archive(path, {NAME: View()})
    size = struct.pack("<L", 4 * 48)
    hostile.rewritten(path, size + size, struct.pack("<L", 1 << 31) * 2)


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
LEGACY = {
    "wrong magic": ("m.pth", lambda p: legacy(p, {}, magic=1), "not written by torch.save"),
    "wrong protocol": ("m.pth", lambda p: legacy(p, {}, protocol=1), "Invalid protocol version"),
    "storage of 2 ** 36": ("m.pth", lambda p: legacy(p, {NAME: View(numel=2**36)}), "declare more bytes than it has"),
    # without the check the storage grows, and the end of the tensor is uninitialised memory
    "view past its storage": ("m.pth", lambda p: legacy(p, {NAME: View(size=(99,))}), "larger than its storage"),
    "two sizes of a storage": (
        "m.pth",
        lambda p: legacy(p, {NAME: View(numel=4, size=(4,)), "b": View(numel=48)}),
        "larger than its storage",
    ),
    "unknown storage": ("m.pth", lambda p: legacy(p, {NAME: View()}, keys=["7"]), "could not be read"),
    "storages missing": ("m.pth", lambda p: legacy(p, {NAME: View()}, {}, keys=["0"]), "could not be read"),
}
SAFETENSORS = {
    "text": lambda p: p.write_bytes(b"not safetensors"),
    "header past the end": lambda p: safetensors(p, header(), bytes(192), length=10**6),
    "header of 2 ** 63": lambda p: safetensors(p, header(), bytes(192), length=2**63),
    "no header": lambda p: safetensors(p, b"", bytes(192)),
    "header of a list": lambda p: safetensors(p, [1], bytes(192)),
    "deep header": lambda p: safetensors(p, b"[" * 10**5, bytes(192)),
    "data missing": lambda p: safetensors(p, header(), bytes(100)),
    "data left over": lambda p: safetensors(p, header(), bytes(300)),
    "offsets past the end": lambda p: safetensors(p, header(data_offsets=[0, 10**12]), bytes(192)),
    "offsets reversed": lambda p: safetensors(p, header(data_offsets=[192, 0]), bytes(192)),
    "negative offset": lambda p: safetensors(p, header(data_offsets=[-192, 192]), bytes(192)),
    "shape too large": lambda p: safetensors(p, header(shape=[2**40]), bytes(192)),
    "shape that overflows": lambda p: safetensors(p, header(shape=[2**63, 2**63]), bytes(192)),
    "unknown dtype": lambda p: safetensors(p, header(dtype="F31"), bytes(192)),
    "overlapping": lambda p: safetensors(p, {"a": header()[NAME], "b": header()[NAME]}, bytes(192)),
    "not UTF-8": lambda p: safetensors(p, b'{"\xff":1}', bytes(192)),
}
HOSTILE = {
    **{f"no file: {name}": case for name, case in NO_FILE.items()},
    **{f"bytes: {name}": case for name, case in BYTES.items()},
    **{f"archive: {name}": case for name, case in ARCHIVES.items()},
    **{f"legacy: {name}": case for name, case in LEGACY.items()},
    **{f"safetensors: {n}": ("m.safetensors", make, "could not be read as saf") for n, make in SAFETENSORS.items()},
}


@pytest.mark.parametrize(("name", "make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_broken_files_are_rejected(tmp_path, monkeypatch, name, make, reason):
    monkeypatch.chdir(tmp_path)
    check_refused(tmp_path / name, make, reason)


def test_valid_files_built_by_hand_are_read(tmp_path):
    """The functions that build the broken files also build valid ones, which load."""
    model = nn.LayerNorm(48)
    for name, write in (("m.pth", archive), ("n.pth", legacy)):
        write(tmp_path / name, {"weight": View(), "bias": View(stride=(0,))})
        assert load_checkpoint(model, tmp_path / name).complete and not model.weight.any()
    safetensors(tmp_path / "m.safetensors", {"weight": header()[NAME]}, bytes(192))
    assert load_checkpoint(model, tmp_path / "m.safetensors", strict=False).loaded == 1
    (tmp_path / "m.pdparams").write_bytes(array_pickle())
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(2))
    assert load_checkpoint(module, tmp_path / "m.pdparams").complete
    assert module.w.detach().numpy().tobytes() == b"abcdefgh"
    archive(tmp_path / "s.pth", {"weight": View(), "bias": View(), "state": OrderedDict(a=(1, (2, 3)))})
    assert load_checkpoint(model, tmp_path / "s.pth").ignored == ("state",)
