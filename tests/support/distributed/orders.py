"""The order of ``swap``, activation checkpointing and wrapping: each trains as the unfused model, or says why not.

The rows of the table in docs/distributed.md are checks of this file.
"""

import copy

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import t2t_fast
from t2t_fast import models, reference
from t2t_fast.errors import NothingToSwap

from . import check, check_each
from .fsdp import fused_calls, sharded
from .training import (
    FORMS,
    TINY,
    alone,
    batch,
    fast,
    fused,
    gradients,
    loss_of,
    mine,
    original,
    parameters,
    plain,
    same,
    same_training,
    together,
)

SWAPPED = ["blocks.0", "blocks.1", "tokens_to_token", "tokens_to_token.attention1", "tokens_to_token.attention2"]
BLOCKS = (reference.Block, models.blocks.Block)


def ends(paths):
    """Module paths without the names of wrappers."""
    return {plain(f"{path}.")[:-1] for path in paths}


def whole_swap(model):
    """Swap what is inside of wrappers; every candidate is swapped."""
    report = t2t_fast.swap(model)
    assert not report.left and ends(report.swapped) == set(SWAPPED), report
    return model


def checkpointed(model, names=BLOCKS):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, names))
    return model


# swap and DistributedDataParallel


@check
def ddp_then_swap():
    """``swap(ddp)``, and ``swap(ddp.module)``: the parameters stay, so the reducer's hooks do too."""
    for inner in (False, True):
        model = DDP(original())
        whole_swap(model.module if inner else model)
        fused(model)
        same_training(together(model), alone())


@check_each(("False", "True"))
def swap_between_steps(static_graph):
    """The first step unfused, then swapped, then unswapped again."""
    model = DDP(original(), static_graph=static_graph == "True", bucket_cap_mb=0.01)
    expected = alone(steps=1)
    same(together(model, steps=1)[0], expected[0])
    model.module.load_state_dict(original().state_dict())
    whole_swap(model)
    same(together(model, steps=1)[0], expected[0])
    model.module.load_state_dict(original().state_dict())
    assert not t2t_fast.unswap(model).left
    assert type(model.module.blocks[0]) is reference.Block
    same(together(model, steps=1)[0], expected[0])


# swap and fully_shard


@check
def shard_then_swap():
    """Refused: a shard is a part of the weights, on which nothing can be proved. The model is unchanged."""
    model = sharded(original(), "blocks")
    classes = [type(module) for module in model.modules()]
    try:
        t2t_fast.swap(model)
    except NothingToSwap as error:
        text = str(error)
        assert "left: blocks.0 (FSDPBlock): " in text and "DTensor" in text and "; swap before fully_shard" in text, (
            text
        )
    else:
        raise AssertionError("sharded modules were swapped")
    assert [type(module) for module in model.modules()] == classes
    same_training(together(model), alone())


@check
def shard_blocks_then_swap():
    """What is not sharded is swapped; the report has the reason for the rest."""
    model = original()
    for block in model.blocks:
        sharded(block, "root")
    report = t2t_fast.swap(model)
    assert "tokens_to_token" in report.swapped
    assert {"blocks.0", "blocks.1"} <= set(report.left)
    assert all("swap before fully_shard" in why for why in report.left.values()), report
    loss_of(model, batch()).backward()
    single = original()
    loss_of(single, batch()).backward()
    same(gradients(model), gradients(single))


@check
def unswap_after_sharding():
    """A module that ``fully_shard`` gave another class stays swapped, with the reason; inner ones are restored."""
    model = sharded(fast(), "blocks")
    report = t2t_fast.unswap(model)
    assert set(report.left) == {"blocks.0", "blocks.1"}
    assert all(why == "its class was changed again after the swap" for why in report.left.values())
    assert "tokens_to_token" in report.swapped and type(model.tokens_to_token) is reference.T2T_module
    calls = fused_calls(model)
    same_training(together(model), alone())
    assert calls == [0, 1] * 3


@check
def swapped_then_sharded_then_swapped_again():
    model = sharded(fast(), "blocks")
    report = t2t_fast.swap(model)
    assert not report.swapped and {report.left[path] for path in SWAPPED} == {"is fast already"}, report
    same_training(together(model), alone())


@check
def copies_of_a_sharded_module():
    """They fail as without ``swap``; a swapped block does not become an unsharded one."""
    for model in (fast(), original()):
        block = sharded(model, "blocks").blocks[0]
        for copied, error in ((copy.copy, TypeError), (copy.deepcopy, AssertionError)):
            try:
                copied(block)
            except error:
                continue
            raise AssertionError(f"{copied.__name__} copied {type(block).__name__}")


