"""The flow of timm's training script, made of timm's pieces: loader, mixup, AMP, EMA, layer decay, saving, resuming."""

import pytest
import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad

import t2t_fast.timm  # noqa: F401

CLASSES = 3
OPTIONS = dict(num_classes=CLASSES, img_size=32, embed_dim=24, depth=2, num_heads=3, token_dim=16, drop_path_rate=0.1)


@pytest.fixture
def folder(tmp_path):
    """Six images of three colours, as a folder of classes."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for index in range(CLASSES):
        place = tmp_path / "images" / f"class{index}"
        place.mkdir(parents=True)
        for copy in range(2):
            colour = [60 + 20 * copy] * 3
            colour[index] = 220
            image.new("RGB", (40, 36), tuple(colour)).save(place / f"{copy}.png")
    return tmp_path / "images"


def prepared(folder):
    """Model, loader and what else a run needs."""
    torch.manual_seed(0)
    model = timm.create_model("t2t_vit_7", **OPTIONS)
    model.set_grad_checkpointing()
    data = resolve_data_config({"img_size": 32}, model=model)
    loader = create_loader(
        create_dataset("", root=folder, split="train"), batch_size=6, is_training=True, use_prefetcher=False,
        num_workers=0, device=torch.device("cpu"), input_size=data["input_size"], mean=data["mean"], std=data["std"],
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.7)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=0)
    return model, ModelEmaV3(model, decay=0.9), loader, optimizer, scheduler, NativeScaler(device="cpu")


def epoch(run, number):
    model, ema, loader, optimizer, scheduler, scaler = run
    mixup, loss = Mixup(0.2, 0.5, num_classes=CLASSES), SoftTargetCrossEntropy()
    model.train()
    losses = []
    for images, labels in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, targets = mixup(images, labels)
            value = loss(model(images), targets)
        optimizer.zero_grad()
        scaler(value, optimizer, clip_grad=1.0, parameters=model.parameters())
        dispatch_clip_grad(model.parameters(), 1.0)
        ema.update(model)
        losses.append(value.item())
    scheduler.step(number + 1)
    return losses


def test_training_saving_resuming_and_averaged_weights(folder, tmp_path):
    run = prepared(folder)
    model, ema, _, optimizer, _, scaler = run
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = dict(model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver = CheckpointSaver(model, optimizer, **options)
    for number in range(2):
        assert all(value == value for value in epoch(run, number))
        saver.save_checkpoint(number, metric=1.0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    rates = {round(group["lr"] / group["lr_scale"], 9) for group in optimizer.param_groups}
    assert len(rates) == 1 and len({group["lr_scale"] for group in optimizer.param_groups}) == 4

    other = prepared(folder)
    assert resume_checkpoint(other[0], tmp_path / "last.pth.tar", other[3], other[5]) == 2
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other[0].state_dict().items())
    assert len(other[3].state_dict()["state"]) == len(moved)
    assert epoch(other, 2)

    averaged = timm.create_model("t2t_vit_7", **OPTIONS)
    load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert torch.equal(averaged.head.weight, ema.module.head.weight) and not torch.equal(
        averaged.head.weight, model.head.weight
    )
