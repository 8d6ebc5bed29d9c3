"""Files whose pickles would run code or exhaust memory are rejected with the reason; the model is unchanged."""

import os
import pickle
import random
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from support.checkpoints import saved
from support.hostile import NAME, VALUE, Call, archive, array_pickle, check_refused, legacy, long, opcodes


def _numpy_dtype(*state):
    """A NumPy scalar whose dtype has the given state."""
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R" + pickle.dumps(state, 2)[2:-1] + b"b"
    return opcodes(b"cnumpy.core.multiarray\nscalar\n", dtype, b"U\x08abcdefgh\x86R")


# name: (file name, function that makes it, pattern of the reason)
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
    # hashing recurses: without the check it crashes the process
    "deep tuple as key": ("m.pth", lambda p: archive(p, opcodes(b")" + b"\x85" * 10**6 + b"K\x01s")), "nested tuples"),
    # hashing takes 2 ** 60 steps
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
PADDLE = {
    "objects": (array_pickle("O8"), "dtype 'O8'"),
    "text": (array_pickle("U2"), "dtype 'U2'"),
    "dates": (array_pickle("M8"), "dtype 'M8'"),
    "dtype of several fields": (array_pickle(state=(3, "<", None, ("a",), {"a": 1}, 8, 1, 0)), "dtype is no number"),
    "dtype of no order": (array_pickle(state=(3, "x", None, None, None, -1, -1, 0)), "dtype is no number"),
    "shape too large": (array_pickle(shape=(2**40,)), "in 8 bytes"),
    "shape too small": (array_pickle(shape=(1,)), "in 8 bytes"),
    "negative shape": (array_pickle(shape=(-1, -2)), "could not be read"),
    "numbers for bytes": (array_pickle(data=8), "something else than bytes"),
    "objects for bytes": (array_pickle("O8", data=[1, 2]), "dtype 'O8'"),
    "codec": (opcodes(b"c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R"), r"pickled _codecs\.encode"),
    "LoD tensor": (pickle.dumps({"w": Call(eval, "data", {"data": 1})}, 2), "pickled eval"),
    "tensor of torch": (pickle.dumps({"w": torch.ones(2)}, 2), r"pickled torch\.storage\._load_from_bytes"),
    "truncated": (pickle.dumps({"w": np.ones(999)}, 4)[:-99], "truncated"),
    "file of torch": (b"PK\x03\x04", "could not be read"),
    "list": (pickle.dumps([1], 2), "must hold a dict"),
    "no arrays": (pickle.dumps({"epoch": 3, "StructuredToParameterName@@": {}}, 2), "holds no tensors"),
}
HOSTILE = {
    **{f"code: {name}": case for name, case in CODE.items()},
    **{f"pickle: {name}": case for name, case in PICKLES.items()},
    **{
        f"Paddle: {name}": ("m.pdparams", lambda p, data=data: p.write_bytes(data), text)
        for name, (data, text) in PADDLE.items()
    },
}


@pytest.mark.parametrize(("name", "make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_pickles(tmp_path, monkeypatch, name, make, reason):
    monkeypatch.chdir(tmp_path)
    check_refused(tmp_path / name, make, reason)
