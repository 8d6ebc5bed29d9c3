"""The largest batch whose training step fits into a given amount of memory, found by running steps.

On CUDA the allocator gets the limit, and a batch fits if no allocation fails, as on a card of that size. On a CPU a
batch fits if the peak of the bytes in use (parameters, optimizer, images, and :func:`memory.peak_bytes` of a step) is
below the limit. All machines of one kind have the same limit, so that their runs can be compared.
"""

import gc
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import memory, reference
from t2t_fast.testing import DTYPES

from ..suites.providers import BACKENDS, BY_NAME, named

LIMIT_BYTES = {"cpu": 2e9, "cuda": 16e9}  # a tenth of a server's memory, and a small card's
PROBES = (1, 3)  # first batches: their peaks give the line along which memory grows
MOST = 2**16  # the largest batch that is tried


class Trainer:
    """A model and its training step at any batch; the group names the model, its image side and dtype."""

    def __init__(self, group, provider, device):
        torch.manual_seed(0)
        self.group, self.provider, self.device = group, provider, device
        model = getattr(reference, group.subject)(img_size=group.size)
        if provider.source != "upstream":
            t2t_fast.swap(model)
        if provider.recompute:
            model.tokens_to_token.recompute = True
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step(self, images, labels):
        """One step, which also deletes the gradients."""
        dtype, source = DTYPES[self.group.dtype], self.provider.source
        autocast = torch.autocast(self.device, dtype, enabled=dtype != torch.float32)
        with autocast, t2t_fast.backend(source) if source in BACKENDS else nullcontext():
            out = self.model(images)
        F.cross_entropy(out.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def lasting_bytes(self):
        """Parameters, buffers and the optimizer's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers(), *state))

    def used(self, batch, limit):
        """Peak bytes in use by a step of ``batch`` images, or ``None`` if an allocation failed on CUDA."""
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
    """The largest batch that fits: probes, then where the line through them meets the limit, else bisection.

    Args:
        used: batch -> bytes in use, or ``None`` if an allocation failed; limit: bytes.

    Returns:
        (batch, bytes it uses, bytes of one more image or ``None``); batch 0 uses 0 bytes.
    """
    tried, good, bad = {0: 0}, 0, MOST + 1
    while bad - good > 1:
        (low, high), line = [0, *sorted(batch for batch, value in tried.items() if value is not None)][-2:], bad
        if low and tried[high] > tried[low]:
            line = int(high + (limit - tried[high]) * (high - low) / (tried[high] - tried[low]))
        if high < max(PROBES) < bad:
            batch = next(probe for probe in PROBES if probe > high)
        else:
            # extrapolation from small batches may be far off
            batch = min(max(line, good + 1) if good <= line < bad else (good + bad) // 2, 64 * max(good, 1))
        say(f"a step of {batch} image{'s' if batch > 1 else ''}")
        tried[batch] = used(batch)
        good, bad = (batch, bad) if tried[batch] is not None and tried[batch] <= limit else (good, batch)
    return good, tried[good], tried.get(good + 1)


def measure(group, name, device, say):
    """An entry of the run file: the largest batch of a provider; ``say`` is called with progress."""
    limit = LIMIT_BYTES[device]
    trainer = Trainer(group, BY_NAME[name], device)
    trainer.used(1, limit)  # makes the optimizer's state, compiles kernels
    batch, used, over = largest(lambda batch: trainer.used(batch, limit), limit, say)
    return {**named(group, name), "batch": batch, "limit_bytes": limit, "used_bytes": used, "over_bytes": over}
