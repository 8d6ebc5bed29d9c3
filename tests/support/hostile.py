"""Builders of files that are broken, declare wrong sizes, or would run code; no library writes such files."""

import io
import json
import pickle
import signal
import struct
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch

from t2t_fast.errors import CheckpointError
from t2t_fast.interop.checkpoints import load_checkpoint

from .checkpoints import exact_state, small

MAGIC = 0x1950A86A20F9469CFC6C
NAME = "norm.bias"
VALUE = torch.ones(8)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class View:
    """An object whose pickle is a float32 tensor of a storage, with arbitrary sizes."""

    def __init__(self, size=(48,), stride=(1,), offset=0, numel=48, key="0", kind=torch.FloatStorage):
        self.size, self.stride, self.offset = size, stride, offset
        self.storage = Storage(kind, key, numel)

    def __reduce__(self):
        arguments = (self.storage, self.offset, self.size, self.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class Storage:
    def __init__(self, kind, key, numel):
        self.identity = ("storage", kind, key, "cpu", numel)


def dumped(content, legacy=False):
    """The pickle of ``content``, with its :class:`Storage` objects as persistent ids."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.identity + (None,) * legacy if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def archive(path, content, storages=None, *, compress=False, extra=()):
    """A zip file like that of torch.save: ``content`` (an object or the bytes of a pickle), storages {key: bytes}."""
    data = content if isinstance(content, bytes) else dumped(content)
    storages = {"0": bytes(4 * 48)} if storages is None else storages
    records = [("m/data.pkl", data), ("m/byteorder", b"little"), ("m/version", b"3\n")]
    records += [(f"m/data/{key}", value) for key, value in storages.items()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else 0) as file:
        warnings.simplefilter("ignore")  # duplicate names
        for name, value in (*records, *extra):
            file.writestr(name, value)


def opcodes(*parts):
    """The pickle of a dict with one entry, whose value the opcodes ``parts`` push."""
    return b"\x80\x02}X\x01\0\0\0w" + b"".join(parts) + b"s."


def long(number):
    """The opcode that pushes an eight-byte integer."""
    return b"\x8a\x08" + struct.pack("<q", number)


def legacy(path, content, storages=None, *, magic=MAGIC, protocol=1001, keys=None):
    """A file like that of torch.save before 1.6: pickles, then the storages, each after its number of elements."""
    storages = {"0": bytes(4 * 48)} if storages is None else storages
    keys = sorted(storages) if keys is None else keys
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (magic, protocol, system)] + [
        dumped(content, True),
        pickle.dumps(keys, 2),
    ]
    parts += [struct.pack("<q", len(value) // 4) + value for value in storages.values()]
    path.write_bytes(b"".join(parts))


def safetensors(path, header, data=b"", length=None):
    """A safetensors file: the length of the header, the header (JSON or bytes), the data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def rewritten(path, old, new):
    """Replace bytes of a file."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@contextmanager
def peak_memory():
    """A list that receives the increase of the process's peak memory in bytes; empty where it is not available."""
    rise = []
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
    except OSError:
        yield rise
        return
    yield rise
    rise.append(_status("VmHWM") - before)


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def header(**changes):
    return {NAME: {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]} | changes}


def array_pickle(code="f4", shape=(2,), data=b"abcdefgh", state=(3, "<", None, None, None, -1, -1, 0)):
    """A NumPy array's pickle with the given dtype, shape and bytes."""
    dtype = b"cnumpy\ndtype\n" + pickle.dumps((code,), 2)[2:-1] + b"R" + pickle.dumps(state, 2)[2:-1] + b"b"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    return opcodes(made, b"(K\x01", pickle.dumps(shape, 2)[2:-1], dtype, b"\x89", pickle.dumps(data, 3)[2:-1], b"tb")


@contextmanager
def soon():
    """Raise after 20 seconds instead of waiting forever."""

    def stop(*_):
        raise TimeoutError("the load does not end")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check_refused(path, make, reason):
    """The file that ``make`` writes is refused quickly, with the reason and little memory; the model is unchanged.

    It is loaded with ``strict=False``, which accepts more than ``strict=True``; both read files in the same way.
    """
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    make(path)
    model = small()
    before = exact_state(model)
    with warnings.catch_warnings(), soon(), peak_memory() as rise:
        warnings.simplefilter("ignore")  # torch.load's, about unusual pickles
        with pytest.raises(CheckpointError, match=reason) as error:
            load_checkpoint(model, path, strict=False, num_classes=4)
    assert str(path) in str(error.value) and len(str(error.value)) < 4000
    assert "\x1b" not in str(error.value)
    assert exact_state(model) == before
    assert not rise or rise[0] < 200e6
