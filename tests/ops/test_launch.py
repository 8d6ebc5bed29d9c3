"""The table of launch parameters of the Triton attention, and how a call is cut into programs."""

import json

import pytest
import torch

from t2t_fast.ops import triton_runtime
from t2t_fast.ops.launch import Table, cut
from t2t_fast.ops.performer_attention import launch
from t2t_fast.ops.performer_attention.launch import TABLE

ROW = {"tokens": 32, "warps": 8, "stages": 4, "programs": 3}
"""A row of the table, which may leave out the features of a chunk."""


@pytest.mark.parametrize("sequences", [1, 2, 64, 1000])
@pytest.mark.parametrize("length", [1, 16, 196, 3136, 1_000_000])
@pytest.mark.parametrize("programs", [1, 16, 528])
def test_a_cut_covers_every_token_once(length, sequences, programs):
    splits, tiles = cut(length, sequences, 64, programs)
    assert (splits - 1) * tiles * 64 < length <= splits * tiles * 64
    assert splits == 1 or splits * sequences <= programs


def test_no_tokens():
    assert cut(0, 3, 64, 100).splits == 1


def test_chosen_from_the_table_else_by_default(tmp_path):
    path = tmp_path / "launch.json"
    path.write_text(json.dumps({"sm_90": {"keys": {"bf16-E64-m32": ROW}}}))
    table = Table(path, launch.PASSES, launch.shape_class, launch.default, launch.candidates)
    assert table.chosen("keys", "sm_90", torch.bfloat16, 60, 20) == {**ROW, "features": 0}
    for name, architecture, dtype in [
        ("queries", "sm_90", torch.bfloat16),
        ("keys", "sm_80", torch.bfloat16),
        ("keys", "sm_90", torch.float16),
    ]:
        assert table.chosen(name, architecture, dtype, 64, 32) == launch.default(name, dtype, 64, 32)


def test_the_committed_table_is_well_formed():
    for architecture, passes in TABLE.rows.items():
        assert architecture.startswith("sm_") and set(passes) <= set(TABLE.passes)
        for row in (row for rows in passes.values() for row in rows.values()):
            assert set(ROW) <= set(row) <= {*ROW, "features"}


def test_override_ends_with_its_block():
    before = TABLE.chosen("keys", "cpu", torch.float32, 64, 32)
    with TABLE.override("keys", {**before, "tokens": 16}), TABLE.override("keys", {**before, "tokens": 32}):
        assert TABLE.chosen("keys", "cpu", torch.float32, 64, 32)["tokens"] == 32
    assert TABLE.chosen("keys", "cpu", torch.float32, 64, 32) == before
    with pytest.raises(ValueError, match="name must be one of keys, "), TABLE.override("values", {}):
        pass


def test_few_tokens_have_a_section_of_their_own(monkeypatch):
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(triton_runtime, "multiprocessors", lambda device: 132)
    least = 132 * triton_runtime.FEW + 1
    assert [triton_runtime.section("cuda", n) for n in (1, least - 1, least)] == ["sm_90-few", "sm_90-few", "sm_90"]
    with triton_runtime.crowded():
        assert triton_runtime.section("cuda", 1) == "sm_90"
    assert triton_runtime.section("cuda", 1) == "sm_90-few"


@pytest.mark.parametrize("name", TABLE.passes)
def test_candidates_hold_powers_of_two(name):
    for found in [*launch.candidates(name, {"features": 16}), launch.default(name, torch.float32, 256, 128)]:
        assert found["tokens"] >= 16 and all(n & (n - 1) == 0 for n in (found["tokens"], found["warps"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLE.passes)
def test_only_states_that_fit_are_held_at_once(name, dtype):
    """T2T's shape as a whole; from some number of features on in chunks, of what a matrix instruction takes."""
    assert launch.default(name, dtype, 64, 32)["features"] == 0
    for width in (16, 32, 64, 128, 256):
        chunked = [launch.default(name, dtype, width, m)["features"] for m in (16, 32, 64, 128, 256)]
        most = launch.default(name, dtype, width, launch.ALIKE)
        assert chunked[-1] > 0 and all(launch.default(name, dtype, width, m) == most for m in (300, 512, 5000))
        assert all(chunk == 0 or (chunk >= 16 and chunk & (chunk - 1) == 0) for chunk in chunked)
        assert [chunk > 0 for chunk in chunked] == sorted(chunk > 0 for chunk in chunked)
