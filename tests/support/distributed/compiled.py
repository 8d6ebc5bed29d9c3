"""``torch.compile`` with DDP, FSDP2, activation checkpointing and swap, in every order."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import t2t_fast
from t2t_fast import reference

from . import check, check_each
from .fsdp import sharded
from .orders import checkpointed, whole_swap
from .training import alone, batch, fast, loss_of, original, same, same_training, together


def compiled(model, backend="eager", **options):
    """By default with a backend that runs the traced graph; "aot_eager" also traces backward. Generated code takes
    minutes, and tests/ops/test_compile.py has it."""
    return torch.compile(model, backend=backend, **options)


def in_place(model):
    model.compile(backend="eager")
    return model


def in_buckets(model):
    """The graph is divided where DDP's buckets end, so that they are sent during backward."""
    return compiled(DDP(model, bucket_cap_mb=0.02), "aot_eager")


ORDERS = {
    "compile(DDP(model))": ("own", in_buckets),
    "DDP(compile(model))": ("swapped", lambda model: DDP(compiled(model, "aot_eager", fullgraph=True))),
    "DDP(model.compile()), static graph": ("swapped", lambda model: DDP(in_place(model), static_graph=True)),
    "compile(fully_shard(model))": ("swapped", lambda model: compiled(sharded(model), "aot_eager")),
    "DDP(compile(checkpointed(model)))": ("own", lambda model: DDP(compiled(checkpointed(model)))),
}


@check_each(ORDERS)
def training(order):
    form, wrap = ORDERS[order]
    first = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 10_000  # which must not exceed the others
    try:
        same_training(together(wrap(fast(form))), alone())
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = first


@check
def compiled_blocks_then_sharded():
    """Each block is compiled in place and then sharded, as large models are trained."""
    model = fast("own")
    for block in model.blocks:
        in_place(block)
    same_training(together(sharded(model)), alone())


@check_each(("model.compile", "DDP(compile)"))
def compiled_then_swapped(order):
    """A graph that was compiled before the swap is not used after it."""
    model = original()
    wrapped = in_place(model) if order == "model.compile" else DDP(compiled(model))
    with torch.no_grad():
        loss_of(wrapped, batch())
    whole_swap(wrapped)
    assert t2t_fast.explain(model).rows
    same_training(together(wrapped if isinstance(wrapped, DDP) else DDP(wrapped)), alone())


@check
def unswapped_after_compilation():
    model = fast()
    wrapped = DDP(compiled(model))
    same(together(wrapped, steps=1)[0], alone(steps=1)[0])
    assert not t2t_fast.unswap(wrapped).left and type(model.tokens_to_token) is reference.T2T_module
    model.load_state_dict(original().state_dict())
    same(together(wrapped, steps=1)[0], alone(steps=1)[0])


@check
def compiled_children_then_swap():
    """Blocks inside ``torch.compile`` wrappers are found and swapped."""
    model = original()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = compiled(block)
    whole_swap(model)
    same_training(together(DDP(model)), alone())
