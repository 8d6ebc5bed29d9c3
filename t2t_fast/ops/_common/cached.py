"""A cache for values that inference derives from parameters, such as folded weights."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import FLOATING
from .guards import PLAIN, capturing

_SIZE = 256


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's address and layout, which no other tensor has as long as its storage lives."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def obstacle(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why values derived from these tensors must not be cached, or ``None``."""
    if torch.compiler.is_compiling():
        return "torch.compile folds constants itself"
    if torch._C._len_torch_dispatch_stack():
        return "a mode, such as that of fake tensors, may replace the values"
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.dtype not in FLOATING:
            return "a tensor of a subclass may change unseen"
        if tensor.is_inference():
            return "tensors made in inference mode count no changes"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "FSDP gathers parameters without counting that as a change"
    if capturing(tensors[0]):
        return "a CUDA graph must compute everything anew when it is replayed"
    return None


class WeightCache:
    """A cache of values derived from tensors, valid while the tensors are the same and unchanged.

    Changes are detected by a tensor's version counter, which every in-place operation increments except a write through
    ``.data``, as some optimizers and moving averages do. Such writes usually follow a backward pass, so that of any
    fused operator clears the cache; after a write without one, call :func:`functional.clear_weight_cache`.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], tuple[list[int], list[StorageWeakRef], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tensors: Sequence[torch.Tensor | None], key: Hashable, make: Callable[[], Any]) -> Any:
        """The cached value of the same tensors (some may be ``None``), key and stream, or ``make()``."""
        given = [t for t in tensors if t is not None]
        if obstacle(given) is not None:
            return make()
        stream = torch.cuda.current_stream(given[0].device).cuda_stream if given[0].is_cuda else None
        full = (key, stream, *[None if t is None else _place(t) for t in tensors])
        versions = [t._version for t in given]
        with self._lock:
            entry = self._entries.get(full)
            if entry is not None and entry[0] == versions and not any(r.expired() for r in entry[1]):
                self._entries.move_to_end(full)
                return entry[2]
        value = make()
        references = [StorageWeakRef(t.untyped_storage()) for t in given]
        with self._lock:
            self._entries[full] = versions, references, value
            for old in [name for name, (_, held, _) in self._entries.items() if any(r.expired() for r in held)]:
                del self._entries[old]
            while len(self._entries) > _SIZE:
                self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


FOLDED = WeightCache()
"""Folded and packed weights."""
