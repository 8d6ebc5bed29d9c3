"""The half-precision experiment: which tokens of the photograph stay finite under autocast as the weights grow."""

import copy
from dataclasses import dataclass

import torch

from ..interop.swap import swap
from ..reference import T2T_module
from ..reference.layers import init_weights

GAINS = (1.0, 1.5, 2.0)
"""Factors on the weights that make k, q and v; 1 leaves the model as it is."""

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HalfResult:
    """One form of the T2T module under autocast.

    Attributes:
        gain, dtype, form: "before" or "after" the swap.
        broken: (h, w) of the second layer's tokens, whether a value of one is not finite.
        broken_out: tokens of the module's result that are not all finite; tokens: how many there are.
        error: the result's relative error against float64, NaN if any value is not finite.
    """

    gain: float
    dtype: str
    form: str
    broken: torch.Tensor
    broken_out: int
    tokens: int
    error: float


def performer_module(model, img_size):
    """A copy of the model's T2T module in eval mode; for a model without Performer a new one, and ``False``."""
    own = model.tokens_to_token
    if own.tokens_type == "performer":
        return copy.deepcopy(own).eval(), True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T2T_module(img_size, "performer", embed_dim=256).apply(init_weights).eval(), False


def experiment(module, x):
    """Run an upstream-shaped Performer T2T module before and after the swap, in fp16 and bf16, for every gain.

    Args:
        module: a ``T2T_module`` of token type "performer", which is not changed.
        x: (1, C, H, W) on the module's device.

    Returns:
        a list of :class:`HalfResult`.
    """
    results = []
    for gain in GAINS:
        before = copy.deepcopy(module)
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


def _before(module, x):
    """The second layer's tokens, and the result."""
    kept = []
    handle = module.attention2.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        tokens = module(x)
    finally:
        handle.remove()
    return kept[0], tokens


def _after(module, x):
    """As :func:`_before`; a hook on an inner layer would make it run unfused."""
    stages = module.forward_stages(x)
    return stages[1][0], stages[2][0]


def _result(gain, dtype, form, inner, tokens, exact):
    side = round(inner.shape[1] ** 0.5)
    broken = ~inner.isfinite().all(-1)
    wrong = ~tokens.isfinite().all(-1)
    error = ((tokens - exact).norm() / exact.norm()).item()
    return HalfResult(gain, dtype, form, broken.view(side, side).cpu(), int(wrong.sum()), wrong.numel(), error)
