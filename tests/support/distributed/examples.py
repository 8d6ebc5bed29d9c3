"""Checks of the launch itself."""

import torch
import torch.distributed as dist

from . import check


@check
def passes():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()


@check
def fails_in_one():
    if dist.get_rank() == 1:
        raise AssertionError("only here")
    dist.all_reduce(torch.ones(1))


@check
def passes_again():
    passes()
