"""Errors of upstream's T2T module and of the swapped one under autocast: ``python -m benchmarks.questions.amp``.

The weights of k, q and v are multiplied by a gain, as they may grow in training. Upstream divides 0 by 0 in float16
once its denominator underflows; the swapped module returns what exact arithmetic returns. Errors are relative to
float64: of the output, and of the worst parameter gradient that has not vanished; "nan" if any of them is not finite.
"""

import math
import sys
from copy import deepcopy

import torch

import t2t_fast
from t2t_fast import reference
from t2t_fast.reference.layers import init_weights
from t2t_fast.testing import DTYPES, errors, natural_images

from ..measure.text_tables import markdown
from .common import NAMES, parser

GAINS = (1.0, 2.0, 4.0)
SIZE, BATCH = 224, 2
HEADS = ("gain", "dtype", "module", "output error", "worst gradient error")
# A gradient that is nowhere larger is 0 to every optimiser and is not compared: at gain 4 the second layer's gate lets
# 1e-38 of the attention through, and its projection's gradient is 1e-35
VANISHED = 1e-20


def _module(gain):
    torch.manual_seed(0)
    module = reference.T2T_module(SIZE, "performer", embed_dim=384).apply(init_weights).eval()
    with torch.no_grad():
        for layer in (module.attention1, module.attention2):
            layer.kqv.weight.mul_(gain)
    return module


def _run(module, images, gradient, device, dtype):
    """Output and parameter gradients, under autocast for a half type."""
    module.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = module(images.to(dtype) if dtype == torch.float64 else images)
    out.backward(gradient.to(out))
    return out, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def measure(device, gains=GAINS):
    """A row of :data:`HEADS` for each gain, dtype and module."""
    images = natural_images(BATCH, 3, SIZE, SIZE).to(device)
    gradient = torch.randn(BATCH, (SIZE // 16) ** 2, 384, generator=torch.Generator().manual_seed(1)).to(device)
    rows = []
    for gain in gains:
        upstream = _module(gain).to(device)
        swapped = deepcopy(upstream)
        t2t_fast.swap(swapped)
        truth, true_gradients = _run(deepcopy(upstream).double(), images, gradient, device, torch.float64)
        compared = [key for key, g in true_gradients.items() if g.abs().max() > VANISHED]
        for name in NAMES:
            for label, module in (("upstream", upstream), ("t2t_fast", swapped)):
                out, gradients = _run(module, images, gradient, device, DTYPES[name])
                found = errors(out, truth)[0], max(errors(gradients[key], true_gradients[key])[0] for key in compared)
                finite = all(bool(t.isfinite().all()) for t in (out, *gradients.values()))
                rows.append((gain, name, label, *(found if finite else (math.nan, math.nan))))
    return rows


def main(argv=None):
    """Print the table; exit code 1 if the swapped module returned anything that is not finite."""
    rows = measure(parser("amp", __doc__).parse_args(argv).device)
    print("\n".join(markdown(HEADS, [(*row[:3], *(f"{error:.1e}" for error in row[3:])) for row in rows])))
    return 1 if any(math.isnan(row[3]) for row in rows if row[2] == "t2t_fast") else 0


if __name__ == "__main__":
    sys.exit(main())
