"""A small model in its forms, its batch, and training by one process, with which the checks compare."""

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import t2t_fast
from t2t_fast import models, reference

TINY = dict(img_size=32, num_classes=5, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, token_dim=16)
BATCH = 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Largest difference of gradients, losses and parameters, relative to the largest number of their tensor (but at least
to 1 % of the largest gradient)."""

FORMS = ("own", "swapped")


def original(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Upstream's model, unfused, in training mode and without dropout; the same weights in each call."""
    torch.manual_seed(0)
    return without_dropout(reference.T2T_ViT(**TINY).to(dtype))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def fast(form: str = "swapped", dtype: torch.dtype = torch.float64) -> nn.Module:
    """:func:`original` swapped, or the package's own model with the same weights."""
    return copy.deepcopy(_fast(form, dtype))


@cache
def _fast(form: str, dtype: torch.dtype) -> nn.Module:
    model = original(dtype)
    if form == "swapped":
        report = t2t_fast.swap(model)
        assert not report.left, report
        return model
    own = models.T2TViT(**TINY).to(dtype)
    own.load_state_dict(model.state_dict())
    return without_dropout(own)


def batch(dtype: torch.dtype = torch.float64, step: int = 0, images: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a step."""
    generator = torch.Generator().manual_seed(step + 1)
    x = torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 5, (images,), generator=generator)


def mine(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's part of a batch."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def loss_of(model: nn.Module, data: Iterable[torch.Tensor]) -> torch.Tensor:
    x, labels = data
    return F.cross_entropy(model(x).float() if x.dtype != torch.float64 else model(x), labels)


def whole(value: Any) -> Any:
    """A tensor, assembled from its shards if it is a ``DTensor``."""
    value = value.detach() if isinstance(value, torch.Tensor) else value
    return value.full_tensor() if isinstance(value, DTensor) else value


def plain(name: str) -> str:
    """A parameter's name without those of wrappers."""
    for wrapper in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(wrapper, "")
    return name


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> gradient of each parameter that has one, whole."""
    return {plain(name): whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> each parameter, whole."""
    return {plain(name): whole(p).clone() for name, p in model.named_parameters()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float | None = None) -> None:
    """Assert that the same tensors are there and close: :data:`TOLERANCE`."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    floor = 0.01 * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        allowed = TOLERANCE[value.dtype] if tolerance is None else tolerance
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = (found[name] - value).abs().max().item() / max(value.abs().max().item(), floor)
        assert error <= allowed, f"{name} differs by {error:.1e}"


Optimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def momentum(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Callable[[int], Any], steps: int = 3, clip: float = 0.0
) -> list[dict[str, torch.Tensor]]:
    """The loss, the norm of all gradients and the gradients of each step (before clipping), then the parameters."""
    results = []
    for step in range(steps):
        loss = loss_of(model, data(step))
        loss.backward()
        found = gradients(model)
        if clip:
            found["norm"] = whole(nn.utils.clip_grad_norm_(model.parameters(), clip)).clone()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        results.append({"loss": mean / dist.get_world_size(), **found})
    return [*results, parameters(model)]


@cache
def alone(
    dtype: torch.dtype = torch.float64, make: Optimizer = momentum, prepare: Any = None, **options: Any
) -> list[dict[str, torch.Tensor]]:
    """:func:`trained` by each process alone on whole batches, of the unfused model."""
    model = original(dtype)
    if prepare is not None:
        prepare(model)
    return trained(model, make(model.parameters()), lambda step: batch(dtype, step), **options)


def together(
    model: nn.Module, dtype: torch.dtype = torch.float64, make: Optimizer = momentum, **options: Any
) -> list[dict[str, torch.Tensor]]:
    """:func:`trained` by all processes, each on its part of every batch."""
    return trained(model, make(model.parameters()), lambda step: mine(batch(dtype, step)), **options)


def same_training(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)


def backends_of(model: nn.Module) -> dict[str, str]:
    """Path -> backend of each fast module, or "unfused: " and the reason."""
    return {path: backend for path, _, backend in t2t_fast.explain(model).rows}


def fused(model: nn.Module) -> None:
    """Assert that every fast module of a model is fused at present."""
    found = backends_of(model)
    assert found and not any(backend.startswith("unfused") for backend in found.values()), found
