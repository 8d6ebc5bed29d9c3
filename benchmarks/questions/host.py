"""Host time of the modules, in Python and PyTorch, without any kernel of t2t_fast: ``python -m benchmarks host``.

Every call runs the package's path for a GPU with the Triton backend on the CPU, in Triton's interpreter mode with the
launches replaced by a function that does nothing. Counted is the time of the calling thread from the call to its
return: the package's Python, allocations, and PyTorch's operations, whose arithmetic is small on a 16 px image. Not
counted are Triton's own launch code and the switch to a tensor's device. Upstream's modules run eagerly on the same
input, ten calls of each in turn; their operations compute on the CPU, so their time is that of the narrow rows at best.
"programs": the recorded launches and PyTorch calls of an inference alone, the floor of the replayed path.
"""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from unittest.mock import patch

SIZE, WARM_UP, TURN = 16, 3, 10
WIDE = {"embed_dim": 384, "token_dim": 64}
NARROW = {"embed_dim": 32, "token_dim": 16}
MODELS = {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "num_classes": 10, "embed_dim": 48, "token_dim": 16}
HEADS = ("subject", "pass", "Python calls", "t2t_fast, us", "programs, us", "upstream, us", "upstream / t2t_fast")


@contextmanager
def stubbed():
    """Inside, kernels are selected as for an H100 and their launches do nothing. Results are undefined."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    import t2t_fast
    from t2t_fast.ops._common import triton_runtime

    if not triton_runtime.INTERPRETED:
        raise RuntimeError("benchmarks host: needs TRITON_INTERPRET=1 when t2t_fast is imported")
    machine = {"architecture": lambda device: "sm_90", "multiprocessors": lambda device: 132}
    torch.set_flush_denormal(True)  # memory that no kernel has written would slow the arithmetic
    try:
        with (
            patch.object(InterpretedFunction, "run", lambda *arguments, **named: None),
            patch.multiple(triton_runtime, trial=lambda *call: None, **machine),
            t2t_fast.backend("triton"),
        ):
            yield
    finally:
        torch.set_flush_denormal(False)


def subjects():
    """Name -> (upstream's module, the fast one): T2T modules in their own width and a narrow one, narrow T2T-ViT-14."""
    from t2t_fast import models, reference

    found = {}
    for kind in ("performer", "transformer"):
        for width, sizes in (("", WIDE), (", narrow", NARROW)):
            upstream = reference.T2T_module(SIZE, kind, **sizes)
            found[f"{kind} module{width}"] = upstream, swapped(upstream)
        upstream = reference.T2T_ViT(img_size=SIZE, tokens_type=kind, **MODELS)
        found[f"{kind} T2T-ViT-14, narrow"] = upstream, swapped(upstream)
        found[f"{kind} T2T-ViT-14, narrow, create_model"] = upstream, models.T2TViT(SIZE, kind, **MODELS)
    return found


def swapped(upstream):
    """A copy of the module, swapped."""
    import t2t_fast

    fast = deepcopy(upstream)
    t2t_fast.swap(fast)
    return fast


def programs_of(inference):
    """A function that calls the programs which an inference replays (``ops/_common/replay.py``), and nothing else."""
    import torch

    from t2t_fast.ops._common.replay import Program

    calls, call = [], Program.__call__

    def noted(program, *tensors):
        calls.append((program, tensors, torch.is_autocast_enabled("cpu")))
        return call(program, *tensors)

    with patch.object(Program, "__call__", noted):
        inference()
    amp = any(enabled for *_, enabled in calls)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            for program, tensors, _ in calls:
                program(*tensors)

    return run


def step(module, x, training):
    """A function that calls the module once, and its backward pass in training.

    T2T modules under autocast to bfloat16. Models in float32: on a CPU, PyTorch's products in bfloat16 take several
    times as long as their dispatch on a GPU.
    """
    import torch

    amp = not hasattr(module, "blocks")

    def inference():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            module(x)

    def train():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = module(x)
        out.backward(gradient.expand_as(out))
        for parameter in parameters:
            parameter.grad = None

    parameters, gradient = list(module.parameters()), torch.ones((), dtype=torch.bfloat16 if amp else None)
    module.train(training)
    return train if training else inference


def calls_of(run):
    """The number of Python functions that ``run`` calls."""
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(counted)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def measure(names=None, seconds=1.0):
    """A row of :data:`HEADS` for each subject and pass: the first decile of the times of calls, for ``seconds``.

    Not the median, since other processes on the machine only add to a time.
    """
    import torch

    x, rows = torch.randn(1, 3, SIZE, SIZE), []
    with stubbed():
        for name, (upstream, fast) in subjects().items():
            if names is not None and name not in names:
                continue
            for training in (False, True):
                runs = [step(module, x, training) for module in (fast, upstream)]
                for run in runs * WARM_UP:
                    run()
                calls, end = calls_of(runs[0]), time.perf_counter() + seconds
                if not training:
                    runs.append(programs_of(runs[0]))
                times = [[] for _ in runs]
                while time.perf_counter() < end or not times[0]:
                    for run, found in zip(runs, times, strict=True):
                        for _ in range(TURN):
                            start = time.thread_time()
                            run()
                            found.append(time.thread_time() - start)
                own, others, *programs = (1e6 * sorted(found)[len(found) // 10] for found in times)
                kind = "training" if training else "inference"
                rows.append((name, kind, calls, own, next(iter(programs), None), others, others / own))
    return rows


def main(argv=None):
    """Print the table."""
    command = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.splitlines()[0])
    command.add_argument("--seconds", type=float, default=1.0, help="per row; default: %(default)s")
    command.add_argument("--subject", action="append", help="only this row; may be given several times")
    arguments = command.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # read when t2t_fast is imported
    import torch

    from ..measure.text_tables import markdown

    torch.set_num_threads(1)
    rows = measure(arguments.subject, arguments.seconds)
    cells = [(*row[:3], *("" if n is None else f"{n:.0f}" for n in row[3:6]), f"{row[6]:.2f}") for row in rows]
    print("\n".join(markdown(HEADS, cells)))
    print(f"\n{' '.join(__doc__.split())}")
    return 0
