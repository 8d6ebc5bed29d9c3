"""Tune the launch parameters of Performer attention's Triton kernels on this card: ``python -m benchmarks.tune``.

For each dtype and pass, every candidate is checked against float64 and then timed: the whole forward or backward with
only that pass's parameters varied, round by round in turn. A candidate that fails is skipped with its reason. The
fastest is measured once more against the present parameters alone, since the best of many is partly luck. Only if it is
faster there too, in four rounds of five, it enters the table of this architecture, and the later passes run with it.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from t2t_fast import functional
from t2t_fast.testing import DTYPES, assert_close, features

from .attention import NORM
from .groups import HEADLINE_LENGTH
from .harness import Participant, interleave
from .statistics import ratios, summary
from .subjects import COPIES

ROUNDS = 30
CYCLES = 2_000_000
"""How long the GPU waits before a timed call, about a millisecond: launching the call's kernels takes less."""


class EventTimer:
    """GPU time of a call by CUDA events. The kernels queue up behind a wait, so that the time has no launches in it."""

    def turn(self, call, implementation, calls):
        """Seconds of one call; the arguments are those of :func:`harness.interleave`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


class Problem:
    """Performer attention of one size: inputs in several places in memory, and what it must return.

    Args:
        dtype: a name such as "bf16"; width, features, length, batch: the sizes; device, backend: where and how it runs.
    """

    def __init__(self, dtype, width, features_, length, batch, device="cuda", backend="triton"):
        self.dtype, self.backend = DTYPES[dtype], backend
        self.name = f"{dtype}, E {width}, m {features_}, {length} tokens, batch {batch}"
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(batch, length, width, generator=generator) for _ in range(4)]
        scales = (NORM * width**-0.5, NORM * width**-0.5, 1.0, 1.0)
        *qkv, self.gradient = ((scale * t).to(device, self.dtype) for scale, t in zip(scales, tensors, strict=True))
        self.w = features(generator, features_, width).to(device)
        self.copies = [[t.clone().requires_grad_() for t in qkv] for _ in range(COPIES)]
        exact = [t.double().requires_grad_() for t in qkv]
        self.truth = functional.performer_attention(*exact, self.w.double(), backend="reference")
        self.true_gradients = torch.autograd.grad(self.truth, exact, self.gradient.double())
        self._turn, self._graphs = 0, None

    def forward(self, index=0):
        """The output for a copy of the inputs."""
        return functional.performer_attention(*self.copies[index], self.w, backend=self.backend)

    def check(self, backward):
        """Raise ``AssertionError`` unless the output, or the gradients, are within the package's tolerance."""
        out = self.forward()
        if not backward:
            assert_close(out, self.truth, "performer_attention", "forward", self.dtype)
            return
        found = torch.autograd.grad(out, self.copies[0], self.gradient)
        for value, expected in zip(found, self.true_gradients, strict=True):
            assert_close(value, expected, "performer_attention", "backward", self.dtype)

    def call(self, backward):
        """What is timed: a forward pass without autograd, or a backward pass; the next copy each time."""
        self._turn = (self._turn + 1) % COPIES
        if not backward:
            with torch.no_grad():
                self.forward(self._turn)
            return
        if self._graphs is None:
            self._graphs = [self.forward(index) for index in range(COPIES)]
        torch.autograd.grad(self._graphs[self._turn], self.copies[self._turn], self.gradient, retain_graph=True)


class Result(NamedTuple):
    """A pass: its present parameters, those that replace them or ``None``, and a line for each candidate."""

    present: dict
    better: dict | None
    lines: list[str]


def words(parameters):
    """Parameters in words."""
    return " ".join(f"{name} {value}" for name, value in parameters.items())


def times(launch, name, many, problem, timer, rounds):
    """Seconds of every round for each of some parameters of a pass, in turn."""
    backward = name.endswith("backward")

    def step(parameters):
        def run():
            with launch.override(name, parameters):
                problem.call(backward)

        return run

    participants = [Participant(words(parameters), None, None, step(parameters)) for parameters in many]
    for participant in participants:
        participant.step()
    interleave(participants, timer, rounds)
    return [participant.times for participant in participants]


