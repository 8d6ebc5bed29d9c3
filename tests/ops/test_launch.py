"""The launch tables of the Triton kernels, and the division of a call among programs."""

import json
import re
from heapq import heapreplace

import pytest
import torch

from t2t_fast.errors import LaunchTableError
from t2t_fast.ops._common import triton_runtime
from t2t_fast.ops._common.launch_table import Table, cut
from t2t_fast.ops.add_layer_norm.triton.launch import TABLE as NORM
from t2t_fast.ops.layer_norm_mlp.triton.launch import TABLE as MLP
from t2t_fast.ops.performer_attention.triton import launch
from t2t_fast.ops.performer_attention.triton.launch import TABLE
from t2t_fast.ops.performer_layer.triton.launch import TABLE as LAYER
from t2t_fast.ops.soft_split_linear.triton.launch import TABLE as SPLIT
from t2t_fast.ops.token_mlp.triton.launch import TABLE as TOKEN_MLP

TABLES = [TABLE, LAYER, SPLIT, TOKEN_MLP, NORM, MLP]

ROW = {"tokens": 32, "warps": 8, "stages": 4, "programs": 3}
"""A row of the table, without the optional features of a chunk."""


@pytest.mark.parametrize("sequences", [1, 2, 64, 1000])
@pytest.mark.parametrize("length", [1, 16, 196, 3136, 1_000_000])
@pytest.mark.parametrize("programs", [1, 16, 528])
def test_a_cut_covers_every_token_once(length, sequences, programs):
    splits, tiles = cut(length, sequences, 64, programs)
    assert (splits - 1) * tiles * 64 < length <= splits * tiles * 64


def efficiency(length, sequences, tokens, programs):
    """The share of the time of ``programs`` places that whole tiles fill, where the next program takes the first free
    place; a program costs half a tile besides its tiles."""
    splits, tiles = cut(length, sequences, tokens, programs)
    last = length / tokens - (splits - 1) * tiles
    free = [0.0] * programs
    for own in [tiles] * (sequences * (splits - 1)) + [last] * sequences:
        heapreplace(free, free[0] + own + 0.5)
    return sequences * length / tokens / programs / max(free)


@pytest.mark.parametrize("programs", [80, 108, 132, 148, 264])
def test_a_cut_fills_the_last_wave(programs):
    """At T2T's first stage with any batch from 32 on; with a program for each sequence the least would be 0.5."""
    found = [efficiency(3136, sequences, 64, programs) for sequences in range(32, 513, 7)]
    assert min(found) > 0.72 and sum(found) / len(found) > 0.86
    assert efficiency(3136, programs + 8, 64, programs) > 0.78


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


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.path.parents[1].name)
def test_the_committed_tables_are_valid(table):
    assert table.rows == json.loads(table.path.read_text())  # reading raises an error if anything is wrong


WRONG = {
    "architecture": ({"sm90": {}}, "architecture must be sm_90 or sm_90-few, got 'sm90'"),
    "pass": ({"sm_90": {"key": {}}}, "pass must be keys, queries, queries_backward, keys_backward, got 'key'"),
    "dtype": ({"sm_90": {"keys": {"b16-E64-m32": ROW}}}, "shape class must be like fp32-E64-m64, got 'b16-E64-m32'"),
    "shape class": ({"sm_90": {"keys": {"bf16-E64": ROW}}}, "shape class must be like fp32-E64-m64, got 'bf16-E64'"),
    "parameter": (
        {"sm_90": {"keys": {"bf16-E64-m32": {"tokns": 128}}}},
        "a parameter of sm_90, keys, bf16-E64-m32 must be one of tokens, warps, stages, programs, features, "
        "got 'tokns'",
    ),
    "value": (
        {"sm_90": {"keys": {"bf16-E64-m32": {"tokens": "128"}}}},
        "tokens of sm_90, keys, bf16-E64-m32 must be an integer, got '128'",
    ),
    "not padded": ({"sm_90": {"keys": {"bf16-E48-m32": ROW}}}, "shape class must be bf16-E64-m32, got 'bf16-E48-m32'"),
    "cut off": ('{"sm_90": {', "must be a readable JSON file, got Expecting property name"),
    "a list": ({"sm_90": {"keys": [ROW]}}, "sm_90, keys must be an object, got [{"),
    "no parameters": ({"sm_90": {"keys": {"bf16-E64-m32": 64}}}, "sm_90, keys, bf16-E64-m32 must be an object, got 64"),
    "twice": ('{"sm_90": {}, "sm_90": {}}', "key 'sm_90' must be there once, got '2 times'"),
}


def wrong_table(folder, rows):
    """A table of the attention with these rows, or this text."""
    path = folder / "performer_attention" / "triton" / "launch.json"
    path.parent.mkdir(parents=True)
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return Table(path, launch.PASSES, launch.shape_class, launch.default, launch.candidates)


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_table_is_an_error(what, tmp_path):
    rows, words = WRONG[what]
    table = wrong_table(tmp_path, rows)
    with pytest.raises(LaunchTableError, match=re.escape(f"launch.json of performer_attention: {words}")):
        table.chosen("keys", "sm_80", torch.float16, 64, 32)


@pytest.mark.self_test
def test_a_wrong_table_does_not_select_another_backend(tmp_path, monkeypatch):
    table = wrong_table(tmp_path, WRONG["parameter"][0])

    def run(device, dtype):
        return table.chosen("keys", "cpu", dtype, 64, 32)

    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)
    for _ in range(2):
        with pytest.raises(LaunchTableError, match="got 'tokns'"):
            triton_runtime.trial("performer_attention", run, run, None, torch.float32)


def test_override_ends_with_its_block():
    before = TABLE.chosen("keys", "cpu", torch.float32, 64, 32)
    with TABLE.override("keys", {**before, "tokens": 16}), TABLE.override("keys", {**before, "tokens": 32}):
        assert TABLE.chosen("keys", "cpu", torch.float32, 64, 32)["tokens"] == 32
    assert TABLE.chosen("keys", "cpu", torch.float32, 64, 32) == before
    with pytest.raises(ValueError, match="name must be one of keys, "), TABLE.override("values", {}):
        pass
    misspelt = TABLE.override("keys", {"tokns": 16})
    with misspelt, pytest.raises(ValueError, match="a parameter of override, keys must be one of tokens, "):
        TABLE.chosen("keys", "cpu", torch.float32, 64, 32)


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
def test_large_states_are_chunked(name, dtype):
    """T2T's shape is not chunked; above some number of features, chunks have the size of a matrix instruction."""
    assert launch.default(name, dtype, 64, 32)["features"] == 0
    for width in (16, 32, 64, 128, 256):
        chunked = [launch.default(name, dtype, width, m)["features"] for m in (16, 32, 64, 128, 256)]
        most = launch.default(name, dtype, width, launch.ALIKE)
        assert chunked[-1] > 0 and all(launch.default(name, dtype, width, m) == most for m in (300, 512, 5000))
        assert all(chunk == 0 or (chunk >= 16 and chunk & (chunk - 1) == 0) for chunk in chunked)
        assert [chunk > 0 for chunk in chunked] == sorted(chunk > 0 for chunk in chunked)
