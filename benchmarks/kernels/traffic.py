"""Count the bytes and FLOPs of every launch of the Triton kernels: ``python -m benchmarks.kernels.traffic``.

The operators run at T2T-ViT's sizes on a few images in Triton's interpreter (no GPU is needed), which reports the
addresses of every load and store and the sizes of every product. "Requested" is the sum of all accesses; "touched"
counts every byte of a tensor once per launch and direction; a cache should serve the difference. Arguments are
classified by their names as tokens or pixels, small states of the passes, or parameters. PyTorch's operations on such
tensors between the launches are counted by their inputs and outputs.

The number of splits of a sequence follows the number of multiprocessors; here each image has as many as in a batch of
64 on 128.
"""

import argparse
import os
import sys
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..measure.text_tables import aligned

ARCHITECTURE, MULTIPROCESSORS = "sm_90", 2

SUBJECTS = {
    "performer_layer-stage1": 1,
    "performer_layer-stage2": 1,
    "soft_split_linear-stage3": 4,
    "layer_norm_mlp-block": 4,
}
"""The three stages of the T2T module with Performer, a transformer block, and enough images for several full tiles."""

_INPUTS = ("x", "image", "cells", "grad", "y", "k", "q", "v", "skip", "mask", "mean", "rstd", "alpha", "kappa")
TOKENS = (*_INPUTS, "out", "d_x", "d_y", "d_k", "d_q", "d_v", "t", "n", "h", "again", "branch", "d_branch")
STATES = ("lz", "state", "merged_lz", "merged_state", "d_lz", "d_state", "d_w", "d_weight", "d_bias", "shares")
"""Names of kernel arguments; all others are parameters."""

NO_TRAFFIC = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias")
"""Prefixes of the names of operations that access no memory."""


@dataclass
class Launch:
    """One launch of a kernel, or one operation of PyTorch (``torch.`` before its name).

    ``requested``, ``touched``: bytes by role: "tokens", "states" or "parameters".
    """

    name: str
    flops: int = 0
    requested: Counter = field(default_factory=Counter)
    touched: Counter = field(default_factory=Counter)


