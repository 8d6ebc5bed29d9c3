"""Small upstream modules, images for them, and a comparison of their results."""

import torch

from t2t_fast import reference
from t2t_fast.testing import errors

LAYERS = ["attention1", "attention2"]


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def module(kind="performer", cls=reference.T2T_module):
    torch.manual_seed(0)
    return cls(32, kind, 3, 24, 16).eval()


def layer(cls=reference.Token_performer, *args):
    torch.manual_seed(0)
    return cls(27, 16, *args).eval()


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [each for item in value for each in flat(item)] if isinstance(value, (tuple, list, type({}.values()))) else []
    )


def same(found, expected):
    """Equal structure and sizes, close tensors."""
    assert type(found) is type(expected)
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
        assert ours.shape == theirs.shape and errors(ours, theirs)[0] < 1e-5
