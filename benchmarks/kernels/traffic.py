"""Bytes and FLOPs of every launch of the Triton kernels, counted: ``python -m benchmarks.kernels.traffic``.

The operators run at T2T-ViT's sizes on an image or a few, in Triton's interpreter (no GPU is needed), which hands over
the address of every load and store and the sizes of every product. "Requested" is the sum of all accesses; "touched"
counts every byte of a tensor once for each direction and launch: what is requested more often, a cache should deliver.
Tensors of token or pixel length are told from parameters and from the passes' small states by their names in the
kernels. What PyTorch does with tensors of such length between the launches is counted by its inputs and outputs.

How a sequence is cut follows the number of multiprocessors; here each image has as many as in a batch of 64 on 128.
"""

import argparse
import os
import sys
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..suites import operators
from ..suites.costs import WIDTH

ARCHITECTURE, MULTIPROCESSORS = "sm_90", 2

SUBJECTS = {"performer_layer-stage1": 1, "performer_layer-stage2": 1, "soft_split_linear-stage3": 4}
"""The three stages of the T2T module with Performer, and images enough for several full tiles."""

_INPUTS = ("x", "image", "cells", "grad", "y", "k", "q", "v", "skip", "mask", "mean", "rstd", "alpha", "kappa")
TOKENS = frozenset((*_INPUTS, "out", "d_x", "d_y", "d_k", "d_q", "d_v"))
STATES = frozenset(("lz", "state", "merged_lz", "merged_state", "d_lz", "d_state", "d_w", "d_weight", "shares"))
"""Names of kernels' arguments; all others are parameters."""


NOTHING = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias")
"""Beginnings of names of operations that touch no memory."""


def role(name):
    """ "tokens", "states" or "parameters"."""
    return "tokens" if name in TOKENS else "states" if name in STATES else "parameters"


@dataclass
class Access:
    """What happened to the tensors of one role in a launch, in bytes."""

    requested: int = 0
    touched: int = 0


@dataclass
class Launch:
    """One launch of a kernel, or one operation of PyTorch's (``torch.`` before its name)."""

    name: str
    grid: tuple = ()
    flops: int = 0
    accesses: dict[str, Access] = field(default_factory=dict)

    def add(self, role, requested, touched):
        """Count an access."""
        access = self.accesses.setdefault(role, Access())
        access.requested += requested
        access.touched += touched


class _Counter:
    """Counts the accesses of the launch that is running."""

    def __init__(self):
        self.launches, self._current = [], None

    def begin(self, name, grid, arguments):
        self._current = Launch(name, grid)
        self._bases, self._memory = [], {}
        self._collect(arguments)
        self._bases.sort()

    def _collect(self, arguments):
        for name, value in arguments:
            if isinstance(value, tuple):
                self._collect((name, each) for each in value)
            elif isinstance(value, torch.Tensor) and value.numel():
                storage = value.untyped_storage()
                if storage.data_ptr() not in self._memory:
                    self._bases.append(storage.data_ptr())
                    self._memory[storage.data_ptr()] = (name, {})

    def end(self):
        self.launches.append(self._current)
        for name, marked in self._memory.values():
            for marks, itemsize in marked.values():
                self._current.add(role(name), 0, int(marks.sum()) * itemsize)
        self._current = None

    def access(self, kind, pointers, mask):
        """A load or store of the interpreter's: addresses, and which of them are accessed."""
        there = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[there].ravel()
        if not len(addresses):
            return
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        base = self._bases[bisect_right(self._bases, int(addresses[0])) - 1]
        name, marked = self._memory[base]
        offsets = (addresses - np.uint64(base)) // np.uint64(itemsize)
        if kind not in marked:
            marked[kind] = (np.zeros(1, dtype=bool), itemsize)
        marks, _ = marked[kind]
        if len(marks) <= offsets.max():
            marks = np.concatenate([marks, np.zeros(int(offsets.max()) + 1, dtype=bool)])
            marked[kind] = (marks, itemsize)
        marks[offsets] = True
        self._current.add(role(name), len(addresses) * itemsize, 0)

    def product(self, a, b):
        rows, inner = a.data.shape[-2:]
        self._current.flops += 2 * rows * inner * b.data.shape[-1]


