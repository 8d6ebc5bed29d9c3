"""Data-parallel training: gradients, losses and parameters of several steps are those of one process."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from t2t_fast import modules

from . import check, check_each
from .training import (
    FORMS,
    adam,
    alone,
    batch,
    fast,
    fused,
    gradients,
    loss_of,
    mine,
    momentum,
    original,
    parameters,
    same,
    same_training,
    together,
)

OPTIONS = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001},
    "broadcast_buffers off": {"broadcast_buffers": False},
}


@check_each(OPTIONS, FORMS)
def training(options, form):
    model = DDP(fast(form), **OPTIONS[options])
    found = together(model)
    fused(model)
    same_training(found, alone())


@check_each(FORMS)
def training_in_float32(form):
    """By the native operators, where they are built."""
    dtype = torch.float32
    same_training(together(DDP(fast(form, dtype)), dtype), alone(dtype))


@check
def set_static_graph():
    model = DDP(fast())
    model._set_static_graph()
    same_training(together(model), alone())


@check
def recompute():
    model = fast("own")
    model.tokens_to_token.recompute = True
    for block in model.blocks:
        block.recompute = True
    same_training(together(DDP(model)), alone())


@check_each(FORMS)
def accumulation(form):
    """``no_sync``: each process adds the gradients of two micro-batches, and they are averaged in the second."""
    model, data = DDP(fast(form)), [mine(batch(step=step)) for step in range(2)]
    with model.no_sync():
        loss_of(model, data[0]).backward()
    loss_of(model, data[1]).backward()
    single = original()
    for step in range(2):
        loss_of(single, batch(step=step)).backward()
    same(gradients(model), gradients(single))


@check
def frozen():
    """Parameters without gradients: w and pos_embed always; here the whole T2T module too."""

    def freeze(model):
        model.tokens_to_token.requires_grad_(False)
        return model

    model = DDP(freeze(fast()))
    before = parameters(model)
    found = together(model)
    same_training(found, alone(prepare=freeze))
    assert not any("tokens_to_token" in name or "pos_embed" in name for name in found[0])
    for name in ("pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention1.kqv.weight"):
        assert torch.equal(before[name], found[-1][name])


class Features(nn.Module):
    """A model of which the classifier is not used."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner.forward_head(self.inner.forward_features(x), pre_logits=True)


@check_each(FORMS)
def unused_parameters(form):
    model = DDP(Features(fast(form)), find_unused_parameters=True)
    for step in range(2):
        model.zero_grad()
        loss_of(model, mine(batch(step=step))).backward()
    single = Features(original())
    loss_of(single, batch(step=1)).backward()
    found = gradients(model)
    assert not found.pop("inner.head.weight", torch.zeros(1)).any()
    assert not found.pop("inner.head.bias", torch.zeros(1)).any()
    same(found, gradients(single))


@check
def zero_redundancy_optimizer():
    model = DDP(fast())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
    same_training(together(model, make=lambda _: optimizer), alone(make=adam))
    held = [p for group in optimizer.optim.param_groups for p in group["params"]]
    assert len(held) < len(list(model.parameters())), "each process holds a part of the optimizer's state"


@check
def uneven_inputs():
    """``Join``: one process has a batch more; the others' contribution is repeated or dropped by DDP's rule."""
    rank = dist.get_rank()
    model = DDP(fast())
    optimizer = momentum(model.parameters())
    with Join([model]):
        for step in range(1 + rank):
            loss_of(model, batch(step=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    single = original()
    optimizer = momentum(single.parameters())
    for step, share in ((0, 1.0), (1, 0.5)):  # by default the sum is divided by the number of all processes
        (share * loss_of(single, batch(step=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 1:
        same(parameters(model), parameters(single))


@check
def compressed_gradients():
    model = DDP(fast(dtype=torch.float32))
    model.register_comm_hook(None, bf16_compress_hook)
    loss_of(model, mine(batch(torch.float32))).backward()
    single = original(torch.float32)
    loss_of(single, batch(torch.float32)).backward()
    same(gradients(model), gradients(single), tolerance=0.02)


@check_each(FORMS)
def autocast(form):
    """bfloat16 by autocast: as far from float64 as the unfused model, or closer."""

    def error(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, mine(batch(torch.float32)))
        loss.backward()
        found = torch.cat([value.flatten() for _, value in sorted(gradients(model).items())]).double()
        return ((found - exact).norm() / exact.norm()).item()

    single = original()
    loss_of(single, batch()).backward()
    exact = torch.cat([value.flatten() for _, value in sorted(gradients(single).items())])
    theirs, ours = (error(DDP(model)) for model in (original(torch.float32), fast(form, torch.float32)))
    assert ours <= 1.5 * theirs + 1e-3, (ours, theirs)


@check
def moving_averages():
    """Averages deep-copy a swapped model: the copy is swapped, and its values are those of the unfused model's."""
    averages = []
    for model in (fast(), original()):
        wrapped = DDP(model)
        kept = AveragedModel(wrapped.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = momentum(wrapped.parameters())
        for step in range(3):
            loss_of(wrapped, mine(batch(step=step))).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.update_parameters(wrapped.module)
        averages.append(kept)
    ours, theirs = averages
    fused(ours)
    assert isinstance(ours.module.tokens_to_token, modules.T2TModule)
    same(parameters(ours), parameters(theirs))
    same({"": ours(batch()[0])}, {"": theirs(batch()[0])})


@check
def moving_averages_of_timm():
    from timm.utils import ModelEmaV3

    averages = []
    for model in (fast(), original()):
        wrapped = DDP(model)
        kept = ModelEmaV3(wrapped.module, decay=0.9)
        optimizer = momentum(wrapped.parameters())
        for step in range(3):
            loss_of(wrapped, mine(batch(step=step))).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.update(wrapped.module, step=step)
        averages.append(kept)
    ours, theirs = averages
    fused(ours)
    same(parameters(ours), parameters(theirs))


@check
def second_backward():
    """Two backward passes of one graph, and evaluation without gradients between steps."""
    model, single = DDP(fast()), original()
    for each, data in ((model, mine(batch())), (single, batch())):
        with torch.no_grad():
            loss_of(each, data)
        with contextlib.ExitStack() as stack:
            if each is model:
                stack.enter_context(model.no_sync())
            loss = loss_of(each, data)
            loss.backward(retain_graph=True)
            loss.backward()
        with torch.inference_mode():
            loss_of(each, data)
        loss_of(each, data).backward()
    same(gradients(model), gradients(single))