@check
def first_version_then_swap():
    """FSDP1's parameters outside of a forward are flat pieces: swapping is refused, and training goes on unfused."""
    model = FullyShardedDataParallel(original(), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        t2t_fast.swap(model)
    except NothingToSwap as error:
        assert "left: _fsdp_wrapped_module.blocks.0 (Block): " in str(error), error
    else:
        raise AssertionError("sharded modules were swapped")
    loss_of(model, mine(batch())).backward()


# activation checkpointing


@check_each(FORMS)
def activation_checkpointing(form):
    """``checkpoint_wrapper`` around blocks, in one process, as part of DDP, and of FSDP2."""
    expected = alone()
    for wrap in (DDP, lambda model: DDP(model, static_graph=True), lambda model: sharded(model, "root")):
        model = wrap(checkpointed(fast(form)))
        same_training(together(model), expected)
    single = checkpointed(fast(form))
    fused(single)
    loss_of(single, batch()).backward()
    same(gradients(single), {name: value for name, value in expected[0].items() if name != "loss"})


@check_each(FORMS)
def checkpointing_inside_units(form):
    """Each block is checkpointed and then sharded, as a trainer does it; the T2T module too."""
    model = checkpointed(fast(form), (*BLOCKS, reference.T2T_module, t2t_fast.T2TModule))
    for block in model.blocks:
        sharded(block, "root")
    model = sharded(model, "root")
    same_training(together(model), alone())


@check
def checkpointing_then_swap():
    """Wrapped blocks are found inside their wrappers."""
    model = checkpointed(original())
    whole_swap(model)
    fused(model)
    same_training(together(DDP(model)), alone())
    model = checkpointed(original(), (reference.T2T_module,))
    whole_swap(model)
    same_training(together(DDP(model)), alone())


@check
def checkpointing_around_children():
    """A wrapper inside a block: the block runs unfused after the swap, or is left before it, with the reason."""
    model = checkpointed(fast(), (reference.Token_performer, nn.Linear))
    reasons = [backend for _, _, backend in t2t_fast.explain(model).rows]
    assert sum("CheckpointWrapper" in why for why in reasons) >= 3, reasons
    same_training(together(DDP(model)), alone())
    model = original()
    for block in model.blocks:
        block.mlp = checkpoint_wrapper(block.mlp)
    report = t2t_fast.swap(model)
    assert "tokens_to_token" in report.swapped, report
    same_training(together(DDP(model)), alone())


@check_each(FORMS)
def reentrant_checkpointing(form):
    """The older form, which DDP supports with a static graph."""
    model = fast(form)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.REENTRANT)
    same_training(together(DDP(model, static_graph=True)), alone())


@check_each(FORMS)
def selective_checkpointing(form):
    """A policy that keeps matrix products and recomputes the rest."""

    def policy(_, operator, *arguments, **named):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    model = fast(form)
    for index, block in enumerate(model.blocks):
        contexts = dict(context_fn=lambda: create_selective_checkpoint_contexts(policy))
        model.blocks[index] = checkpoint_wrapper(block, checkpoint_fn=checkpoint, use_reentrant=False, **contexts)
    same_training(together(DDP(model)), alone())


@check
def checkpointing_with_recompute():
    """``recompute`` inside a checkpointed block."""
    model = fast("own")
    model.tokens_to_token.recompute = True
    for block in model.blocks:
        block.recompute = True
    model = checkpointed(model, (*BLOCKS, t2t_fast.T2TModule))
    same_training(together(DDP(model)), alone())


@check_each(FORMS)
def checkpointing_repeats_dropout(form):
    """The masks of the second forward are those of the first: gradients are those without checkpointing."""
    results = []
    for wrapped in (False, True):
        model = fast(form)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        model = checkpointed(model, (*BLOCKS, reference.T2T_module, t2t_fast.T2TModule)) if wrapped else model
        torch.manual_seed(5)
        loss_of(model, batch()).backward()
        results.append(gradients(model))
    same(*results)


@check
def state_of_a_checkpointed_model():
    """``load_checkpoint`` and the state's names ignore wrappers."""
    model = checkpointed(fast())
    bare = models.T2TViT(**TINY).double()
    t2t_fast.load_checkpoint(bare, model.state_dict())
    same(parameters(bare), parameters(model))


@check
def unswap_of_wrapped_models():
    """After wrapping with DDP and checkpoints every class is restored."""
    model = DDP(checkpointed(fast()))
    report = t2t_fast.unswap(model)
    assert not report.left and not t2t_fast.explain(model).rows
    same_training(together(model), alone())


@check
def data_parallel():
    """On a CPU ``DataParallel`` calls its module."""
    model = torch.nn.DataParallel(original())
    whole_swap(model)
    loss_of(model, batch()).backward()
    single = original()
    loss_of(single, batch()).backward()
    same(gradients(model), gradients(single))