class _Others(TorchDispatchMode):
    """Notes PyTorch's own operations by the bytes of their inputs and outputs, where these have one of some lengths."""

    def __init__(self, launches, lengths):
        super().__init__()
        self._launches, self._lengths = launches, lengths

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.namespace.startswith("t2t_fast") or function.is_view or name.startswith(NOTHING)):
            everything = (*args, *(kwargs or {}).values(), *(found if isinstance(found, tuple) else (found,)))
            tensors = [each for each in everything if isinstance(each, torch.Tensor)]
            size = sum(each.nbytes for each in tensors if self._lengths.intersection(each.shape))
            if size:
                launch = Launch(f"torch.{name}")
                launch.add("tokens", size, size)
                self._launches.append(launch)
        return found


@contextmanager
def counting(lengths, images=1):
    """Inside, what kernels, and PyTorch with tensors of some ``lengths``, do is counted; yields a growing list."""
    from triton.runtime import interpreter

    from t2t_fast.ops._common import triton_runtime

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, dot, run = builder.create_masked_load, builder.create_masked_store, builder.create_dot, function.run
    counter = _Counter()

    def counted_load(self, pointers, mask, *rest):
        counter.access("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counter.access("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        counter.product(a, b)
        return dot(self, a, b, *rest)

    def counted_run(self, *arguments, grid, **named):
        both = [*zip(self.arg_names, arguments, strict=False), *named.items()]
        counter.begin(self.fn.__name__, grid, both)
        try:
            return run(self, *arguments, grid=grid, **named)
        finally:
            counter.end()

    processors = MULTIPROCESSORS * images
    machine = {"architecture": lambda device: ARCHITECTURE, "multiprocessors": lambda device: processors}
    patches = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(builder, **patches))
        stack.enter_context(patch.object(function, "run", counted_run))
        stack.enter_context(patch.multiple(triton_runtime, trial=lambda *call: None, **machine))
        stack.enter_context(_Others(counter.launches, lengths))
        yield counter.launches


def measure(subject, size=224, images=1, dtype=torch.bfloat16):
    """The launches of a subject of ``suites/operators.py`` on some images: in inference, forward and backward.

    Everything but the random features is in ``dtype``, and the first stage's image wants no gradient.

    Returns:
        lists of :class:`Launch` by the name of the pass, and the operator's :class:`costs.Cost` per image.

    Raises:
        RuntimeError: kernels are not interpreted here.
    """
    import t2t_fast
    from t2t_fast.ops._common import triton_runtime

    if not triton_runtime.INTERPRETED:
        raise RuntimeError("measure: needs TRITON_INTERPRET=1, set before Triton's kernels are imported")
    op = operators.build(subject, size, images)
    parameters = {name: (t if name == "w" else t.to(dtype)) for name, t in op.parameters.items()}
    parameters = {name: t.requires_grad_(name != "w") for name, t in parameters.items()}
    moving = {name: t.to(dtype).requires_grad_(not op.image) for name, t in op.moving.items()}
    lengths = {length for t in moving.values() for length in t.shape[1:] if length > 3} - {WIDTH}
    lengths.add(operators.length(int(subject[-1]), size))
    found = {}
    with t2t_fast.backend("triton"), counting(lengths, images) as launches:

        def taken(name):
            found[name] = list(launches)
            launches.clear()

        with torch.no_grad():
            op.sources["t2t_fast"](**moving, **parameters)
        taken("inference")
        out = op.sources["t2t_fast"](**moving, **parameters)
        taken("forward")
        gradient = torch.ones_like(out)
        launches.clear()
        out.backward(gradient)
        taken("backward")
    return found, op.cost(gradient.element_size())


COLUMNS = ("requested", "touched", "parameters: requested", "touched", "states: touched", "MFLOP")


def lines(title, launches):
    """One line for each launch, bytes in kB, and their sum."""
    total = Launch("sum")
    for launch in launches:
        total.flops += launch.flops
        for name, access in launch.accesses.items():
            total.add(name, access.requested, access.touched)
    yield f"{title:40}" + "".join(f"{column:>24}" for column in COLUMNS)
    for launch in [*launches, total]:
        tokens, parameters, states = (
            launch.accesses.get(name, Access()) for name in ("tokens", "parameters", "states")
        )
        moved = (tokens.requested, tokens.touched, parameters.requested, parameters.touched, states.touched)
        numbers = [f"{size / 1e3:.0f}" for size in moved] + [f"{launch.flops / 1e6:.1f}"]
        yield f"{launch.name:40}" + "".join(f"{number:>24}" for number in numbers)


def main(argv=None):
    """Print what every launch of some subjects moves and computes, beside what it must."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS), help=f"default: {' '.join(SUBJECTS)}")
    parser.add_argument("--size", type=int, default=224, help="pixels of the image's side")
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
