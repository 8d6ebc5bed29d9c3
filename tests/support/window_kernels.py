"""The CUDA kernels of the soft split compiled for the CPU by the system's compiler, and called through ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
WORKS = ("split", "compose", "project")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
H200, RTX_4090 = (132, 228 * 1024), (128, 100 * 1024)  # multiprocessors, shared memory of each
GUARD = 64  # elements before and after each tensor that must not be accessed
PLAN = ("tiles", "segment", "strip", "group", "shared_bytes", "run", "vectors", "image_vectors", "along_channels")

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    """Mirrors ``Call`` of window_kernels.cpp."""

    _fields_ = (
        *((name, _i32) for name in ("work", "plain", "threads", "descending", "processors", "shared")),
        *((name, _i64) for name in ("batch", "channels")),
        ("rows", _i64 * 5),
        ("columns", _i64 * 5),
        ("strides", _i64 * 4),
        *((name, _pointer) for name in ("input", "input_begin", "input_end", "input_zone_begin", "input_zone_end")),
        *((name, _pointer) for name in ("output", "output_begin", "output_end")),
        *((name, _pointer) for name in ("output_zone_begin", "output_zone_end")),
    )


def compiler():
    """The system's C++ compiler, or ``None``."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def build(folder):
    """Compile the kernels and load them."""
    library = Path(folder) / "window_kernels.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(library)], check=True, capture_output=True, text=True)
    kernels = ctypes.CDLL(str(library))
    kernels.t2t_fault.restype = ctypes.c_char_p
    kernels.t2t_writes.restype = ctypes.POINTER(ctypes.c_uint32)
    kernels.t2t_axis.restype = _i64
    kernels.t2t_axis.argtypes = [_i64 * 5, _i32, _i32, _i64, _i64]
    kernels.t2t_divide_faults.restype = _i64
    kernels.t2t_divide_faults.argtypes = [_i64, _i64, _i64]
    return kernels


def axis(pixels, kernel, stride, padding):
    """An ``Axis`` as five integers."""
    return (_i64 * 5)(pixels, (pixels + 2 * padding - kernel) // stride + 1, kernel, stride, padding)


def guarded(shape, strides, dtype, offset=0):
    """A tensor with these strides in new memory, filled with NaN, with guards around it.

    Returns:
        The tensor, and the addresses (begin, end, zone begin, zone end) of its elements and of all memory.
    """
    span = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) if all(shape) else 0
    start = GUARD + offset
    memory = torch.full((start + span + GUARD,), torch.nan, dtype=dtype)
    address, size = memory.data_ptr(), memory.element_size()
    # the allocator aligns to 64 bytes, so the tensor is aligned to 16 bytes unless there is an offset
    tensor = memory.as_strided(shape, strides, start)
    ends = (address + start * size, address + (start + span) * size, address, address + memory.numel() * size)
    return tensor, ends


def layout(shape, name):
    """Strides of an image (B, C, H, W)."""
    _, c, h, w = shape
    return {
        "contiguous": (c * h * w, h * w, w, 1),
        "channels-last": (h * w * c, 1, w * c, c),
        # a slice of a larger image along every axis; no axis has stride 1
        "slice": (2 * c * (h + 1) * (w + 3) * 2, (h + 1) * (w + 3) * 2, (w + 3) * 2, 2),
        # channels-last columns of a wider packed tensor
        "packed": (h * w * (c + 5), 1, w * (c + 5), c + 5),
    }[name]


class Result:
    """Output and the number of writes to each of its elements; ``fits``: whether the window fits into a tile."""

    def __init__(self, output, counts, fault, fits):
        self.output, self.counts, self.fault, self.fits = output, counts, fault, fits


def call_for(work, shape, window, strides, *, plain=False, threads=256, descending=False, processors=1, shared=H200[1]):
    """The arguments of a call without its pointers."""
    b, c, h, w = shape
    (kh, kw), (sh, sw), (ph, pw) = window
    return Call(
        work=WORKS.index(work),
        plain=plain,
        threads=threads,
        descending=descending,
        processors=processors,
        shared=shared,
        batch=b,
        channels=c,
        rows=axis(h, kh, sh, ph),
        columns=axis(w, kw, sw, pw),
        strides=(_i64 * 4)(*strides),
    )


def run(kernels, work, shape, window, values, *, image="contiguous", offset=0, **options):
    """Run one kernel on ``values`` (an image of ``shape`` for a split, otherwise tokens).

    Args:
        image: the layout of the image.
        offset: elements between the tokens and an aligned address.
    """
    b, c, h, w = shape
    rows, columns = window.grid(h, w)
    tokens = (b, rows * columns, c * window.taps)
    token_strides = (tokens[1] * tokens[2], tokens[2], 1)
    image_strides = layout(shape, image)
    source = (shape, image_strides, 0) if work == "split" else (tokens, token_strides, offset)
    target = (shape, image_strides, 0) if work == "compose" else (tokens, token_strides, offset)
    given, input_ends = guarded(*source[:2], values.dtype, source[2])
    given.copy_(values)
    output, output_ends = guarded(*target[:2], values.dtype, target[2])
    call = call_for(work, shape, window, image_strides, **options)
    call.input, call.output = given.data_ptr(), output.data_ptr()
    call.input_begin, call.input_end, call.input_zone_begin, call.input_zone_end = input_ends
    call.output_begin, call.output_end, call.output_zone_begin, call.output_zone_end = output_ends
    missing = kernels.t2t_run(ctypes.byref(call), TYPES[values.dtype])
    count = (output_ends[1] - output_ends[0]) // output.element_size()
    writes = kernels.t2t_writes()
    counts = torch.tensor([writes[i] for i in range(count)], dtype=torch.int64)
    counts = counts.as_strided(output.shape, output.stride()) if count else counts
    return Result(output, counts, kernels.t2t_fault().decode(), not missing)


def plan(kernels, work, shape, window, *, image="contiguous", bytes=4, device=H200):
    """The division of a call into tiles, as a dict; ``None`` where the window does not fit into a tile."""
    call = call_for(work, shape, window, layout(shape, image), processors=device[0], shared=device[1])
    numbers = (_i64 * len(PLAN))()
    if not kernels.t2t_plan(ctypes.byref(call), bytes, numbers):
        return None
    return dict(zip(PLAN, numbers, strict=True))
