"""Memory of one call: bytes saved for backward, and the most bytes alive at a time."""

import torch

from . import _extension
from .config import quiet_profiler


def saved_bytes(forward, lasting):
    """Bytes that autograd keeps after ``forward()`` until backward, each storage once.

    ``lasting`` are tensors that live on anyway, such as parameters, and are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())


def peak_bytes(call, device):
    """Most bytes allocated at a time by ``call()`` beyond what was there before; its gradients are among them.

    On CUDA the caching allocator's count; on a CPU that of torch's allocator as its profiler records it, plus the most
    scratch memory that native operators had in use, as if both were at one moment. This sees eager and compiled code
    alike, but not what other libraries (oneDNN, MKL) take for themselves.
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


def _scratch_bytes(restart=False):
    """Most bytes of scratch memory that native operators had in use since the last restart; 0 without them."""
    name = "t2t_fast_native::scratch_bytes"
    if not _extension.operators() or not torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeExplicitAutograd"
    ):
        return 0
    return torch.ops.t2t_fast_native.scratch_bytes(restart)
