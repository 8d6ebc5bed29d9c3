"""Random cases of Performer attention, and their check."""

import torch

from t2t_fast.testing import Case, assert_close, features


def case_of(length, keys=None, width=16, m=8, batch=1, norm=2.0, eps=1e-8, mask=None):
    """A random case with q and k of norm ``norm``; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(batch, tokens, width, generator=generator) * std
        for tokens, std in ((length, norm / width**0.5), (keys or length, norm / width**0.5), (keys or length, 1.0))
    )
    tensors = {"q": q, "k": k, "v": v, "w": features(generator, m, width)}
    wants = tuple(tensors)
    if mask is not None:
        tensors["key_mask"] = mask
    return Case("performer_attention", "made up", tensors, {"eps": eps}, wants)


def check(case, dtype, label=""):
    """Forward and every gradient against the reference in float64."""
    rounded = case.cast(dtype)
    expected, expected_gradients = rounded.cast(torch.float64).run_backward("reference", dtype)
    out, gradients = rounded.run_backward("triton")
    assert_close(out, expected, case.op, "forward", dtype, label)
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], case.op, "backward", dtype, f"{label} {name}")
