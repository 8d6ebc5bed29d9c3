"""Fold, normalise, unfold: an orthogonal projector and its own gradient, equal to upstream's three steps."""

import pytest
import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import functional
from t2t_fast.modules import FusedFoldUnfold
from t2t_fast.ops._common.windows import overlap
from t2t_fast.testing import WINDOW_CASES, errors

BACKENDS = ["native", "aten", "reference"]
WINDOWS = [pytest.param(*case[1:], id=case[0]) for case in WINDOW_CASES if case[1]]


def projector(size, k, s, p, channels, backend):
    """The function, and random tokens in float64 of the right shape; skips where the backend cannot run."""
    win = functional.window(k, s, p)
    h, w = win.grid(*size)
    tokens = torch.randn(2, h * w, channels * win.taps, dtype=torch.float64)

    def run(t):
        try:
            return functional.fused_fold_unfold(t, size, k, s, p, backend=backend)
        except t2t_fast.BackendUnavailable as error:
            pytest.skip(next(line.strip() for line in str(error).splitlines() if line.startswith(f"  {backend}: ")))

    return run, tokens


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_orthogonal_projector(batch, channels, height, width, k, s, p, backend):
    """A A t = A t and <A t, u> = <t, A u>; so t - A t is orthogonal to A t."""
    run, t = projector((height, width), k, s, p, channels, backend)
    u = torch.randn_like(t)
    once = run(t)
    torch.testing.assert_close(run(once), once, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((once * u).sum(), (t * run(u)).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((once * once).sum(), (t * once).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_tokens_are_unchanged(backend):
    """The operator projects onto tokens that agree where they overlap; zero padding is included."""
    run, _ = projector((13, 17), 7, 3, 3, 2, backend)
    split = functional.soft_split(torch.randn(2, 2, 13, 17, dtype=torch.float64), 7, 3, 3)
    torch.testing.assert_close(run(split), split, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_the_same_operator(backend):
    run, t = projector((12, 15), (7, 5), 3, (3, 2), 3, backend)
    gradient = torch.randn_like(t)
    t.requires_grad_()
    run(t).backward(gradient)
    torch.testing.assert_close(t.grad, run(gradient), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("batch", "channels", "height", "width", "k", "s", "p"), WINDOWS)
def test_overlap_in_closed_form(batch, channels, height, width, k, s, p):
    """Against folding unfolded ones; the count is 1 for pixels that no window covers."""
    win = functional.window(k, s, p)
    ones = torch.ones(1, 1, height, width, dtype=torch.float64)
    arguments = {"kernel_size": k, "stride": s, "padding": p}
    count = F.fold(F.unfold(ones, **arguments), (height, width), **arguments)[0, 0]
    assert torch.equal(overlap((height, width), win, ones), count.clamp_min(1))


class FusionFeedForward(torch.nn.Module):
    """The middle part of FuseFormer's layer of that name, as in upstream's code."""

    def __init__(self, output_size, window):
        super().__init__()
        self.fold = torch.nn.Fold(output_size=output_size, **window)
        self.unfold = torch.nn.Unfold(**window)
        self.n_vecs = functional.window(**window).grid(*output_size)

    def forward(self, x):
        b, n, c = x.shape
        length = self.n_vecs[0] * self.n_vecs[1]
        ones = x.new_ones(b, n, c // 2).view(-1, length, c // 2).permute(0, 2, 1)
        folded = self.fold(x.view(-1, length, c).permute(0, 2, 1)) / self.fold(ones)
        return self.unfold(folded).permute(0, 2, 1).contiguous().view(b, n, c)


def test_module_replaces_upstream_fold_and_unfold():
    """Tokens of several frames in one sequence, as in upstream; the output size is given once or at each call."""
    window = {"kernel_size": (7, 7), "stride": (3, 3), "padding": (3, 3)}
    upstream = FusionFeedForward((12, 21), window).double()
    x = torch.randn(2, 3 * 28, 2 * 49, dtype=torch.float64)
    expected = upstream(x)
    fixed = t2t_fast.FusedFoldUnfold(**window, output_size=(12, 21))
    free = t2t_fast.FusedFoldUnfold(**window)
    assert errors(fixed(x), expected)[1] < 1e-13
    assert errors(free(x, (12, 21)), expected)[1] < 1e-13
    assert torch.equal(free(x[:, :28], (12, 21)), fixed(x)[:, :28])
    assert torch.equal(fixed(x.expand(2, -1, -1)), fixed(x))
    assert str(fixed) == "FusedFoldUnfold(12x21, k7 s3 p3)" and str(free) == "FusedFoldUnfold(k7 s3 p3)"
    assert not list(fixed.state_dict())


def test_keeps_the_dtype_under_autocast():
    tokens = torch.randn(1, 16, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.fused_fold_unfold(tokens, 8, 3, 2, 1).dtype == torch.float32
        assert functional.fused_fold_unfold(tokens.bfloat16(), 8, 3, 2, 1).dtype == torch.bfloat16


def test_module_with_empty_batch():
    assert FusedFoldUnfold(3, 2, 1, output_size=8)(torch.randn(0, 16, 9)).shape == (0, 16, 9)
