"""Tune the launch parameters of the Triton kernels on this card: ``python -m benchmarks.kernels.tune [--op NAME]``.

For each operator with a table, stage of T2T-ViT, dtype and pass, every candidate is checked against float64 and then
timed: the operator's whole forward or backward with only that pass's parameters varied, round by round in turn. A
candidate that fails is skipped with its reason. The fastest is measured once more against the present parameters alone,
since the best of many is partly luck. Only if it is faster there too, in four rounds of five, it enters the table of
this architecture, and the later passes run with it.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from ..measure.harness import Participant, interleave
from ..measure.statistics import ratios, summary
from . import tune_problems
from .tune_problems import STAGES, Problem

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


class Result(NamedTuple):
    """A pass: its present parameters, those that replace them or ``None``, and a line for each candidate."""

    present: dict
    better: dict | None
    lines: list[str]


def words(parameters):
    """Parameters in words."""
    return " ".join(f"{name} {value}" for name, value in parameters.items())


def times(table, name, backward, many, problem, timer, rounds):
    """Seconds of every round for each of some parameters of a pass, in turn."""

    def step(parameters):
        def run():
            with table.override(name, parameters):
                problem.call(backward)

        return run

    participants = [Participant(words(parameters), None, None, step(parameters)) for parameters in many]
    for participant in participants:
        participant.step()
    interleave(participants, timer, rounds)
    return [participant.times for participant in participants]


def tune_pass(table, name, backward, present, problem, timer, rounds):
    """Measure the candidates of a pass. Returns a :class:`Result`."""
    tried, skipped = [present], []
    problem.check(backward)
    for parameters in table.candidates(name, present):
        if parameters == present:
            continue
        try:
            with table.override(name, parameters):
                problem.check(backward)
            tried.append(parameters)
        except Exception as failure:  # noqa: BLE001 - compilers and drivers raise what they like; it becomes the reason
            text = (str(failure).strip().splitlines() or [""])[0]
            skipped.append(f"{words(parameters)}: skipped, {type(failure).__name__}: {text[:200]}")
    found = times(table, name, backward, tried, problem, timer, rounds)
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
        again = ratios(*times(table, name, backward, [present, best], problem, timer, 2 * rounds))
        reached = again["p20"] > 1
        spread = f"{again['median']:.3f}x ({again['p20']:.3f} to {again['p80']:.3f})"
        lines.append(f"once more, {words(best)}: {spread}, {'taken' if reached else 'not beyond the noise'}")
        better = best if reached else None
    return Result(present, better, lines + skipped)


def enter(path, architecture, name, shape_class, parameters):
    """Write the parameters of a pass into the table, which other processes see whole or not at all."""
    path = Path(path)
    rows = json.loads(path.read_text())
    rows.setdefault(architecture, {}).setdefault(name, {})[shape_class] = parameters
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def tune(table, problem, timer, rounds, say, write, only=None, deadline=float("inf"), done=None):
    """Tune the passes of one problem, one after the other. Returns how many parameters changed.

    Args:
        table: the operator's launch table; write: whether to change it; only: names of passes, ``None`` for all;
            deadline: by ``time.monotonic``; no pass begins after it; done: a set of what was measured before in this
            run (architecture, pass, shape class), which grows.
    """
    changed, done = 0, set() if done is None else done
    with ExitStack() as taken:
        for name, (backward, architecture, *sizes) in problem.passes(table).items():
            if only is not None and name not in only:
                continue
            if time.monotonic() > deadline:
                say(f"{problem.name}, {name}: no time left")
                continue
            shape_class = table.shape_class(name, *sizes)
            if (architecture, name, shape_class) in done:
                say(f"{problem.name}, {name}: measured before")
                continue
            done.add((architecture, name, shape_class))
            say(f"{architecture}, {problem.name}, {name}:")
            present = table.chosen(name, architecture, *sizes)
            result = tune_pass(table, name, backward, present, problem, timer, rounds)
            for line in result.lines:
                say(f"  {line}")
            if result.better is not None:
                changed += 1
                taken.enter_context(table.override(name, result.better))
                if write:
                    enter(table.path, architecture, name, shape_class, result.better)
    return changed


def parse(argv):
    """The command line."""
    names = [name for op in STAGES for name in tune_problems.table(op).passes]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=tuple(STAGES), default=list(STAGES), help="operators; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16", "fp16", "fp32"])
    parser.add_argument("--passes", nargs="+", choices=names, help="default: all")
    parser.add_argument("--size", type=int, default=224, help="pixels of the image's side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="no new pass begins after them")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, but leave the tables alone")
    return parser.parse_args(argv)


def main(argv=None):
    """Tune on this machine's GPU. Returns 0, or 2 without one."""
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("python -m benchmarks.kernels.tune: needs a GPU, torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    changed, deadline = 0, time.monotonic() + arguments.max_seconds
    for dtype in arguments.dtypes:
        for op in arguments.op:
            done = set()
            for stage in STAGES[op]:
                table, timer = tune_problems.table(op), EventTimer()
                problem = Problem(op, stage, arguments.size, arguments.batch, dtype)
                options = (arguments.rounds, print, not arguments.dry_run, arguments.passes, deadline, done)
                changed += tune(table, problem, timer, *options)
    where = "tables left alone" if arguments.dry_run or not changed else "entered into launch.json"
    print(f"{torch.cuda.get_device_name()}: {changed} better parameters, {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
