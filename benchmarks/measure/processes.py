"""Data-parallel training by several processes on one CPU (gloo): a smoke test of swapped models under DDP.

Each process has one thread and its own images. Before anything is timed, the averaged gradients are compared with
those of one process over all the images.
"""

import multiprocessing
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

from t2t_fast.testing import errors, natural_images

from ..suites.providers import BY_NAME, named
from .fit import Trainer
from .statistics import summary

ROUNDS, WARM_UP = 8, 2
SECONDS = 300  # time limit of a group of processes, which may hang
TOLERANCE = 1e-4  # relative error of the averaged gradients in float32, over all parameters


def measure(group, name, device, say):
    """An entry of the run file: ``group.processes`` processes of a provider; ``say`` is called with progress."""
    say(f"{group.processes} process{'es' if group.processes > 1 else ''} of one thread")
    with (
        tempfile.TemporaryDirectory(prefix="t2t-fast-processes-") as folder,
        multiprocessing.get_context("spawn").Pool(group.processes) as pool,
    ):
        started = [
            pool.apply_async(work, (group, name, rank, f"file://{folder}/store")) for rank in range(group.processes)
        ]
        times, *_ = [each.get(SECONDS) for each in started]
    seconds = summary(times)
    images_per_s = group.processes * group.batch / seconds["median"]
    return {**named(group, name), "threads": 1, "seconds": seconds, "times": times, "images_per_s": images_per_s}


def _gradients(model, images, labels):
    F.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).unsqueeze(0)


def work(group, name, rank, store):
    """Check and time one process. Returns the seconds of each round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=group.processes)
    try:
        alone, trainer = (Trainer(group, BY_NAME[name], "cpu") for _ in range(2))
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.model)
        images = natural_images(group.processes * group.batch, 3, group.size, group.size)
        labels, times = torch.arange(len(images)), []
        mine = [tensor[rank * group.batch :][: group.batch] for tensor in (images, labels)]
        # without dropout; DDP averages the gradients
        error, _ = errors(_gradients(trainer.model.eval(), *mine), _gradients(alone.model.eval(), images, labels))
        if not error <= TOLERANCE:
            raise AssertionError(f"averaged gradients are wrong by {error:.1e}, allowed {TOLERANCE:.0e}")
        trainer.model.train()
        trainer.optimizer.zero_grad(set_to_none=True)
        for _ in range(WARM_UP + ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            trainer.step(*mine)
            dist.barrier()
            times.append(time.perf_counter() - start)
        return times[WARM_UP:]
    finally:
        dist.destroy_process_group()
