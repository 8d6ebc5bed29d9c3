"""Bytes and FLOPs of the Triton kernels, launch by launch, against what the cost table says they must be."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from benchmarks.kernels import traffic
from benchmarks.kernels.traffic import Launch
from support import ROOT
from t2t_fast.ops._common import costs, triton_runtime

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="not under TRITON_INTERPRET=1"),
]

# Which launches do the work of which kernel of benchmarks/suites/costs.py, in its order
FORWARD = [("split_keys_kernel",), ("read_out_mlp_kernel",)]
BACKWARD = [
    ("queries_kernel", "token_mlp_backward_kernel", "queries_backward_kernel"),
    ("keys_backward_kernel",),
    ("split_linear_weight_kernel",),
    ("token_scalars_kernel", "split_linear_image_kernel"),
]
BESIDE = {"cells_kernel", "merge_kernel", "fold_kernel", "parameter_gradients_kernel"}
"""The first stage's cells, the merge of a sequence's splits, and what reads and writes parameters only."""

# Each over the cost table's bytes or FLOPs of that kernel: bytes of token-long tensors touched, and requested (windows
# overlap, and one program for each block of columns or group of outputs reads the same tile); bytes of weights
# requested (every program reads them); FLOPs (whole tiles; w in two parts; 147 of a cell window's 192 columns; sums of
# the upstream gradient by products with 16 columns of ones).
LIMITS = {
    ("performer_layer-stage1", "inference"): [(1.00, 1.81, 1.74, 1.36), (0.99, 0.99, 0.14, 1.13)],
    ("performer_layer-stage1", "forward"): [(1.00, 1.59, 1.26, 1.36), (0.99, 0.99, 0.14, 1.13)],
    ("performer_layer-stage1", "backward"): [
        (1.96, 2.16, 0.11, 1.23),
        (0.97, 0.97, 0.03, 1.25),
        (1.01, 3.20, 0.00, 1.64),
    ],
    ("performer_layer-stage2", "inference"): [(0.99, 1.78, 2.61, 1.16), (0.98, 0.98, 0.54, 1.20)],
    ("performer_layer-stage2", "forward"): [(0.99, 1.66, 2.22, 1.16), (0.98, 0.98, 0.54, 1.20)],
    ("performer_layer-stage2", "backward"): [
        (1.92, 2.11, 0.43, 1.36),
        (0.95, 0.95, 0.11, 1.33),
        (1.00, 2.55, 0.00, 1.16),
        (1.55, 3.72, 2.59, 1.07),
    ],
    ("soft_split_linear-stage3", "inference"): [(1.00, 2.32, 3.10, 1.14)],
    ("soft_split_linear-stage3", "forward"): [(1.00, 2.32, 3.10, 1.14)],
    ("soft_split_linear-stage3", "backward"): [(1.00, 3.52, 0.00, 1.15), (1.00, 5.55, 5.74, 1.07)],
}

# Of a whole stage, everything beside included, over the table's sum: token-long bytes touched
STAGES = {
    ("performer_layer-stage1", "inference"): 1.26,
    ("performer_layer-stage1", "forward"): 1.22,
    ("performer_layer-stage1", "backward"): 1.45,
    ("performer_layer-stage2", "inference"): 0.98,
    ("performer_layer-stage2", "forward"): 0.99,
    ("performer_layer-stage2", "backward"): 1.37,
    ("soft_split_linear-stage3", "inference"): 1.00,
    ("soft_split_linear-stage3", "forward"): 1.00,
    ("soft_split_linear-stage3", "backward"): 1.00,
}


def groups(subject, direction):
    """The launches of each kernel of the cost table."""
    if subject.startswith("soft_split_linear"):
        return [BACKWARD[2], BACKWARD[3][1:]] if direction == "backward" else [("split_linear_kernel",)]
    return FORWARD if direction != "backward" else BACKWARD if subject.endswith("2") else BACKWARD[:3]


def ratios(launches, names, kernel, images):
    """What the launches of some kernels move and compute over what they must."""
    found = [launch for launch in launches if launch.name in names]
    assert {launch.name for launch in found} == set(names)
    moved, computed = images * kernel.bytes, images * kernel.flops
    return (
        sum(each.touched["tokens"] for each in found) / moved,
        sum(each.requested["tokens"] for each in found) / moved,
        sum(each.requested["parameters"] for each in found) / moved,
        sum(each.flops for each in found) / computed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("subject", [subject for subject in traffic.SUBJECTS if not subject.endswith("block")])
def test_traffic_is_within_what_is_stated(subject):
    """At 224 px, in bfloat16, with the launch parameters of sm_90."""
    images = traffic.SUBJECTS[subject]
    passes, cost = traffic.measure(subject, images=images)
    for direction, launches in passes.items():
        kernels = getattr(cost, direction)
        expected = groups(subject, direction)
        known = {name for names in expected for name in names} | BESIDE
        assert {launch.name for launch in launches} <= known, "a launch without its place in this table"
        for names, kernel, limits in zip(expected, kernels, LIMITS[subject, direction], strict=True):
            found = ratios(launches, names, kernel, images)
            where = (
                f"{subject} {direction} {' + '.join(names)}: {[f'{value:.3f}' for value in found]}, at most {limits}"
            )
            assert all(value <= limit + 0.005 for value, limit in zip(found, limits, strict=True)), where
            assert found[0] > 0.93 and found[3] > 0.99, where  # small states apart, less cannot be
        touched = sum(launch.touched["tokens"] for launch in launches)
        ratio = touched / images / sum(kernel.bytes for kernel in kernels)
        assert ratio <= STAGES[subject, direction] + 0.005, f"{subject} {direction}: {ratio:.3f}"


# Of the products, in their order: token-long bytes requested over the table's. Every program of a row of tiles reads
# the operand's rows; here tiles of 512 rows of which 394 exist, where the last one is read again.
BLOCK = {"inference": (3.68, 2.25), "forward": (2.53, 2.25), "backward": (2.07,)}


def test_traffic_of_a_block():
    """One launch, or one product of PyTorch, for each kernel of the cost table, with exactly its bytes."""
    images = 2
    passes, cost = traffic.measure("layer_norm_mlp-block", images=images)
    for direction, launches in passes.items():
        products = iter(BLOCK[direction])
        for launch, kernel in zip(launches, getattr(cost, direction), strict=True):
            moved = images * kernel.bytes
            assert launch.touched["tokens"] == moved, (direction, launch.name)
            if launch.name == "product_kernel":
                assert launch.requested["tokens"] <= next(products) * moved, (direction, launch.requested)
                assert launch.flops == kernel.flops / 197 * 512  # of two images' 394 rows in tiles of 128
            else:
                assert launch.requested["tokens"] == moved, (direction, launch.name)
        assert next(products, None) is None


def test_bytes_of_a_block():
    """A token's, with operands of 2 bytes and a stream of 4, as each kernel reads and writes it."""
    length, width, hidden, heads = 197, 384, 1152, 6
    found = costs.block(length, width, hidden, heads)
    rows, rest = (6, 8, 8, 4, 12, 2, 8), (0, 0, 4 * heads, 0, 0, 2 * hidden, 2 * hidden)
    expected = [width * each + more for each, more in zip(rows, rest, strict=True)]
    assert [kernel.bytes / length for kernel in found.inference] == expected
    expected[5] += 2 * hidden  # fc1's output, for backward
    assert [kernel.bytes / length for kernel in found.forward] == expected
    products = 4 * width**2 + 2 * width * hidden
    assert found.flops("inference") == 2 * length * products + 4 * length**2 * width
    assert sum(kernel.flops for kernel in found.backward) == 2 * 2 * length * products + 10 * length**2 * width
    # x, qkv, the attention's output and its logsumexp, t, fc1's output
    assert found.saved == length * (4 * width + 6 * width + 2 * width + 4 * heads + 4 * width + 2 * hidden)


