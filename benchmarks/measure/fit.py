"""The largest batch whose training step fits into a given amount of memory, found by running steps.

On CUDA the allocator is held to the limit, and a batch fits if no allocation fails: what a user's card would say. On a
CPU a batch fits if the most bytes in use at a time (parameters, optimizer, images, and what :func:`memory.peak_bytes`
counts of a step) stay below it. The limit is the same everywhere, so that runs on different machines can be compared.
"""

import gc
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import memory, reference
from t2t_fast.testing import DTYPES

from ..suites.providers import BACKENDS, BY_NAME

LIMIT_BYTES = {"cpu": 2e9, "cuda": 16e9}
"""A tenth of a server's memory, and a small card's."""

PROBES = (1, 3)
"""Batches whose peaks, which grow along a line, tell where to look."""

MOST = 2**16
"""Images of a batch beyond which nobody looks."""


class Trainer:
    """A model and its training step at any batch.

    Args:
        group: names the model, its image side and dtype; provider: a :class:`providers.Provider`; device: "cpu" or
            "cuda".
    """

    def __init__(self, group, provider, device):
        torch.manual_seed(0)
        self.group, self.provider, self.device = group, provider, device
        model = getattr(reference, group.subject)(img_size=group.size)
        if provider.source != "upstream":
            t2t_fast.swap(model)
        if provider.memory == "low":
            model.tokens_to_token.memory = "low"
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step(self, images, labels):
        """One step; gradients are gone when it ends."""
        dtype, source = DTYPES[self.group.dtype], self.provider.source
        autocast = torch.autocast(self.device, dtype, enabled=dtype != torch.float32)
        with autocast, partial(t2t_fast.backend, source)() if source in BACKENDS else nullcontext():
            out = self.model(images)
        F.cross_entropy(out.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def lasting_bytes(self):
        """Parameters, buffers and the optimizer's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers(), *state))

    def used(self, batch, limit):
        """Most bytes in use at a time by a step of ``batch`` images, or ``None`` where CUDA refused to allocate."""
        gc.collect()
        make = partial(torch.randn, batch, 3, self.group.size, self.group.size, device=self.device)
        if self.device == "cpu":
            images, labels = make(), torch.zeros(batch, dtype=torch.long)
            peak = memory.peak_bytes(lambda: self.step(images, labels), "cpu")
            return self.lasting_bytes() + images.numel() * images.element_size() + peak
        torch.cuda.empty_cache()
        share = min(1.0, limit / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            torch.cuda.reset_peak_memory_stats()
            self.step(make(), torch.zeros(batch, dtype=torch.long, device="cuda"))
            torch.cuda.synchronize()
            return torch.cuda.max_memory_reserved()
        except torch.cuda.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def largest(used, limit, say=lambda text: None):
    """The largest batch that fits, by trying: a guess from small batches, then bisection.

    Args:
        used: batch -> bytes in use, or ``None`` where there were too many to say; limit: bytes.

    Returns:
        (batch, bytes it uses, bytes of one more image or ``None``); batch 0 uses 0 bytes.
    """
    tried = {0: 0}

    def fits(batch):
        if batch not in tried:
            say(f"a step of {batch} image{'s' if batch > 1 else ''}")
            tried[batch] = used(batch)
        return tried[batch] is not None and tried[batch] <= limit

    for probe in PROBES:
        if not fits(probe):
            break
    good = max(batch for batch in tried if fits(batch))
    bad = min((batch for batch in tried if not fits(batch)), default=None)
    while bad is None or bad - good > 1:
        guess = _guess(tried, good, bad, limit)
        if fits(guess):
            good = guess
        else:
            bad = guess
        if good >= MOST:
            break
    return good, tried[good], tried.get(good + 1)


def _guess(tried, good, bad, limit):
    """The batch to try next: on the line through the two largest measured batches, or halfway where that is no help."""
    measured = sorted(batch for batch, value in tried.items() if batch and value is not None)[-2:]
    line = None
    if len(measured) == 2 and tried[measured[1]] > tried[measured[0]]:
        slope = (tried[measured[1]] - tried[measured[0]]) / (measured[1] - measured[0])
        line = int(measured[1] + (limit - tried[measured[1]]) / slope)
    if bad is None:
        # a line through small batches may lead far astray
        return max(good + 1, min(line or 2 * good, 64 * good, MOST))
    if line is not None and good <= line < bad:
        return line if line > good else good + 1
    return (good + bad) // 2


def measure(group, name, device, say):
    """An entry of the run file: the largest batch of a provider; ``say`` is called with what is tried."""
    provider, limit = BY_NAME[name], LIMIT_BYTES[device]
    trainer = Trainer(group, provider, device)
    trainer.used(1, limit)  # makes the optimizer's state, compiles kernels
    batch, used, over = largest(lambda batch: trainer.used(batch, limit), limit, say)
    return {
        "group": group.id,
        **group._asdict(),
        "batch": batch,
        "provider": name,
        "label": provider.label,
        "another_function": provider.another,
        "limit_bytes": limit,
        "used_bytes": used,
        "over_bytes": over,
    }