def tune_pass(launch, name, present, problem, timer, rounds):
    """Measure the candidates of a pass. Returns a :class:`Result`."""
    tried, skipped = [present], []
    problem.check(name.endswith("backward"))
    for parameters in launch.candidates(name, present):
        if parameters == present:
            continue
        try:
            with launch.override(name, parameters):
                problem.check(name.endswith("backward"))
            tried.append(parameters)
        except Exception as failure:  # noqa: BLE001 - compilers and drivers raise what they like; it becomes the reason
            text = (str(failure).strip().splitlines() or [""])[0]
            skipped.append(f"{words(parameters)}: skipped, {type(failure).__name__}: {text[:200]}")
    found = times(launch, name, tried, problem, timer, rounds)
    speedups = [ratios(found[0], each)["median"] for each in found]
    order = sorted(range(len(tried)), key=lambda index: -speedups[index])
    lines = [
        f"{words(tried[i])}: {1e6 * summary(found[i])['median']:.1f} us, {speedups[i]:.3f}x"
        + (" (present)" if i == 0 else "")
        for i in order
    ]
    better = None
    if order[0] != 0:
        best = tried[order[0]]
        again = ratios(*times(launch, name, [present, best], problem, timer, 2 * rounds))
        reached = again["p20"] > 1
        spread = f"{again['median']:.3f}x ({again['p20']:.3f} to {again['p80']:.3f})"
        lines.append(f"once more, {words(best)}: {spread}, {'taken' if reached else 'not beyond the noise'}")
        better = best if reached else None
    return Result(present, better, lines + skipped)


def enter(path, architecture, name, shape_class, parameters):
    """Write the parameters of a pass into the table, which other processes see whole or not at all."""
    path = Path(path)
    table = json.loads(path.read_text())
    table.setdefault(architecture, {}).setdefault(name, {})[shape_class] = parameters
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def tune(launch, architecture, problem, sizes, passes, timer, rounds, say, write):
    """Tune some passes of one problem, one after the other. Returns how many parameters changed.

    Args:
        launch: the operator's launch table; architecture: such as "sm_90"; sizes: (dtype, width, features) as the
            table knows them; write: whether to change the table.
    """
    changed = 0
    with ExitStack() as taken:
        for name in passes:
            say(f"{architecture}, {problem.name}, {name}:")
            present = launch.chosen(name, architecture, *sizes)
            result = tune_pass(launch, name, present, problem, timer, rounds)
            for line in result.lines:
                say(f"  {line}")
            if result.better is not None:
                changed += 1
                taken.enter_context(launch.override(name, result.better))
                if write:
                    enter(launch.path, architecture, name, launch.shape_class(*sizes), result.better)
    return changed


def parse(argv, names):
    """The command line; ``names`` are the passes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16", "fp16", "fp32"])
    parser.add_argument("--passes", nargs="+", choices=names, default=list(names))
    parser.add_argument("--width", type=int, default=64, help="token width E")
    parser.add_argument("--features", type=int, default=32, help="random features m")
    parser.add_argument("--length", type=int, default=HEADLINE_LENGTH, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry-run", action="store_true", help="measure and print, but leave the table alone")
    return parser.parse_args(argv)


def main(argv=None):
    """Tune on this machine's GPU. Returns 0, or 2 without one."""
    from t2t_fast.ops import triton_runtime
    from t2t_fast.ops.performer_attention.launch import TABLE as launch

    arguments = parse(argv, launch.passes)
    if not torch.cuda.is_available():
        print("python -m benchmarks.tune: needs a GPU, torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    architecture = triton_runtime.architecture(torch.device("cuda"))
    changed = 0
    for dtype in arguments.dtypes:
        shape = (arguments.width, arguments.features)
        problem = Problem(dtype, *shape, arguments.length, arguments.batch)
        sizes = (DTYPES[dtype], *shape)
        write = not arguments.dry_run
        changed += tune(
            launch, architecture, problem, sizes, arguments.passes, EventTimer(), arguments.rounds, print, write
        )
    where = "left alone" if arguments.dry_run or not changed else launch.path.name
    print(f"{torch.cuda.get_device_name()}: {changed} better parameters; table: {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
