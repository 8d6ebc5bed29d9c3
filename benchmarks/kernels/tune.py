"""Tune the launch parameters of the Triton kernels on this GPU: ``python -m benchmarks.kernels.tune [--op NAME]``.

For each operator with a launch table, stage of T2T-ViT, dtype and pass, every candidate is checked against float64 and
timed: the operator's whole forward or backward, varying only that pass's parameters, candidates interleaved in rounds.
A candidate that fails is skipped with its reason. The best of many measurements is partly chance, so the best candidate
is measured again against the present parameters alone. If it is faster in four of five rounds there, it is written to
the table of this architecture, and later passes use it.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from importlib import import_module
from itertools import product
from unittest.mock import patch

import numpy as np
import torch

import t2t_fast

from ..suites import subjects
from ..suites.groups import MODES, Group

STAGES = {
    "performer_attention": ("stage1",),
    "soft_split_linear": ("stage1", "stage2", "stage3"),
    "token_mlp": ("stage1",),
    "performer_layer": ("stage1", "stage2"),
    "add_layer_norm": ("block",),
    "layer_norm_mlp": ("block",),
}
"""The stages whose calls differ in more than the number of tokens, on which no table depends."""

CYCLES = 2_000_000
"""How long the GPU waits before a timed call: about a millisecond, longer than launching the call's kernels takes."""


def table(op):
    """An operator's launch table."""
    return import_module(f"t2t_fast.ops.{op}.triton.launch").TABLE


