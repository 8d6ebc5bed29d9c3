"""Which tensors of a model can be written in place, and a write that happens completely or not at all."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn


def obstacle(tensor: torch.Tensor) -> str | None:
    """Why a tensor cannot be read or written in place, for messages; ``None`` if it can."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return f"quantised {_dtype(tensor)}"
    if tensor.is_meta:
        return "on the meta device"
    end = tensor.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and end * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "without memory"
    return None


def describe(value: Any) -> str:
    """Shape and kind of an entry, for messages."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    problem = obstacle(value)
    if problem is not None:
        return problem
    return f"{tuple(value.shape)}{'' if value.is_floating_point() else f' {_dtype(value)}'}"


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def own_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """{name: tensor} of the model's state dict, and {name: why not} of those that cannot be written in place.

    The tensors are the model's parameters and buffers themselves. A state dict can also contain copies, made by hooks
    or by an overridden ``state_dict``, and a write into a copy would be lost.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors = {
        name: own.get(name, value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    }
    problems = {name: obstacle(tensor) for name, tensor in tensors.items()}
    known = {tensor.data_ptr() for tensor in own.values() if obstacle(tensor) is None}
    pages = _read_only_pages()
    for name, tensor in tensors.items():
        if problems[name] is None and tensor.numel():
            address = tensor.data_ptr()
            if address not in known:
                problems[name] = "a copy that the model's state_dict() makes"
            elif tensor.device.type == "cpu" and any(start <= address < end for start, end in pages):
                problems[name] = "in memory that is read-only"
    return tensors, {name: problem for name, problem in problems.items() if problem is not None}


def _read_only_pages():
    """Address ranges in which a write would end the process, such as a file mapped read-only (Linux only)."""
    if not sys.platform.startswith("linux"):
        return []
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split(maxsplit=2)[0].split("-") for line in lines if line.split(maxsplit=2)[1][1] != "w"]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def place(tensor: torch.Tensor) -> tuple:
    """Identifies the memory of a tensor: two tensors with the same key are tied."""
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _storage(tensor):
    return tensor.device, tensor.untyped_storage().data_ptr()


def _once(tensor):
    """An expanded tensor without its repetitions."""
    for axis, (length, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and length > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _pairs(target, value):
    """Target and value as they are copied: detached, and expanded targets without repetitions."""
    target = target.detach()
    once = _once(target)
    for axis, length in enumerate(once.shape):
        if length != value.shape[axis]:
            value = value.narrow(axis, 0, length)
    return once, value


@torch.no_grad()
def separate(values: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values, copied if they share memory with a target, since a write would change them before they are read."""
    storages = {_storage(target) for target in targets}
    return [value.clone() if _storage(value) in storages else value for value in values]


@torch.no_grad()
def conflicts(copies: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Names of targets that would not have their value after the write, since they share memory with others.

    Each shared storage is copied, written as :func:`commit` would, and compared.

    Args:
        copies: {name: (target, value)}.
    """
    shared = defaultdict(list)
    for name, (target, value) in copies.items():
        if target.numel():
            shared[_storage(target)].append((name, target.detach(), value))
    wrong = []
    for group in shared.values():
        if len(group) == 1 and _once(group[0][1]).shape == group[0][1].shape:
            continue
        storage = group[0][1].untyped_storage().clone()
        mirrors = [
            torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())
            for _, t, _ in group
        ]
        for mirror, (_, _, value) in zip(mirrors, group, strict=True):
            _copy(*_pairs(mirror, value))
        wrong += [name for mirror, (name, _, value) in zip(mirrors, group, strict=True) if not same_bits(mirror, value)]
    return wrong


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of equal shape and dtype have the same bytes."""
    return torch.equal(*(x.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _copy(target, value):
    with torch.inference_mode(target.is_inference()):
        target.copy_(value)


@torch.no_grad()
def commit(attributes: list[tuple[Any, str, Any]], copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set attributes and write tensors; after any interruption the previous state is restored.

    Args:
        attributes: (object, name, value).
        copies: (target, value) of the same shape, dtype and device.
    """
    undo: list[tuple[Any, ...]] = [(setattr, owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        for target, value in copies:
            target, value = _pairs(target, value)
            undo.append((_copy, target, target.clone()))
            _copy(target, value)
    except BaseException:
        for restore, *arguments in reversed(undo):
            with suppress(Exception):  # an attribute that could not be set cannot be set back
                restore(*arguments)
        raise
