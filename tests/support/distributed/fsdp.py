"""``fully_shard`` (FSDP2): training is that of one process; mixed precision, checkpoints, features, meta device."""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import t2t_fast
from t2t_fast import models
from t2t_fast.modules.block import Fused

from . import check, check_each
from .training import (
    FORMS,
    TINY,
    adam,
    alone,
    backends_of,
    batch,
    fast,
    fused,
    gradients,
    loss_of,
    mine,
    original,
    parameters,
    same,
    same_training,
    together,
    trained,
    whole,
)

UNITS = {
    "root": (),
    "blocks": ("blocks.0", "blocks.1"),
    "blocks and T2T module": ("blocks.0", "blocks.1", "tokens_to_token"),
    "layers": ("blocks.0", "blocks.1", "tokens_to_token.attention1", "tokens_to_token.attention2", "norm", "head"),
    "children": ("blocks.0.mlp", "blocks.1.attn.qkv", "tokens_to_token.attention1.kqv", "tokens_to_token.project"),
}
"""The modules that are sharded on their own, besides the model."""


def sharded(model, units="blocks", **options):
    """A model after ``fully_shard`` of some modules and of itself, for two processes on the CPU."""
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **options}
    for path in UNITS[units]:
        fully_shard(model.get_submodule(path), **options)
    return fully_shard(model, **options)


def fused_calls(model):
    """A list to which each fused forward of a block adds its index."""
    seen = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Fused)

        def noted(*arguments, index=index, plain=block._fused):
            seen.append(index)
            return plain(*arguments)

        block._fused = noted
    return seen


@check_each(UNITS, FORMS)
def training(units, form):
    same_training(together(sharded(fast(form), units), make=adam), alone(make=adam))


@check_each(FORMS)
def training_in_float32(form):
    """By the native operators, where they are built."""
    dtype = torch.float32
    same_training(together(sharded(fast(form, dtype)), dtype), alone(dtype))


@check_each(("True", "False"), FORMS)
def reshard_after_forward(value, form):
    model = sharded(fast(form), reshard_after_forward=value == "True")
    same_training(together(model), alone())


@check_each(FORMS)
def clipping(form):
    """``clip_grad_norm_`` on sharded gradients: the norm and the steps are those of one process."""
    model = sharded(fast(form))
    same_training(together(model, clip=0.1), alone(clip=0.1))


@check_each(FORMS)
def accumulation(form):
    """Gradients are reduced in the last of two micro-batches only."""
    model = sharded(fast(form))
    for step in range(2):
        model.set_requires_gradient_sync(step == 1)
        loss_of(model, mine(batch(step=step))).backward()
    single = original()
    for step in range(2):
        loss_of(single, batch(step=step)).backward()
    same(gradients(model), gradients(single))


@check_each(FORMS)
def blocks_are_fused_in_forward(form):
    """Outside of a forward the parameters are ``DTensor``s; in it they are plain and the block is fused."""
    model = sharded(fast(form))
    block = model.blocks[0]
    assert "is a DTensor" in block.obstacle()
    calls = fused_calls(model)
    model(batch()[0])
    assert calls == [0, 1]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    fused(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert "is a DTensor" in block.obstacle()


@check_each(FORMS)
def a_sharded_child_runs_unfused(form):
    model = sharded(fast(form), "children")
    calls = fused_calls(model)
    model(batch()[0])
    assert calls == []
    rows = backends_of(model)
    assert rows["blocks.0"] == "unfused: mlp has hooks" and rows["blocks.1"] == "unfused: attn.qkv has hooks", rows
    assert rows["tokens_to_token.attention1"] == "unfused: kqv has hooks", rows


@check_each(FORMS)
def mixed_precision(form):
    """bfloat16 parameters and activations: as far from float64 as plain PyTorch operations, or closer."""

    def error(model):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(model, mp_policy=policy)
        loss_of(model, mine(batch(torch.float32))).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        found = torch.cat([value.flatten() for _, value in sorted(gradients(model).items())]).double()
        return ((found - exact).norm() / exact.norm()).item()

    single = original()
    loss_of(single, batch()).backward()
    exact = torch.cat([value.flatten() for _, value in sorted(gradients(single).items())])
    with t2t_fast.backend("reference"):  # upstream's own layers do not run with bfloat16 parameters
        theirs = error(fast("own", torch.float32))
    ours = error(fast(form, torch.float32))
    assert ours <= 1.5 * theirs + 1e-3, (ours, theirs)


@check_each(FORMS)
def mixed_precision_training(form):
    """Several steps with bfloat16 parameters stay finite and close to float32 ones."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(fast(form, torch.float32), mp_policy=policy)
    found, expected = together(model, torch.float32), alone(torch.float32)
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=0.03, atol=0.0)


def shared_folder():
    """A folder with the same name in all processes."""
    names = [tempfile.mkdtemp(prefix="t2t-fast-dcp-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return names[0]


def state_of(model, optimizer):
    """Name -> tensors of the model's state and of its optimizer's, whole."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    found = {f"model.{name}": whole(value).clone() for name, value in model_state.items()}
    for name, state in optimizer_state["state"].items():
        found |= {f"{name}.{key}": whole(value).clone() for key, value in state.items()}
    return found


@check_each(FORMS)
def checkpoints(form):
    """Saved by two processes; restored in two with other units, and by each process alone in an unfused model."""
    model = sharded(fast(form))
    optimizer = adam(model.parameters())
    trained(model, optimizer, lambda step: mine(batch(step=step)))
    expected, folder = state_of(model, optimizer), shared_folder()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    logits = model(batch()[0])
    after = trained(model, optimizer, lambda step: mine(batch(step=step + 3)), steps=1)

    def restored(model, **options):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = adam(model.parameters())
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder, **options)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        found = state_of(model, optimizer)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        return model, optimizer

    two, optimizer = restored(sharded(fast(form), "blocks and T2T module"))
    same({"": two(batch()[0])}, {"": logits})
    same_training(trained(two, optimizer, lambda step: mine(batch(step=step + 3)), steps=1), after)
    for single in (original(), fast(form)):
        one, optimizer = restored(single, no_dist=True)
        same({"": one(batch()[0])}, {"": logits})
        same_training(trained(one, optimizer, lambda step: batch(step=step + 3), steps=1), after)


