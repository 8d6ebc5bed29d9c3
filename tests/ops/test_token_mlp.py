"""Dropout masks: Philox known answers, rates, independence, and the same masks everywhere."""

import pytest
import torch

from t2t_fast.functional import performer_layer, token_mlp
from t2t_fast.ops._common.philox import _lanes, keep_masks, philox
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


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 0.9), (0.3, 0.0), (0.0, 0.3)])
def test_rates_and_independence(p, q):
    """Rates within five standard deviations; no correlation with neighbours, the other dropout or another seed."""
    n = 1 << 18
    seed = torch.tensor(-1234567890123456789)
    masks, others = keep_masks(seed, (n,), p, q), keep_masks(seed + 1, (n,), p, q)
    for rate, mask, other in zip((p, q), masks, others, strict=True):
        if rate == 0:
            assert mask is None
            continue
        mask = mask.double()
        assert abs(mask.mean().item() - (1 - rate)) <= 5 * (rate * (1 - rate) / n) ** 0.5 + 1 / 65536
        for each in (mask.roll(1), mask.roll(8), other.double()):
            assert correlation(mask, each) <= 5 / n**0.5
    if p and q:
        assert correlation(*(mask.double() for mask in masks)) <= 5 / n**0.5
        # the share of elements dropped by both is that of independent masks
        both = (~masks[0] & ~masks[1]).double().mean().item()
        assert abs(both - p * q) <= 5 * (p * q / n) ** 0.5


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()


def test_mask_depends_on_the_element_alone():
    """A longer tensor starts with the same mask: it depends neither on tiling nor on size."""
    seed = torch.tensor(42)
    long = keep_masks(seed, (3, 1001), 0.3, 0.2)
    for short, whole in zip(keep_masks(seed, (77,), 0.3, 0.2), long, strict=True):
        assert torch.equal(short, whole.flatten()[:77])


def test_masks_of_an_empty_tensor():
    first, second = keep_masks(torch.tensor(1), (0, 5), 0.1, 0.1)
    assert first.shape == second.shape == (0, 5)


@pytest.mark.parametrize(("op", "name"), [("token_mlp", "dropout"), ("performer_layer", "dropout")])
def test_backends_draw_the_same_masks(op, name):
    case = next(c for c in CASES[op]() if c.name == name)
    torch.testing.assert_close(case.run("aten"), case.run("reference"), rtol=1e-4, atol=1e-5)
    dropped = {**case.options, "proj_drop": 0.0, "mlp_drop": 0.0}
    assert not torch.allclose(case.run("aten"), case.call(**case.tensors, **dropped), atol=1e-2)


@pytest.mark.parametrize("call", [token_mlp, performer_layer], ids=["token_mlp", "performer_layer"])
def test_seed_follows_the_global_generator(call):
    case = next(c for c in CASES[call.__name__]() if c.name == "dropout")
    tensors = {name: t for name, t in case.tensors.items() if name != "seed"}
    torch.manual_seed(3)
    first, second = (call(**tensors, **case.options) for _ in range(2))
    torch.manual_seed(3)
    again = call(**tensors, **case.options)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_dropout_keeps_the_mean():
    """The mean output over many seeds, with dropout after the projection, is the output without dropout."""
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


def test_lanes_of_more_than_four_billion_calls():
    """Ranges where the high word of the counter is a scalar and ranges where it changes give the same bits."""
    seed = torch.tensor(7)
    short = torch.stack(_lanes(2**32 - 9, 2**32 - 1, seed))
    long = torch.stack(_lanes(2**32 - 9, 2**32 + 9, seed))
    assert torch.equal(short, long[:, :8])
    assert not torch.equal(long[:, 9:], torch.stack(_lanes(0, 9, seed)))


def test_masks_in_pieces(monkeypatch):
    """The mask does not depend on the number of calls computed at a time."""
    whole = keep_masks(torch.tensor(3), (5, 333), 0.1, 0.2)
    monkeypatch.setattr("t2t_fast.ops._common.philox.CPU_CALLS", 16)
    for mask, expected in zip(keep_masks(torch.tensor(3), (5, 333), 0.1, 0.2), whole, strict=True):
        assert torch.equal(mask, expected)
