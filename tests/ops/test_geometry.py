"""Index arithmetic and CUDA kernels of the soft split, compiled for the CPU: every thread of every tile runs.

The harness (support/window_kernels.cpp) checks each access: every output is written exactly once, no access is outside
a tensor, no shared memory is read before it is written, and no two threads race for an element between two barriers.
"""

import ctypes
import mmap

import pytest
import torch
import torch.nn.functional as F

from support import window_kernels
from support.window_kernels import H200, RTX_4090, WORKS
from t2t_fast import functional
from t2t_fast.testing import WINDOW_CASES

if window_kernels.compiler() is None:
    pytest.skip("no C++ compiler: g++, clang++ and c++ are not found", allow_module_level=True)

AXES = [
    (size, kernel, stride, padding)
    for size in (1, 2, 5, 8, 13)
    for kernel in (1, 2, 3, 7)
    for stride in (1, 2, 3, 5)
    for padding in (0, 1, 3)
    if size + 2 * padding >= kernel
]
CASES = [case for case in WINDOW_CASES if case[1]]  # a batch of 0 launches nothing
CASES += [
    ("video inpainting", 2, 8, 15, 24, 7, 3, 3),
    ("several groups", 1, 64, 9, 40, 7, 3, 3),
    ("several strips", 1, 8, 9, 900, 3, 2, 1),
    ("odd channels", 1, 17, 12, 30, 5, 2, 2),
    ("many odd channels", 1, 97, 11, 18, 7, 4, 2),
    ("padding wider than the window", 1, 2, 4, 5, 3, 2, 4),
    ("stride beyond the image", 1, 3, 5, 6, 4, 100, 1),
    ("row of pixels", 1, 4, 1, 50, (1, 5), (1, 2), (0, 2)),
]
IDS = [case[0] for case in CASES]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}
over_cases = pytest.mark.parametrize(("name", "b", "c", "h", "w", "k", "s", "p"), CASES, ids=IDS)
over_works = pytest.mark.parametrize("work", WORKS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return window_kernels.build(tmp_path_factory.mktemp("window_kernels"))


def make_input(work, shape, window, dtype):
    h, w = window.grid(*shape[2:])
    tokens = (shape[0], h * w, shape[1] * window.taps)
    return torch.randn(shape if work == "split" else tokens, dtype=torch.float64).to(dtype)


def reference(work, values, shape, window):
    """The result in float64, from F.unfold and F.fold."""
    kernel, stride, padding = window
    values = values.double()

    def split(image):
        return F.unfold(image, kernel, stride=stride, padding=padding).transpose(1, 2)

    def compose(tokens):
        return F.fold(tokens.transpose(1, 2), shape[2:], kernel, stride=stride, padding=padding)

    if work == "split":
        return split(values)
    if work == "compose":
        return compose(values)
    overlap = compose(torch.ones_like(values))
    return split(torch.where(overlap > 0, compose(values) / overlap, 0))


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_axis_against_brute_force(kernels, wide):
    def ask(axis, what, x=0, y=0):
        return kernels.t2t_axis(axis, wide, what, x, y)

    for size, kernel, stride, padding in AXES:
        axis = window_kernels.axis(size, kernel, stride, padding)
        tokens = list(range(-padding, size + padding - kernel + 1, stride))  # the first pixel of each
        assert ask(axis, 0) == len(tokens)
        for index, begin in enumerate(tokens):
            for tap in range(kernel):
                pixel = ask(axis, 1, index, tap)
                assert pixel == begin + tap
                assert ask(axis, 2, pixel) == (0 <= pixel < size)
                assert ask(axis, 5, index, pixel) == tap
        for pixel in range(size):
            covering = [index for index, begin in enumerate(tokens) if begin <= pixel < begin + kernel]
            assert ask(axis, 6, pixel) == len(covering)
            if covering:
                assert (ask(axis, 3, pixel), ask(axis, 4, pixel)) == (covering[0], covering[-1])
            else:
                assert ask(axis, 3, pixel) > ask(axis, 4, pixel)


def test_axis_of_billions_of_pixels(kernels):
    """The covering tokens far from 0 are those near 0, shifted by the number of strides."""
    stride, far = 4, 3_000_000_000
    axis = window_kernels.axis(16_000_000_000, 7, stride, 2)
    for pixel in range(20, 40):
        for what in (3, 4):
            near = kernels.t2t_axis(axis, True, what, pixel, 0)
            assert kernels.t2t_axis(axis, True, what, pixel + far * stride, 0) == near + far
    assert kernels.t2t_axis(axis, True, 1, far, 6) == far * stride + 4


def test_division_by_multiplication(kernels):
    top = 2**31 - 1
    divisors = [*range(1, 300), 1023, 1024, 1025, 65535, 65537, 2**30, 2**30 + 1, top]
    for divisor in divisors:
        for first in (0, max(0, divisor * (top // divisor) - 50), top - 100):
            count = min(400 if first == 0 else 100, top - first + 1)
            assert kernels.t2t_divide_faults(divisor, first, count) == 0, (divisor, first)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@over_works
@over_cases
def test_every_thread(kernels, work, dtype, name, b, c, h, w, k, s, p):
    window, shape = functional.window(k, s, p), (b, c, h, w)
    values = make_input(work, shape, window, dtype)
    expected = reference(work, values, shape, window)
    plain = window_kernels.run(kernels, work, shape, window, values, plain=True)
    variants = [
        dict(image="contiguous"),
        dict(image="channels-last", processors=7, threads=96, shared=RTX_4090[1]),
        dict(image="slice", processors=7, threads=32, descending=True, offset=1),
        dict(image="packed", processors=100, offset=16 // values.element_size() - 1, descending=True),
    ]
    for options in variants:
        result = window_kernels.run(kernels, work, shape, window, values, **options)
        assert result.fits
        assert result.fault == "", (options, result.fault)
        assert (result.counts == 1).all(), options
        error = (result.output.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= (0 if work == "split" else TOLERANCE[dtype]), options
        # the order of summation does not depend on the tiling
        assert torch.equal(result.output, plain.output), options
    assert plain.fault == ""
    assert (plain.counts == 1).all()


@over_works
def test_any_window(kernels, work):
    """A window that does not fit into a tile."""
    window, shape = functional.window(330, 7, 0), (1, 1, 340, 337)
    assert window_kernels.plan(kernels, work, shape, window) is None
    values = make_input(work, shape, window, torch.float32)
    result = window_kernels.run(kernels, work, shape, window, values, plain=True)
    assert result.fault == ""
    assert (result.counts == 1).all()
    expected = reference(work, values, shape, window)
    assert (result.output.double() - expected).norm() <= 1e-6 * expected.norm()


def test_infinity_stays_in_its_pixel(kernels):
    """Neither padding nor stale shared memory may spread it."""
    window, shape = functional.window(3, 2, 1), (1, 4, 6, 6)
    tokens = make_input("project", shape, window, torch.float32)
    tokens[0, 0, 0] = torch.inf  # a tap outside the image
    result = window_kernels.run(kernels, "project", shape, window, tokens)
    assert result.output.isfinite().all()
    assert result.output[0, 0, 0] == 0


def test_cases_cover_every_access_path(kernels):
    """The cases above reach every branch: runs, segments and single elements; vectors along each axis of an image."""
    seen = set()
    for _, b, c, h, w, k, s, p in CASES:
        for work in WORKS:
            for image in ("contiguous", "channels-last", "slice"):
                for bytes in (2, 4, 8):
                    plan = window_kernels.plan(
                        kernels, work, (b, c, h, w), functional.window(k, s, p), image=image, bytes=bytes
                    )
                    tokens = "run" if plan["run"] else "segments" if plan["vectors"] else "single"
                    seen.add((work, tokens))
                    if work != "project":
                        seen.add((work, "image", bool(plan["image_vectors"]), bool(plan["along_channels"])))
    for work in WORKS:
        assert {(work, "run"), (work, "segments")} <= seen
    assert ("project", "single") in seen
    for work in ("split", "compose"):
        assert {(work, "image", vectors, channels) for vectors in (False, True) for channels in (False, True)} <= seen


@pytest.mark.parametrize("bytes", [2, 4])
@pytest.mark.parametrize("device", [H200, RTX_4090], ids=["H200", "RTX 4090"])
@pytest.mark.parametrize(
    ("shape", "window", "image"),
    [
        ((256, 3, 224, 224), (7, 4, 2), "contiguous"),
        ((256, 64, 56, 56), (3, 2, 1), "channels-last"),
        ((32, 64, 96, 96), (3, 2, 1), "channels-last"),
        ((8, 128, 60, 108), (7, 3, 3), "contiguous"),
    ],
    ids=["stage 1", "stage 2", "stage 2 of 384 px", "FuseFormer"],
)
def test_plans_of_real_sizes(kernels, shape, window, image, device, bytes):
    """Tokens move in 16-byte vectors, several blocks fit on a multiprocessor, and few pixels are read twice."""
    for work in WORKS:
        plan = window_kernels.plan(
            kernels, work, shape, functional.window(*window), image=image, bytes=bytes, device=device
        )
        assert plan["vectors"]
        assert plan["tiles"] >= 2 * device[0]
        assert plan["shared_bytes"] <= max(device[1] // 3 - 1024, 1024 * 96 if device == RTX_4090 else 0)
        assert plan["strip"] >= 12
    split = window_kernels.plan(kernels, "split", shape, functional.window(*window), image=image, bytes=bytes)
    assert split["along_channels"] == (image == "channels-last")


def test_offsets_beyond_32_bits(kernels):
    """Images 2**32 and rows 2**30 elements apart, in virtual memory of which only a few pages are allocated."""
    batch_stride, row_stride = 2**32 + 6, 2**30
    length = batch_stride + 3 * row_stride + 4
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * length, flags=flags)
    except OSError as error:
        pytest.skip(f"no {4 * length >> 30} GB of address space: {error}")
    window, shape = functional.window(3, 1, 1), (2, 1, 4, 4)
    image = torch.frombuffer(memory, dtype=torch.float32).as_strided(shape, (batch_stride, 1, row_stride, 1))
    image.copy_(torch.randn(shape))
    output, ends = window_kernels.guarded((2, 16, 9), (16 * 9, 9, 1), torch.float32)
    for plain in (False, True):
        output.fill_(torch.nan)
        call = window_kernels.call_for("split", shape, window, image.stride(), plain=plain)
        call.input, call.output = image.data_ptr(), output.data_ptr()
        call.output_begin, call.output_end, call.output_zone_begin, call.output_zone_end = ends
        assert kernels.t2t_run(ctypes.byref(call), 0) == 0
        assert torch.equal(output, reference("split", image.contiguous(), shape, window).float())
    call = window_kernels.call_for("split", (10**10, 3, 224, 224), functional.window(7, 4, 2), (10**10, 1, 2, 3))
    numbers = (ctypes.c_int64 * len(window_kernels.PLAN))()
    assert kernels.t2t_plan(ctypes.byref(call), 4, numbers)
    plan = dict(zip(window_kernels.PLAN, numbers, strict=True))
    assert plan["tiles"] == 10**10 * -(-56 // plan["segment"])