def test_a_launch_is_counted_byte_by_byte():
    """Of a small soft split with Linear: the output once, the image at least once, and every product."""
    passes, _ = traffic.measure("soft_split_linear-stage3", size=80)
    _, split = passes["forward"]
    length, outputs, columns = 25, 384, 576
    assert split.name == "split_linear_kernel"
    assert split.touched["tokens"] == 2 * (100 * 64 + length * outputs)
    assert split.requested["tokens"] > split.touched["tokens"]
    assert split.touched["parameters"] == 2 * columns * outputs + 4 * outputs
    assert split.flops % (2 * columns * outputs) == 0
    assert split.flops >= 2 * columns * outputs * length


def test_what_pytorch_does_between_launches():
    launches = []
    with traffic._Others(launches, {50}):
        x = torch.ones(2, 50, 3)
        x.transpose(1, 2).sum(-1)
        torch.ones(7).add(1)
    found = [(each.name, each.requested["tokens"], each.touched["tokens"]) for each in launches]
    assert found == [("torch.ones", 1200, 1200), ("torch.sum", 1200, 1200)]


def test_lines_of_the_report():
    launch = Launch("a_kernel", 2_000_000, Counter(tokens=3000), Counter(tokens=1000, states=2000))
    header, *rows = traffic.lines("title", [launch, launch])
    assert header.startswith("title")
    first, second, total = (row.split() for row in rows)
    assert first == second == ["a_kernel", "3", "1", "0", "0", "2", "2.0"]
    assert total == ["sum", "6", "2", "0", "0", "4", "4.0"]


@pytest.mark.slow
def test_the_command():
    """The command sets TRITON_INTERPRET itself."""
    command = [sys.executable, "-m", "benchmarks.kernels.traffic", "soft_split_linear-stage3", "--size", "80"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "split_linear_weight_kernel" in found.stdout and "compulsory, an image: " in found.stdout
