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

import t2t_fast
from t2t_fast import reference
from t2t_fast.testing import errors, natural_images

from ..suites.providers import BY_NAME, named
from .statistics import summary

ROUNDS, WARM_UP = 8, 2
SECONDS = 300  # after which a group of processes is taken to hang
TOLERANCE = 1e-4  # Relative error of an averaged gradient in float32, over all parameters


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


def _model(group, name):
    torch.manual_seed(0)
    model = getattr(reference, group.subject)(img_size=group.size)
    if BY_NAME[name].source != "upstream":
        t2t_fast.swap(model)
    return model


def _gradients(model, images, labels):
    F.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).unsqueeze(0)


def work(group, name, rank, store):
    """What one process does. Returns the seconds of each round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=group.processes)
    try:
        model = torch.nn.parallel.DistributedDataParallel(_model(group, name))
        images = natural_images(group.processes * group.batch, 3, group.size, group.size)
        labels = torch.arange(len(images))
        mine, targets = (tensor[rank * group.batch :][: group.batch] for tensor in (images, labels))
        # without dropout; DDP averages the gradients
        error, _ = errors(
            _gradients(model.eval(), mine, targets), _gradients(_model(group, name).eval(), images, labels)
        )
        if not error <= TOLERANCE:
            raise AssertionError(f"averaged gradients are wrong by {error:.1e}, allowed {TOLERANCE:.0e}")
        model.train()
        optimizer, times = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0), []
        for _ in range(WARM_UP + ROUNDS):
            optimizer.zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            F.cross_entropy(model(mine), targets).backward()
            optimizer.step()
            dist.barrier()
            times.append(time.perf_counter() - start)
        return times[WARM_UP:]
    finally:
        dist.destroy_process_group()
