"""Errors of upstream's T2T module and of the swapped one under autocast: ``python -m benchmarks.questions.amp``.

A gain scales the weights of k, q and v, as training does. Upstream divides 0 by 0 in float16 once D underflows; the
swapped module returns what exact arithmetic returns. Errors are relative to float64: of the output, and of the worst
parameter gradient that has not vanished.
"""

import json
import sys
from copy import deepcopy

import torch

import t2t_fast
from t2t_fast import reference
from t2t_fast.reference.layers import init_weights
from t2t_fast.testing import DTYPES, errors, natural_images

from ..measure.text_tables import markdown
from .common import parser

GAINS = (1.0, 2.0, 4.0)
SIZE, BATCH = 224, 2

VANISHED = 1e-20
"""A gradient that is nowhere larger is 0 to every optimiser and not compared: at gain 4 the second layer's gate lets
1e-38 of the attention through, and its projection's gradient is 1e-35."""


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
    with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        out = module(images.to(dtype) if dtype == torch.float64 else images)
    out.backward(gradient.to(out))
    return out, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def measure(device, gains=GAINS):
    """A list of dictionaries, one for each gain, dtype and module."""
    images = natural_images(BATCH, 3, SIZE, SIZE).to(device)
    gradient = torch.randn(BATCH, (SIZE // 16) ** 2, 384, generator=torch.Generator().manual_seed(1)).to(device)
    rows = []
    for gain in gains:
        upstream = _module(gain).to(device)
        swapped = deepcopy(upstream)
        t2t_fast.swap(swapped)
        truth, true_gradients = _run(deepcopy(upstream).double(), images, gradient, device, torch.float64)
        compared = [key for key, g in true_gradients.items() if g.abs().max() > VANISHED]
        for name in ("fp32", "bf16", "fp16"):
            for label, module in (("upstream", upstream), ("t2t_fast", swapped)):
                out, gradients = _run(module, images, gradient, device, DTYPES[name])
                finite = all(bool(t.isfinite().all()) for t in (out, *gradients.values()))
                worst = max(errors(gradients[key], true_gradients[key])[0] for key in compared)
                row = {"gain": gain, "dtype": name, "module": label, "finite": finite}
                numbers = (errors(out, truth)[0], worst) if finite else (None, None)
                rows.append(row | dict(zip(("output_error", "gradient_error"), numbers, strict=True)))
    return rows


def main(argv=None):
    """Print the table, or JSON; exit code 1 if the swapped module returned anything that is not finite."""
    command = parser("amp", __doc__)
    command.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = command.parse_args(argv)
    rows = measure(arguments.device)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        numbers = ("output_error", "gradient_error")
        cells = [[row["gain"], row["dtype"], row["module"], *(_text(row[name]) for name in numbers)] for row in rows]
        print("\n".join(markdown(("gain", "dtype", "module", "output error", "worst gradient error"), cells)))
    return 0 if all(row["finite"] for row in rows if row["module"] == "t2t_fast") else 1


def _text(error):
    return "not finite" if error is None else f"{error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
