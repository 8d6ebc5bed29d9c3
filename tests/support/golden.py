"""Results of the upstream models in float64, and functions that compare the project's models with them.

``tests/golden/README.md`` describes the origin of the files and how weights and inputs are derived from names.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from support import ARCHIVE, LEFT_OUT

FOLDER = Path(__file__).resolve().parent.parent / "golden"


def _large(name):
    """The path of a large file; skips the test in an unpacked source archive, which has none of them."""
    path = FOLDER / name
    if ARCHIVE and not path.exists():
        pytest.skip(LEFT_OUT)
    return path


@cache
def cases():
    """All cases by id, in the order of the file."""
    return {case["id"]: case for case in json.loads((FOLDER / "cases.json").read_text())["cases"]}


@cache
def key_table(name):
    """The state_dict table of one upstream model: shapes, kinds, trainable flags, checksums."""
    return json.loads(_large(f"keys/{name}.keys.json").read_text())


def key_table_names():
    return sorted(path.name.removesuffix(".keys.json") for path in (FOLDER / "keys").glob("*.keys.json"))


def arrays(case):
    """The numbers of a case."""
    with np.load(_large(case["file"]), allow_pickle=False) as data:
        return dict(data)


def _normal(salt, name, shape):
    seed = zlib.crc32((salt + name).encode("utf-8"))
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def _sinusoid(shape):
    _, positions, width = shape
    angle = np.arange(positions)[:, None] / 10000.0 ** (2 * (np.arange(width) // 2) / width)
    return np.where(np.arange(width) % 2 == 0, np.sin(angle), np.cos(angle))[None]


def make_weight(case, key, shape):
    """The recipe's weight for one upstream key. The weights of the latest model are cached: do not modify them."""
    if _drawn.get("id") != case["id"]:
        _drawn.clear()
        _drawn["id"] = case["id"]
    if (key, shape) not in _drawn:
        _drawn[key, shape] = _draw(case, key, shape)
    return _drawn[key, shape]


_drawn = {}


def _draw(case, key, shape):
    z = _normal(case["salt"], key, tuple(shape))
    *_, prev, last = ["", *key.split(".")]
    if last == "pos_embed":
        z = _sinusoid(shape)
    elif last == "w" and len(shape) == 2:
        pass
    elif last == "weight" and len(shape) == 1:
        z = 1 + 0.1 * z
    elif last == "weight":
        gain = {"kqv": case.get("kqv_gain", 0.25), "qkv": case.get("qkv_gain", 1.0)}.get(prev, 1.0)
        z = z / np.sqrt(np.prod(shape[1:])) * gain
    elif last in ("bias", "cls_token", "dist_token", "pos_embedding"):
        z = 0.1 * z
    else:
        raise AssertionError(f"the recipe has no rule for {key}")
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def make_input(case, dtype=torch.float64):
    z = _normal(case["salt"], "input", tuple(case["input"]))
    return torch.from_numpy(z.astype(np.float32)).to(dtype)


@torch.no_grad()
def fill(model, case, upstream_key=lambda key: key):
    """Give every parameter and buffer of ``model`` its recipe weight; ``upstream_key`` maps our names to upstream's."""
    for key, tensor in model.state_dict().items():
        tensor.copy_(make_weight(case, upstream_key(key), tuple(tensor.shape)))
    return model


def weights_crc32(model, case, upstream_key=lambda key: key):
    """The chained checksum of golden/README.md over the recipe weights of ``model``."""
    total = 0
    shapes = {upstream_key(key): tuple(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(shapes):
        crc = zlib.crc32(make_weight(case, key, shapes[key]).numpy().astype("<f4").tobytes())
        total = zlib.crc32(f"{key}:{crc:08x};".encode(), total)
    return f"{total:08x}"


def loss_of(case, out):
    """The scalar whose gradients are in the files, as a tensor."""
    r = _normal(case["salt"], "loss", tuple(out.shape)).astype(np.float32)
    return (out * torch.from_numpy(r).to(out.dtype)).sum()


def check_sample(case, name, tensor, norm, dot, index, values, rtol, label):
    """Compare a tensor's norm, dot product with a fixed direction, and a few entries.

    ``rtol`` is relative to the norm (for norm and dot) and to the largest stored entry or the mean size (for entries).
    """
    flat = tensor.detach().double().flatten()
    direction = torch.from_numpy(_normal(case["salt"], name, flat.numel()))
    scale = max(float(norm), 1e-30)
    assert abs(flat.norm().item() - float(norm)) <= rtol * scale, f"{label}: norm"
    assert abs((flat @ direction).item() - float(dot)) <= 4 * rtol * scale, f"{label}: dot product"
    entry = max(float(np.abs(values).max()), scale / flat.numel() ** 0.5)
    got = flat[torch.from_numpy(index.astype(np.int64))].numpy()
    assert np.abs(got - values).max() <= 4 * rtol * entry, f"{label}: entries"


def check_gradients(case, data, gradient_of, rtol):
    """``gradient_of(key)`` returns the gradient for an upstream parameter key or ``input``."""
    for i, key in enumerate(data["grad_keys"].tolist()):
        gradient = gradient_of(key)
        assert gradient is not None, f"no gradient for {key}"
        check_sample(
            case,
            "dot:grad:" + key,
            gradient,
            data["grad_norm"][i],
            data["grad_dot"][i],
            data["grad_idx"][i],
            data["grad_val"][i],
            rtol,
            f"gradient of {key}",
        )
