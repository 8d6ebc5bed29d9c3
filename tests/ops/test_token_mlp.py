"""Dropout masks: Philox known answers, rates, independence, and the same masks everywhere."""

import pytest
import torch

from t2t_fast.functional import performer_block, token_mlp
from t2t_fast.ops.philox import _lanes, keep_mask, philox
from t2t_fast.testing import CASES

# Random123's known answers for philox4x32: rounds, counter, key, result
KNOWN = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_philox_known_answers(rounds, counter, key, expected):
    assert tuple(int(word) for word in philox(words(counter), words(key), rounds)) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    """Rate within five standard deviations; no correlation with neighbours, the other stream or another seed."""
    n = 1 << 18
    seed = torch.tensor(-1234567890123456789)
    mask = keep_mask(seed, 1, (n,), p).double()
    assert abs(mask.mean().item() - (1 - round(65536 * p) / 65536)) <= 5 * (p * (1 - p) / n) ** 0.5
    if p == 0:
        return
    others = {
        "neighbour": mask.roll(1),
        "next call": mask.roll(8),
        "other stream": keep_mask(seed, 2, (n,), p).double(),
        "other seed": keep_mask(seed + 1, 1, (n,), p).double(),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([mask, other]))[0, 1].abs().item()
        assert correlation <= 5 / n**0.5, name


def test_mask_depends_on_the_element_alone():
    """A longer tensor starts with the same mask: nothing depends on tiling or size."""
    seed = torch.tensor(42)
    long = keep_mask(seed, 1, (3, 1001), 0.3).flatten()
    assert torch.equal(keep_mask(seed, 1, (77,), 0.3), long[:77])


@pytest.mark.parametrize(("op", "name"), [("token_mlp", "dropout"), ("performer_block", "dropout")])
def test_backends_draw_the_same_masks(op, name):
    case = next(c for c in CASES[op]() if c.name == name)
    torch.testing.assert_close(case.run("aten"), case.run("reference"), rtol=1e-4, atol=1e-5)
    dropped = {**case.options, "proj_drop": 0.0, "mlp_drop": 0.0}
    assert not torch.allclose(case.run("aten"), case.call(**case.tensors, **dropped), atol=1e-2)


@pytest.mark.parametrize("call", [token_mlp, performer_block], ids=["token_mlp", "performer_block"])
def test_seed_follows_the_global_generator(call):
    case = next(c for c in CASES[call.__name__]() if c.name == "dropout")
    tensors = {name: t for name, t in case.tensors.items() if name != "seed"}
    torch.manual_seed(3)
    first, second = (call(**tensors, **case.options) for _ in range(2))
    torch.manual_seed(3)
    again = call(**tensors, **case.options)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_keeps_the_mean():
    """Over many seeds the mean output of the projection's dropout is the output without it."""
    generator = torch.Generator().manual_seed(0)
    width = 8
    y, v = torch.randn(1, 4, width, generator=generator), torch.zeros(1, 4, width)
    eye, zero = torch.eye(width), torch.zeros(width, width)
    outs = [
        token_mlp(y, v, eye, None, None, None, zero, None, zero, None, proj_drop=0.5, seed=torch.tensor(seed))
        for seed in range(2000)
    ]
    torch.testing.assert_close(torch.stack(outs).mean(0), y, rtol=0, atol=0.3)
    assert {0.0, 2.0} == set((outs[0] / y).flatten().tolist())


def test_mask_of_more_than_four_billion_calls():
    """Short counters, whose high word stays a scalar, and long ones give the same bits."""
    seed = torch.tensor(7)
    short = _lanes(2**32 - 9, 2**32 - 1, seed, 1, 6554)
    long = _lanes(2**32 - 9, 2**32 + 9, seed, 1, 6554)
    assert torch.equal(short, long[:8])
    assert not torch.equal(long[9:], _lanes(0, 9, seed, 1, 6554))


def test_mask_in_pieces(monkeypatch):
    """How many calls are computed at a time changes nothing."""
    whole = keep_mask(torch.tensor(3), 2, (5, 333), 0.1)
    monkeypatch.setattr("t2t_fast.ops.philox.CPU_CALLS", 16)
    assert torch.equal(keep_mask(torch.tensor(3), 2, (5, 333), 0.1), whole)