@check
def whole_state_into_a_plain_model():
    """The gathered state has upstream's names, and ``load_checkpoint`` reads its file."""
    model, folder = sharded(fast()), shared_folder()
    together(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert state.keys() == original().state_dict().keys()
        torch.save(state, f"{folder}/model.pth")
    dist.barrier()
    plain = models.T2TViT(**TINY).double()
    t2t_fast.load_checkpoint(plain, f"{folder}/model.pth")
    same({"": plain.eval()(batch()[0])}, {"": model.eval()(batch()[0])})


@check
def from_the_meta_device():
    """A model that was never whole: its shards are filled from the first process's state."""
    with torch.device("meta"):
        model = models.T2TViT(**TINY).double()
    model = sharded(model)
    model.to_empty(device="cpu")
    state = original().state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    same(parameters(model), parameters(original()))
    same({"": model.eval()(batch()[0])}, {"": original().eval()(batch()[0])})


@check
def other_methods():
    """Methods other than forward need ``register_fsdp_forward_method``; without it PyTorch refuses the parameters."""
    model, single = sharded(fast("own")), fast("own")
    x = batch()[0]
    try:
        model.forward_features(x)
    except RuntimeError as error:
        assert "DTensor" in str(error), error
    else:
        raise AssertionError("sharded parameters were used")
    for name in ("forward_features", "forward_stages"):
        register_fsdp_forward_method(model, name)
    same({"": model.forward_features(x)}, {"": single.forward_features(x)})
    for ours, theirs in zip(model.forward_stages(x), single.forward_stages(x), strict=True):
        same({"": ours}, {"": theirs})


@check_each(FORMS)
def inference(form):
    """With and without gradients, in both modes, between steps of training."""
    model, single = sharded(fast(form)), original()
    x = batch()[0]
    for each in (model, single):
        loss_of(each, batch()).backward()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            same({"": model(x).clone()}, {"": single(x).clone()})
    loss_of(single, batch()).backward()
    loss_of(model, batch()).backward()
    same(gradients(model), gradients(single))


@check
def changed_parameters():
    """Values written between calls are used, also through ``.data`` of the shards."""
    model, single = sharded(fast()), original()
    x = batch()[0]
    with torch.inference_mode():
        model(x)
    for each in (model, single):
        for parameter in each.parameters():
            parameter.data.mul_(0.9)
    with torch.inference_mode():
        same({"": model(x)}, {"": single(x)})


@check_each(FORMS)
def first_version(form):
    """``FullyShardedDataParallel`` (FSDP1), whose parameters are views of a flat one; it needs ``use_orig_params``,
    because some parameters have no gradient."""
    blocks = {type(block) for block in fast(form).blocks}
    model = FullyShardedDataParallel(
        fast(form),
        auto_wrap_policy=ModuleWrapPolicy(blocks),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    results = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        loss = loss_of(model, mine(batch(step=step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        results.append(mean / dist.get_world_size())
    single = original()
    optimizer = torch.optim.SGD(single.parameters(), lr=0.05)
    for step in range(3):
        loss = loss_of(single, batch(step=step))
        torch.testing.assert_close(results[step], loss.detach(), rtol=1e-12, atol=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(model):
        same(parameters(model), parameters(single))


@check
def hybrid_mesh():
    """Two mesh dimensions: replicated over one, sharded over the other (HSDP)."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    model = sharded(fast(), mesh=mesh)
    assert isinstance(next(model.parameters()), DTensor) and isinstance(model, nn.Module)
    same_training(together(model), alone())