class Problem:
    """An operator at one stage: inputs in several places in memory, and the expected results.

    Args:
        op: its name; stage: such as "stage1"; size: side of the image in pixels; batch: images; dtype: a name such as
            "bf16" (half types run under autocast); device, backend: where and how it runs.
    """

    def __init__(self, op, stage, size, batch, dtype, device="cuda", backend="triton"):
        self.name, self.table, self.backend = f"{op} {stage}, {dtype}, {size} px, batch {batch}", table(op), backend
        self._sides = []  # forward and backward: the subject and its implementation
        for mode in MODES:
            subject = subjects.build(Group("op", f"{op}-{stage}", size, batch, dtype, mode), device)
            self._sides.append((subject, subject.make("t2t_fast")))
        self._options = {}
        if op in ("token_mlp", "performer_layer"):  # as upstream trains; with dropout the kernels draw random numbers
            self._options = {"proj_drop": 0.1, "mlp_drop": 0.1, "seed": torch.tensor(0, device=device)}
        self._turn, self._graphs = 0, None

    def _forward(self, backward, index, options):
        subject, implementation = self._sides[backward]
        with t2t_fast.backend(self.backend), torch.set_grad_enabled(backward), subject.autocast:
            return implementation.function(**implementation.inputs[index], **options)

    def check(self, backward):
        """Check the output, or the output and the gradients, without dropout; then run the timed call once.

        Raises:
            AssertionError: an error exceeds the suites' tolerances; others: what a launch raises.
        """
        subject, implementation = self._sides[backward]
        out, gradients = self._forward(backward, 0, {}), {}
        if backward:
            subject.backward(out)(out)
            gradients = implementation.gradients(0)
            implementation.clear()
        subject.check(out.detach(), gradients, implementation)
        self.call(backward)

    def call(self, backward):
        """The timed call: a forward pass without autograd, or a backward pass; each call takes the next inputs."""
        subject, implementation = self._sides[backward]
        self._turn = (self._turn + 1) % len(implementation.inputs)
        if not backward:
            self._forward(False, self._turn, {})
            return
        if self._graphs is None:
            self._graphs = [self._forward(True, index, self._options) for index in range(len(implementation.inputs))]
        out, inputs = self._graphs[self._turn], implementation.inputs[self._turn]
        leaves = [*implementation.leaves.values(), *(t for t in inputs.values() if t.requires_grad)]
        torch.autograd.grad(out, leaves, subject.gradient.to(out.dtype), retain_graph=True)

    def seconds(self, backward):
        """GPU time of :meth:`call` by CUDA events. Its kernels queue behind a wait, which hides the launch overhead."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES)
        start.record()
        self.call(backward)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def passes(self):
        """The passes of the table that the calls launch: name -> (whether in backward, architecture, dtype, *sizes)."""
        found = {}
        for backward in (True, False):
            self.call(backward)  # a first call runs the kernels' self-tests, with passes that this problem may not have
            with patch.object(self.table, "chosen", wraps=self.table.chosen) as chosen:
                self.call(backward)
            found |= {name: (backward, *key) for (name, *key), _ in chosen.call_args_list}
        return {name: found[name] for name in self.table.passes if name in found}


def words(parameters):
    """Parameters as text."""
    return " ".join(f"{name} {value}" for name, value in parameters.items())


def times(problem, name, backward, many, rounds):
    """Seconds for each of ``many`` parameters of a pass, in every round; the first round is not counted."""
    found = np.empty((len(many), rounds + 1))
    for turn in range(rounds + 1):
        for index in np.roll(range(len(many)), -turn):
            with problem.table.override(name, many[index]):
                found[index, turn] = problem.seconds(backward)
    return found[:, 1:]


def tune_pass(problem, name, backward, present, rounds):
    """Measure the candidates of a pass and print a line for each. Returns better parameters or ``None``."""
    tried, candidates = [present], problem.table.candidates(name, present)
    problem.check(backward)
    for parameters in (each for each in candidates if each != present):
        try:
            with problem.table.override(name, parameters):
                problem.check(backward)
            tried.append(parameters)
        except Exception as failure:  # noqa: BLE001 - compilers and drivers raise any type; it becomes the reason
            text = (str(failure).strip().splitlines() or [""])[0]
            print(f"  {words(parameters)}: skipped, {type(failure).__name__}: {text[:200]}")
    measured = times(problem, name, backward, tried, rounds)
    speedups = np.median(measured[0] / measured, axis=1)
    for index in np.argsort(-speedups, kind="stable"):
        result = f"{1e6 * np.median(measured[index]):.1f} us, {speedups[index]:.3f}x"
        print(f"  {words(tried[index])}: {result}{'' if index else ' (present)'}")
    best = tried[np.argmax(speedups)]
    if best is present:
        return None
    once, other = times(problem, name, backward, [present, best], 2 * rounds)
    low, middle, high = np.percentile(once / other, (20, 50, 80))
    verdict = "accepted" if low > 1 else "not beyond the noise"
    print(f"  once more, {words(best)}: {middle:.3f}x ({low:.3f} to {high:.3f}), {verdict}")
    return best if low > 1 else None


def enter(path, architecture, name, shape_class, parameters):
    """Write the parameters of a pass into the table's file, which is replaced atomically."""
    rows = json.loads(path.read_text())
    rows.setdefault(architecture, {}).setdefault(name, {})[shape_class] = parameters
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def tune(problem, rounds, deadline=float("inf"), done=()):
    """Tune the passes of one problem, one after the other, and write better parameters to the table's file.

    Args:
        deadline: no pass starts after it; done: keys of the passes to leave out, as returned.

    Returns:
        The key of each tuned pass (architecture, name, shape class) -> better parameters or ``None``.
    """
    table, tuned = problem.table, {}
    with ExitStack() as better:
        for name, (backward, architecture, *sizes) in problem.passes().items():
            key = (architecture, name, table.shape_class(name, *sizes))
            if key in done or time.monotonic() > deadline:
                print(f"{problem.name}, {name}: {'measured before' if key in done else 'no time left'}")
                continue
            print(f"{architecture}, {problem.name}, {name}:")
            present = table.chosen(name, architecture, *sizes)
            tuned[key] = faster = tune_pass(problem, name, backward, present, rounds)
            if faster is not None:
                better.enter_context(table.override(name, faster))
                enter(table.path, *key, faster)
    return tuned


def main(argv=None):
    """Tune on this machine's GPU. Returns 0, or 2 without one."""
    dtypes = ("bf16", "fp16", "fp32")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="operators; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=list(dtypes))
    parser.add_argument("--size", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="start no new pass after this time")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks.kernels.tune: needs a GPU, torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    changed, deadline = 0, time.monotonic() + arguments.max_seconds
    for dtype, op in product(arguments.dtypes, arguments.op):
        done = {}
        for stage in STAGES[op]:
            problem = Problem(op, stage, arguments.size, arguments.batch, dtype)
            done |= tune(problem, arguments.rounds, deadline, done)
        changed += sum(better is not None for better in done.values())
    print(f"{torch.cuda.get_device_name()}: {changed} better parameters{' written to launch.json' * (changed > 0)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
