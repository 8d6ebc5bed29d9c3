"""Memory of one call: bytes saved for backward, and the most bytes allocated at a time."""

from collections.abc import Callable, Iterable

import torch

from . import _extension
from .config import quiet_profiler


def saved_bytes(forward: Callable[[], object], lasting: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps after ``forward()`` until backward, each storage once.

    Tensors in ``lasting``, such as parameters, exist anyway and are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that ``call()`` allocates at a time, gradients included, beyond what was allocated before.

    On CUDA this is the caching allocator's count. On a CPU it is that of PyTorch's allocator as its profiler records
    it, plus the most scratch memory of the native operators, as if both peaks coincided. It covers eager and compiled
    code, but not the memory that other libraries (oneDNN, MKL) allocate themselves.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    _scratch_bytes(restart=True)
    with quiet_profiler(), profiler as profile:
        call()
    alive = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most + _scratch_bytes()


def _scratch_bytes(restart: bool = False) -> int:
    """Most bytes of the native operators' scratch memory in use at a time since the last restart; 0 without them."""
    name = "t2t_fast_native::scratch_bytes"
    if not _extension.operators() or not torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeExplicitAutograd"
    ):
        return 0
    return torch.ops.t2t_fast_native.scratch_bytes(restart)
