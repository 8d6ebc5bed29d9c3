"""The table of launch parameters of the Triton attention, and how a call is cut into programs."""

import pytest
import torch

from t2t_fast.ops.performer_attention import launch


@pytest.mark.parametrize("sequences", [1, 2, 64, 1000])
@pytest.mark.parametrize("length", [1, 16, 196, 3136, 1_000_000])
@pytest.mark.parametrize("programs", [1, 16, 528])
def test_a_cut_covers_every_token_once(length, sequences, programs):
    splits, tiles = launch.cut(length, sequences, 64, programs)
    assert (splits - 1) * tiles * 64 < length <= splits * tiles * 64
    assert splits == 1 or splits * sequences <= programs


def test_no_tokens():
    assert launch.cut(0, 3, 64, 100).splits == 1


def test_chosen_from_the_table_else_by_default(monkeypatch):
    row = {"tokens": 32, "warps": 8, "stages": 4, "programs": 3}
    monkeypatch.setattr(launch, "_table", lambda: {"sm_90": {"keys": {"bf16-E64-m32": row}}})
    monkeypatch.setattr(launch, "_found", launch._found.__wrapped__)
    assert launch.chosen("keys", "sm_90", torch.bfloat16, 60, 20) == row
    for name, architecture, dtype in [
        ("queries", "sm_90", torch.bfloat16),
        ("keys", "sm_80", torch.bfloat16),
        ("keys", "sm_90", torch.float16),
    ]:
        assert launch.chosen(name, architecture, dtype, 64, 32) == launch.default(name, dtype, 64, 32)


def test_the_committed_table_is_well_formed():
    for architecture, passes in launch._table().items():
        assert architecture.startswith("sm_") and set(passes) <= set(launch.passes())
        for row in (row for rows in passes.values() for row in rows.values()):
            assert set(row) == {"tokens", "warps", "stages", "programs"}


def test_override_ends_with_its_block():
    before = launch.chosen("keys", "cpu", torch.float32, 64, 32)
    with launch.override("keys", {**before, "tokens": 16}), launch.override("keys", {**before, "tokens": 32}):
        assert launch.chosen("keys", "cpu", torch.float32, 64, 32)["tokens"] == 32
    assert launch.chosen("keys", "cpu", torch.float32, 64, 32) == before
    with pytest.raises(ValueError, match="name must be one of keys, "), launch.override("values", {}):
        pass


@pytest.mark.parametrize("name", launch.passes())
def test_candidates_hold_powers_of_two(name):
    for found in [*launch.candidates(name), launch.default(name, torch.float32, 256, 128)]:
        assert found["tokens"] >= 16 and all(n & (n - 1) == 0 for n in (found["tokens"], found["warps"]))
