"""The half-precision experiment: which tokens of the photograph stay finite under autocast as the weights grow."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..interop.swap import swap
from ..reference import T2T_module
from ..reference.layers import init_weights

GAINS = (1.0, 1.5, 2.0)
"""Factors on the weights of k, q and v; 1 leaves the model unchanged."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HalfResult:
    """One form of the T2T module under autocast.

    Attributes:
        gain, dtype, form: the form is "before" or "after" the swap.
        broken: (h, w) of the second layer's tokens: whether any value is not finite.
        broken_out: number of the module's output tokens with a value that is not finite.
        tokens: number of the module's output tokens.
        error: relative error of the output against float64, NaN if any value is not finite.
    """

    gain: float
    dtype: str
    form: str
    broken: torch.Tensor
    broken_out: int
    tokens: int
    error: float

    def row(self) -> dict[str, Any]:
        """As plain data."""
        row: dict[str, Any] = dict(gain=self.gain, dtype=self.dtype, form=self.form)
        row |= dict(inner_tokens=self.broken.numel(), inner_tokens_not_finite=int(self.broken.sum()))
        row |= dict(tokens=self.tokens, tokens_not_finite=self.broken_out)
        return row | dict(error=self.error if self.error == self.error else None)


def performer_module(model: Any, img_size: int) -> tuple[nn.Module, bool]:
    """A copy of the model's T2T module in eval mode; a new module, and ``False``, if the model has no Performer."""
    own = model.tokens_to_token
    if own.tokens_type == "performer":
        return copy.deepcopy(own).eval(), True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T2T_module(img_size, "performer", embed_dim=256).apply(init_weights).eval(), False


def experiment(module: nn.Module, x: torch.Tensor) -> list[HalfResult]:
    """Run an upstream-shaped Performer T2T module before and after the swap, in fp16 and bf16, for every gain.

    Args:
        module: a ``T2T_module`` of token type "performer"; it is not changed.
        x: (1, C, H, W) on the module's device.
    """
    results = []
    for gain in GAINS:
        before: Any = copy.deepcopy(module)
        with torch.no_grad():
            for layer in (before.attention1, before.attention2):
                layer.kqv.weight.mul_(gain)
            exact = copy.deepcopy(before).to("cpu", torch.float64)(x.cpu().double())
        after = copy.deepcopy(before)
        swap(after)
        for name, dtype in DTYPES.items():
            for form, subject, run in (("before", before, _before), ("after", after, _after)):
                with torch.no_grad(), torch.autocast(x.device.type, dtype):
                    inner, tokens = run(subject, x)
                results.append(_result(gain, name, form, inner, tokens.cpu().double(), exact))
    return results


def _before(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second layer's tokens, and the output."""
    outputs: list[torch.Tensor] = []
    handle = module.attention2.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        tokens = module(x)
    finally:
        handle.remove()
    return outputs[0], tokens


def _after(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_before`; with a hook on an inner layer, the swapped module would run unfused."""
    stages = module.forward_stages(x)
    return stages[1][0], stages[2][0]


def _result(
    gain: float, dtype: str, form: str, inner: torch.Tensor, tokens: torch.Tensor, exact: torch.Tensor
) -> HalfResult:
    side = round(inner.shape[1] ** 0.5)
    broken = ~inner.isfinite().all(-1)
    wrong = ~tokens.isfinite().all(-1)
    error = ((tokens - exact).norm() / exact.norm()).item()
    return HalfResult(gain, dtype, form, broken.view(side, side).cpu(), int(wrong.sum()), wrong.numel(), error)
