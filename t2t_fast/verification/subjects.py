"""What ``verify`` compares beside operators: two forms of one model with the same weights, and an input."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import testing
from ..errors import NothingToSwap
from ..interop.swap import FAST, SwapReport, copied, swap, unswap

MODEL = "model"
"""The argument of ``verify`` that selects the built-in small models."""


@dataclass(frozen=True)
class Subject:
    """Two forms of one model with the same weights, in eval mode, and an input.

    ``left`` says what swap did not replace, and ``left_is_wrong`` whether that is a failure.
    """

    what: str
    plain: nn.Module
    fast: nn.Module
    x: torch.Tensor
    left: str = ""
    left_is_wrong: bool = False


def raised(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {lines[0] if lines else ''}"


def small_model(tokens_type: str) -> Subject:
    """A small T2T-ViT in upstream's form with every term exercised, and the same swapped."""
    from ..reference import T2T_ViT

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of the CPU only, whose state is restored
        model = T2T_ViT(
            64, tokens_type, num_classes=10, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0, token_dim=32
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:  # initial biases (0) and norms (identity) would leave terms untested
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    fast = copy.deepcopy(model)
    try:
        left = _left(swap(fast))
    except NothingToSwap as refusal:  # swap tests what it replaces, so a wrong operator can end here
        left = " ".join(str(refusal).split())
    x = testing.natural_images(2, 3, 64, 64)
    return Subject(f"small T2T-ViT, {tokens_type}", model, fast, x, left, left_is_wrong=True)


def users_model(model: nn.Module, x: torch.Tensor | None) -> Subject:
    """A user's module beside its plain form, both copies."""
    x = _example(model) if x is None else x
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"verify: x must be a floating torch.Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    name, left = type(model).__name__, ""
    fast, plain = _frozen(model), _frozen(model)
    if not any(isinstance(module, FAST) for module in model.modules()):
        left = _left(swap(fast))
        name = f"{name}, swapped"
    elif unswap(plain).rows and _refusal(plain, x) is not None:
        plain = copy.deepcopy(fast)  # upstream's form takes square images only; the reference backend takes any
    refusal = _refusal(plain, x)
    if refusal is not None:
        raise ValueError(f"verify: {name} does not take x of shape {tuple(x.shape)}; {refusal}")
    return Subject(name, plain, fast, x.detach(), left)


def _frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode; tensors that autograd made are constants in it."""
    found = copied(model, lambda t: copy.deepcopy(t) if t.is_leaf else t.detach().clone())
    found.eval()  # an overridden train() may return nothing
    return found


def _left(report: SwapReport) -> str:
    """What a swap left unchanged, and why."""
    reasons = "; ".join(f"{path}: {reason}" for path, reason in report.left.items())
    return reasons and f"swap left {reasons}"


def _example(model: nn.Module) -> torch.Tensor:
    """An artificial image of the size that the model was built for, 224 x 224 if the model does not say."""
    sizes: list[Any] = [module.img_size for module in model.modules() if hasattr(module, "img_size")]
    patches: list[Any] = [module.num_patches for module in model.modules() if hasattr(module, "num_patches")]
    size = sizes[0] if sizes else 16 * round(patches[0] ** 0.5) if patches else 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return testing.natural_images(2, getattr(model, "in_chans", 3), height, width)


def _refusal(model: nn.Module, x: torch.Tensor) -> str | None:
    """What ``model`` raises on ``x``, or ``None``."""
    parameter = next(model.parameters(), x)
    try:
        with torch.no_grad():
            model(x.to(parameter.device, parameter.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return raised(error)
    return None