class _Recorder:
    """Counts the accesses and products of the running launch."""

    def __init__(self):
        self.launches = []

    def launch(self, run, kernel, *arguments, grid, **named):
        self._current = Launch(kernel.fn.__name__)
        self._memory = {}  # start of a storage: its role, its element size, and which elements are read and written
        for name, value in [*zip(kernel.arg_names, arguments, strict=False), *named.items()]:
            role = "tokens" if name in TOKENS else "states" if name in STATES else "parameters"
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    storage, itemsize = tensor.untyped_storage(), tensor.element_size()
                    marks = np.zeros((2, storage.nbytes() // itemsize), dtype=bool)
                    self._memory.setdefault(storage.data_ptr(), (role, itemsize, marks))
        self._bases = sorted(self._memory)
        result = run(kernel, *arguments, grid=grid, **named)
        for role, itemsize, marks in self._memory.values():
            self._current.touched[role] += int(marks.sum()) * itemsize
        self.launches.append(self._current)
        return result

    def access(self, written, pointers, mask):
        """Count a load (``written`` is 0) or a store (1) at the addresses that the mask selects."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if len(addresses):
            base = self._bases[bisect_right(self._bases, int(addresses[0])) - 1]
            role, itemsize, marks = self._memory[base]
            marks[written, (addresses - np.uint64(base)) // np.uint64(itemsize)] = True
            self._current.requested[role] += len(addresses) * itemsize

    def product(self, a, b):
        """Count a product of two matrices."""
        self._current.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]


class _Others(TorchDispatchMode):
    """Counts the bytes of inputs and outputs of PyTorch's operations, if an axis has one of ``lengths``."""

    def __init__(self, launches, lengths):
        super().__init__()
        self._launches, self._lengths = launches, lengths

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.namespace.startswith("t2t_fast") or function.is_view or name.startswith(NO_TRAFFIC)):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
            size = sum(each.nbytes for each in tensors if self._lengths.intersection(each.shape))
            if size:
                self._launches.append(Launch(f"torch.{name}", 0, Counter(tokens=size), Counter(tokens=size)))
        return result


@contextmanager
def counting(lengths, images=1):
    """Inside, launches and PyTorch's operations on tensors with an axis in ``lengths`` go to the yielded list."""
    from triton.runtime import interpreter

    from t2t_fast.ops._common import triton_runtime

    recorder, builder, function = _Recorder(), interpreter.InterpreterBuilder, interpreter.InterpretedFunction

    def recorded(name, record):
        method = getattr(builder, name)

        def call(*arguments):
            record(*arguments)
            return method(*arguments)

        return patch.object(builder, name, call)

    run, processors = function.run, MULTIPROCESSORS * images
    machine = {"architecture": lambda device: ARCHITECTURE, "multiprocessors": lambda device: processors}
    with (
        recorded("create_masked_load", lambda builder, pointers, mask, *_: recorder.access(0, pointers, mask)),
        recorded("create_masked_store", lambda builder, pointers, value, mask, *_: recorder.access(1, pointers, mask)),
        recorded("create_dot", lambda builder, a, b, *_: recorder.product(a, b)),
        patch.object(function, "run", lambda *call, **named: recorder.launch(run, *call, **named)),
        patch.multiple(triton_runtime, trial=lambda *call: None, **machine),
        _Others(recorder.launches, lengths),
    ):
        yield recorder.launches


def measure(subject, size=224, images=1, dtype=torch.bfloat16):
    """The launches of a subject of ``suites/operators.py`` on some images: in inference, forward and backward.

    Everything but the random features and a block's stream is in ``dtype``; the first stage's image has no gradient.
    Returns lists of :class:`Launch` by the name of the pass, and the operator's :class:`costs.Cost` per image. Raises
    RuntimeError if the kernels are not interpreted.
    """
    import t2t_fast
    from t2t_fast.ops._common import triton_runtime

    from ..suites import operators
    from ..suites.costs import WIDTH

    if not triton_runtime.INTERPRETED:
        raise RuntimeError("measure: needs TRITON_INTERPRET=1, set before t2t_fast is imported")
    op = operators.build(subject, size, images)
    parameters = {name: t if name == "w" else t.to(dtype).requires_grad_() for name, t in op.parameters.items()}
    dtypes = {name: torch.float32 if name == op.stream else dtype for name in op.moving}
    moving = {name: t.to(dtypes[name]).requires_grad_(not op.image) for name, t in op.moving.items()}
    if op.stream:
        lengths = {length * many for length in [moving[op.stream].shape[1]] for many in (1, images)}
    else:
        lengths = {length for t in moving.values() for length in t.shape[1:] if length > 3} - {WIDTH}
        lengths.add(operators.length(int(subject[-1]), size))
    passes, mixed = {}, torch.autocast("cpu", dtype, enabled=op.stream is not None)
    with t2t_fast.backend("triton"), mixed, counting(lengths, images) as launches:
        with torch.no_grad():
            op.sources["t2t_fast"](**moving, **parameters)
        passes["inference"] = launches[:]
        launches.clear()
        out = op.sources["t2t_fast"](**moving, **parameters)
        passes["forward"] = launches[:]
        gradient = torch.ones_like(out)
        launches.clear()
        out.backward(gradient)
    return passes | {"backward": launches}, op.cost(dtype.itemsize)


COLUMNS = ("requested kB", "touched kB", "parameters: requested kB", "parameters: touched kB", "states: touched kB")


def lines(title, launches):
    """One line for each launch, and one for their sum."""
    total = Launch("sum")
    for launch in launches:
        total.flops += launch.flops
        total.requested += launch.requested
        total.touched += launch.touched
    rows = []
    for launch in [*launches, total]:
        tokens, parameters = ((launch.requested[role], launch.touched[role]) for role in ("tokens", "parameters"))
        sizes = (*tokens, *parameters, launch.touched["states"])
        rows.append((launch.name, *(f"{size / 1e3:.0f}" for size in sizes), f"{launch.flops / 1e6:.1f}"))
    return aligned((title, *COLUMNS, "MFLOP"), rows, right=(*COLUMNS, "MFLOP"))


def main(argv=None):
    """Print the traffic and FLOPs of every launch of some subjects, and their compulsory minimum."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before t2t_fast is imported
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help=f"default: {' '.join(SUBJECTS)}")
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    arguments = parser.parse_args(argv)
    for subject in arguments.subjects:
        images = SUBJECTS.get(subject, 1)
        passes, cost = measure(subject, arguments.size, images)
        for name, launches in passes.items():
            kernels = getattr(cost, name)
            print("\n".join(lines(f"{subject}, {name}, {images} images", launches)))
            compulsory, flops = sum(kernel.bytes for kernel in kernels), sum(kernel.flops for kernel in kernels)
            print(f"compulsory, an image: {compulsory / 1e3:.0f} kB, {flops / 1e6:.1f} MFLOP\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
