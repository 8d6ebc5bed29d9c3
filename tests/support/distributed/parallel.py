"""Tensor parallelism and pipelining."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import t2t_fast

from . import check_each
from .training import (
    BATCH,
    FORMS,
    alone,
    backends_of,
    batch,
    fast,
    gradients,
    loss_of,
    momentum,
    original,
    same,
    same_training,
    trained,
)

MLP = {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
ATTENTION = {
    "attn.qkv": ColwiseParallel(output_layouts=Replicate()),
    "attn.proj": RowwiseParallel(input_layouts=Replicate()),
}
PLANS = {"mlp": MLP, "attention": ATTENTION, "both": {**MLP, **ATTENTION}}


def parallel(model, plan, mesh=None):
    """A model whose blocks' Linear layers are divided among the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in model.blocks:
        parallelize_module(block, mesh, PLANS[plan])
    return model


@check_each(PLANS, FORMS)
def tensor_parallel(plan, form):
    """Blocks whose layers are divided run unfused, with the reason; the T2T module stays fused."""
    model = parallel(fast(form), plan)
    rows = backends_of(model)
    assert all(rows[f"blocks.{index}"].endswith(" has hooks") for index in range(2)), rows
    assert not rows["tokens_to_token"].startswith("unfused")
    optimizer = momentum(model.parameters())
    same_training(trained(model, optimizer, lambda step: batch(step=step)), alone())


@check_each(FORMS)
def tensor_parallel_tokens(form):
    """A layer of the T2T module: its MLP is divided, kqv is gathered."""
    model, mesh = fast(form), init_device_mesh("cpu", (dist.get_world_size(),))
    layer = model.tokens_to_token.attention1
    plan = {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
    parallelize_module(layer, mesh, {**plan, "kqv": ColwiseParallel(output_layouts=Replicate())})
    rows = backends_of(model)
    assert rows["tokens_to_token.attention1"] == "unfused: kqv has hooks", rows
    assert not rows["blocks.0"].startswith("unfused")
    optimizer = momentum(model.parameters())
    same_training(trained(model, optimizer, lambda step: batch(step=step)), alone())


@check_each(("mlp", "both"))
def tensor_parallel_then_swap(plan):
    """What is divided is left, with the reason; the rest is swapped."""
    model = parallel(original(), plan)
    report = t2t_fast.swap(model)
    assert "tokens_to_token" in report.swapped
    assert ("blocks.0.attn" in report.swapped) == (plan == "mlp")
    assert "swap before fully_shard and parallelize_module" in report.left["blocks.0"], report
    optimizer = momentum(model.parameters())
    same_training(trained(model, optimizer, lambda step: batch(step=step)), alone())


@check_each(FORMS)
def tensor_parallel_and_sharded(form):
    """A mesh of two dimensions: tensor parallelism in one, FSDP2 in the other."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = parallel(fast(form), "mlp", mesh["tensor"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizer = momentum(model.parameters())
    same_training(trained(model, optimizer, lambda step: batch(step=step)), alone())


@check_each(FORMS)
def heads_cannot_be_divided(form):
    """q, k and v are packed in one Linear; a column-wise part of it is no part of the heads, and the block says so."""
    model, mesh = fast(form), init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model.blocks[0], mesh, {"attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel()})
    try:
        model(batch()[0])
    except ValueError as error:
        assert "qkv must return its 96 channels" in str(error) and "got 48" in str(error), error
    else:
        raise AssertionError("a part of qkv was used as q, k and v")


class Front(nn.Module):
    """The first half of a model, for a pipeline: tokens after the first block."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        model = self.model
        tokens = model.tokens_to_token(x)
        tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], dim=1) + model.pos_embed
        return model.blocks[0](tokens)


class Back(nn.Module):
    """The second half: logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.head(self.model.norm(self.model.blocks[1](tokens))[:, 0])


def run_pipeline(stage):
    """Losses of two micro-batches, forward and backward."""
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.cross_entropy)
    x, labels = batch()
    if dist.get_rank() == 0:
        schedule.step(x)
        return None
    losses = []
    schedule.step(target=labels, losses=losses)
    return torch.stack(losses).mean()


def expected_gradients():
    single = original()
    loss = loss_of(single, batch())
    loss.backward()
    return loss.detach(), gradients(single)


@check_each(FORMS)
def pipeline_of_parts(form):
    """A stage in each process; micro-batches' gradients are those of the whole batch."""
    rank, model = dist.get_rank(), fast(form)
    part = (Front, Back)[rank](model)
    loss = run_pipeline(PipelineStage(part, rank, dist.get_world_size(), torch.device("cpu")))
    expected, theirs = expected_gradients()
    found = gradients(model)
    assert found and set(found) < set(theirs)
    same(found, {name: theirs[name] for name in found})
    if rank == 1:
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0.0)


@check_each(FORMS)
def traced_pipeline(form):
    """``pipeline`` traces the model by ``torch.export``, so its stages consist of plain operations."""
    model = fast(form)
    pipe = pipeline(model, mb_args=(batch()[0][: BATCH // 2],), split_spec={"blocks.1": SplitPoint.BEGINNING})
    rank = dist.get_rank()
    stage = pipe.build_stage(rank, torch.device("cpu"))
    run_pipeline(stage)
    _, theirs = expected_gradients()
    found = {name: p.grad for name, p in stage.submod.named_parameters() if p.grad is not None}
    assert found and all(name in theirs for name in found), found.keys()
    same(found, {name: theirs[name] for name in found})
