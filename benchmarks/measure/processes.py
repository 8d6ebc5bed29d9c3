"""Data-parallel training by several processes on one CPU (gloo): a smoke test of swapped models under DDP.

Each process has one thread and its own images. Before anything is timed, the averaged gradients are compared with
those of one process over all the images. ``python -m benchmarks.measure.processes`` is one process of the group.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import t2t_fast
from t2t_fast import reference
from t2t_fast.testing import errors, natural_images

from ..suites.providers import BY_NAME
from .statistics import summary

ROUNDS, WARM_UP = 8, 2
SECONDS = 300
"""After which a group of processes hangs for all that one can tell."""

TOLERANCE = 1e-4
"""Relative error of an averaged gradient in float32, over all parameters."""


def measure(group, name, say):
    """An entry of the run file: ``group.processes`` processes of a provider; ``say`` is called with progress."""
    say(f"{group.processes} process{'es' if group.processes > 1 else ''} of one thread")
    with tempfile.TemporaryDirectory(prefix="t2t-fast-processes-") as folder:
        words = [sys.executable, "-m", "benchmarks.measure.processes", "--folder", folder, "--provider", name]
        words += ["--subject", group.subject, "--size", str(group.size), "--batch", str(group.batch)]
        words += ["--world", str(group.processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(
                [*words, "--rank", str(rank)],
                cwd=Path(__file__).resolve().parents[2],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(group.processes)
        ]
        deadline = time.monotonic() + SECONDS
        try:
            for worker in workers:
                _, said = worker.communicate(timeout=max(1.0, deadline - time.monotonic()))
                if worker.returncode:
                    last = said.strip().splitlines()[-1:] or ["no message"]
                    raise RuntimeError(f"a process ended with code {worker.returncode}: {last[0]}")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        times = json.loads(Path(folder, "times.json").read_text())
    seconds = summary(times)
    return {
        "group": group.id,
        **group._asdict(),
        "provider": name,
        "label": BY_NAME[name].label,
        "another_function": BY_NAME[name].another,
        "threads": 1,
        "seconds": seconds,
        "times": times,
        "images_per_s": group.processes * group.batch / seconds["median"],
    }


def _model(arguments):
    torch.manual_seed(0)
    model = getattr(reference, arguments.subject)(img_size=arguments.size)
    if BY_NAME[arguments.provider].source != "upstream":
        t2t_fast.swap(model)
    return model


def _gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def _check(model, images, labels, arguments):
    """Averaged gradients against those of all images in one process, without dropout."""
    model.eval()
    F.cross_entropy(model(_share(images, arguments)), _share(labels, arguments)).backward()
    alone = _model(arguments).eval()
    F.cross_entropy(alone(images), labels).backward()
    error, _ = errors(_gradients(model).unsqueeze(0), _gradients(alone).unsqueeze(0))
    if not error <= TOLERANCE:
        raise AssertionError(f"averaged gradients are wrong by {error:.1e}, allowed {TOLERANCE:.0e}")
    model.zero_grad(set_to_none=True)


def _share(tensor, arguments):
    return tensor[arguments.rank * arguments.batch :][: arguments.batch]


def work(arguments):
    """What one process does; the first writes the seconds of each round."""
    torch.set_num_threads(1)
    store = f"file://{arguments.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=arguments.rank, world_size=arguments.world)
    try:
        model = torch.nn.parallel.DistributedDataParallel(_model(arguments))
        images = natural_images(arguments.world * arguments.batch, 3, arguments.size, arguments.size)
        labels = torch.arange(len(images))
        _check(model, images, labels, arguments)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        mine, targets, times = _share(images, arguments), _share(labels, arguments), []
        for _ in range(WARM_UP + ROUNDS):
            optimizer.zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            F.cross_entropy(model(mine), targets).backward()
            optimizer.step()
            dist.barrier()
            times.append(time.perf_counter() - start)
        if arguments.rank == 0:
            Path(arguments.folder, "times.json").write_text(json.dumps(times[WARM_UP:]))
    finally:
        dist.destroy_process_group()


def main(argv=None):
    """One process of the group."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure.processes", description=__doc__.splitlines()[0])
    for name, kind in (("folder", str), ("provider", str), ("subject", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    for name in ("size", "batch", "world", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    work(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
