"""Train or fine-tune the models of t2t_fast on image folders, CIFAR or scikit-learn's digits.

accelerate provides devices, mixed precision, several processes, FSDP2, checkpoints and trackers; timm the transforms,
mixup, averaged weights, optimizers and schedules. docs/training.md describes the use, ``recipes/`` has arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, PartialState, skip_first_batches
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    set_seed,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training_data import STATISTICS, DataError, check_data, load_data, seed_everything
from training_run import Average, CsvTracker, Progress, Run, RunError

import t2t_fast
from t2t_fast import reference


class ArgumentError(ValueError):
    """An argument has a bad value; the text is the whole message."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; names and defaults are those of upstream's main.py where it has the argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group
    add = group("data").add_argument
    add("--config", metavar="FILE", help="YAML file with arguments; those of the command line come first")
    add("--dataset", choices=list(STATISTICS), default="folder", help="folder: DIR/train/CLASS/..., DIR/val/CLASS/...")
    add("--data", metavar="DIR", help="folder of the data")
    add("--download", action=flag, default=False, help="download CIFAR into DIR")
    add("--img-size", type=int, default=224)
    add("--num-classes", type=int, help="checked against the data")
    add("--workers", type=int, default=4, help="loader processes per training process")
    add = group("model").add_argument
    add("--model", default="t2t_vit_14", help="a name of t2t_fast.list_models()")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE", help="of the model's class")
    add("--drop-path", type=float, default=0.1)
    add("--checkpoint", metavar="FILE", help="start from these weights; another class count gets a new head")
    add("--reference", action=flag, default=False, help="train upstream's unfused model, for comparison")
    add("--eval", action=flag, default=False, help="validate --checkpoint and stop")
    add = group("optimizer and schedule").add_argument
    add("--batch-size", type=int, default=64, help="images per process and forward pass")
    add("--grad-accum-steps", type=int, default=1, help="forward passes per update")
    add("--opt", default="adamw", help="a name of timm.optim.list_optimizers()")
    add("--lr", type=float, default=5e-4)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, help="largest norm of the gradient")
    add("--backbone-lr-scale", type=float, help="learning rate of everything but the head, as a share of --lr")
    add("--epochs", type=int, default=300, help="without the cooldown")
    add("--warmup-epochs", type=int, default=10)
    add("--cooldown-epochs", type=int, default=10, help="at --min-lr after the others")
    add("--warmup-lr", type=float, default=1e-6)
    add("--min-lr", type=float, default=1e-5)
    add("--sched-on-updates", action=flag, default=False, help="change the learning rate at each update, not epoch")
    add = group("augmentation").add_argument
    add("--aug", choices=("imagenet", "crop", "none"), default="imagenet", help="crop: padded crop and flip")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of random crops")
    add("--hflip", type=float, default=0.5)
    add("--color-jitter", type=float, default=0.4)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment or RandAugment policy")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--crop-pct", type=float, default=0.9, help="validation: image size / resized size")
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--smoothing", type=float, default=0.1)
    add("--model-ema", action=flag, default=True)
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-warmup", action=flag, default=False, help="a smaller decay at the beginning")
    add = group("run").add_argument
    add("--amp", choices=("no", "bf16", "fp16"), default="no")
    add("--fsdp", action=flag, default=False, help="shard the model by FSDP2 instead of DDP")
    add("--cpu", action=flag, default=False, help="do not use a GPU")
    add("--seed", type=int, default=42)
    add("--output", metavar="DIR", default="output")
    add("--resume", action=flag, default=False, help="continue the run in --output from its last checkpoint")
    add("--checkpoint-every", type=int, default=0, metavar="N", help="updates; a checkpoint is always made per epoch")
    add("--log-every", type=int, default=10, metavar="N", help="updates")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of ``--config`` and the command line. A config is checked as if it were written on the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    return parser.parse_args([*(config_arguments(parser, config) if config else []), *argv])


def config_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """``lr: 5e-4`` becomes ``--lr 5e-4``, ``model-ema: false`` ``--no-model-ema``, a mapping ``name=value`` words."""
    try:
        with open(path) as file:
            entries = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config: {error}")
    if not isinstance(entries, dict):
        parser.error(f"--config: {path} must be a mapping of arguments, got {type(entries).__name__}")
    words: list[str] = []
    for name, value in entries.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
            words += [f"--{name}", *map(str, values if isinstance(values, list) else [values])]
    return words


def check_arguments(args: argparse.Namespace, device: torch.device, processes: int) -> None:
    """Raise :class:`ArgumentError` or :class:`DataError` for anything that can be known before data is read."""
    for name in ("img_size", "batch_size", "grad_accum_steps", "epochs", "log_every"):
        if getattr(args, name) < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.model not in t2t_fast.list_models():
        raise ArgumentError(f"--model must be one of {', '.join(t2t_fast.list_models())}, got {args.model}")
    if args.reference and not hasattr(reference, args.model):
        raise ArgumentError(f"--reference: upstream has no {args.model}")
    if args.opt not in list_optimizers():
        raise ArgumentError(f"--opt must be one of timm.optim.list_optimizers(), got {args.opt}")
    if args.amp == "fp16" and device.type == "cpu":
        raise ArgumentError("--amp fp16 needs a GPU, and this run is on a CPU; use --amp bf16")
    if args.fsdp and processes == 1:
        raise ArgumentError("--fsdp needs several processes; start them with torchrun or accelerate launch")
    if args.seed < 0:
        raise ArgumentError(f"--seed must be at least 0, got {args.seed}")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise ArgumentError(f"--checkpoint: there is no file {args.checkpoint}")
    if args.eval and not args.checkpoint:
        raise ArgumentError("--eval needs --checkpoint FILE")
    if (args.mixup or args.cutmix) and args.batch_size * args.grad_accum_steps % 2:
        raise ArgumentError(f"--mixup and --cutmix need an even --batch-size, got {args.batch_size}")
    check_data(args)


def make_accelerator(args: argparse.Namespace, model: nn.Module, run: Run, progress: Progress) -> Accelerator:
    """accelerate for these arguments; with ``--fsdp`` each block of the model is a unit."""
    plugin = None
    if args.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in model.blocks}),
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        mixed_precision=args.amp,
        cpu=args.cpu,
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.grad_accum_steps, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=["tensorboard", CsvTracker(run.folder, progress)],
        project_config=ProjectConfiguration(project_dir=str(run.folder)),
        step_scheduler_with_optimizer=False,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate ignores its FSDP plugin on a CPU, although FSDP2 runs there
        if args.amp != "no":
            plugin.set_mixed_precision(args.amp)
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model, or with ``--reference`` upstream's with the same weights."""
    options = {"img_size": args.img_size, "num_classes": classes, "drop_path_rate": args.drop_path, **args.model_kwargs}
    model = t2t_fast.create_model(args.model, checkpoint=args.checkpoint, **options)
    if args.reference:
        unfused = getattr(reference, args.model)(**options)
        unfused.load_state_dict(model.state_dict())
        return unfused
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; with ``--backbone-lr-scale`` the head and the rest are two groups."""

    def head_and_rest(model: nn.Module) -> list[dict[str, Any]]:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        head, rest = ([p for name, p in trained if name.startswith("head.") == wanted] for wanted in (True, False))
        return [{"params": rest, "lr_scale": args.backbone_lr_scale}, {"params": head}]

    groups = head_and_rest if args.backbone_lr_scale is not None else None
    return create_optimizer_v2(
        model, args.opt, args.lr, args.weight_decay, momentum=args.momentum, param_group_fn=groups
    )


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any, table: str) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent over all processes, as ``{table}/loss`` and so on."""
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, 100 * hits[:, 0].sum(), 100 * hits.sum(), loss.new_tensor(len(labels))])
    loss, top1, top5, count = sums.tolist()
    return {f"{table}/loss": loss / count, f"{table}/top1": top1 / count, f"{table}/top5": top5 / count}


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say. Returns the last validation's figures."""
    state = PartialState(cpu=args.cpu)
    check_arguments(args, state.device, state.num_processes)
    run, progress = Run(args, state.num_processes), Progress()
    data = load_data(args)
    set_seed(args.seed)
    try:
        model = make_model(args, data.classes)
    except (TypeError, ValueError) as error:  # the message begins with the function
        raise ArgumentError(f"the model cannot be made: {error}") from error
    accelerator = make_accelerator(args, model, run, progress)
    model.to(accelerator.device)
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    optimizer = make_optimizer(args, model)

    # one batch is one update, so that a run can stop and continue between any two batches
    loading = dict(num_workers=args.workers, pin_memory=accelerator.device.type == "cuda")
    size = args.batch_size * args.grad_accum_steps
    loader = DataLoader(data.train, size, shuffle=True, drop_last=True, **loading)
    val_loader = DataLoader(data.val, args.batch_size, **loading)
    updates = len(loader) // accelerator.num_processes
    if updates == 0:
        raise ArgumentError(
            f"--batch-size: {len(data.train)} training images are fewer than an update's "
            f"{size * accelerator.num_processes} (batch size x accumulation steps x processes)"
        )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        "cosine",
        args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        cooldown_epochs=args.cooldown_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates,
    )
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            label_smoothing=args.smoothing,
            num_classes=data.classes,
        )
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing)

    plain = model
    model, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, loader, val_loader)
    if ema and args.fsdp:
        fsdp2_prepare_model(accelerator, ema.module)
    if args.eval:
        figures = evaluate(accelerator, model, val_loader, "val")
        accelerator.print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        return figures
    accelerator.register_for_checkpointing(progress, *([Average(ema.module)] if ema else []))
    if args.resume and run.checkpoints():
        accelerator.load_state(str(run.checkpoints()[-1]))
        accelerator.print(f"resumed after update {progress.update} of {epochs * updates}")
    if accelerator.is_main_process:
        run.write_arguments()
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": progress.update + 1}})

    def update(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One optimizer update. Returns this process's loss."""
        total = torch.zeros((), device=accelerator.device)
        parts = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
        for part, target in parts:
            with accelerator.accumulate(model):
                loss = criterion(model(part).float(), target)
                accelerator.backward(loss)
                if args.clip_grad and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach() / args.grad_accum_steps
        return total

    def train_epoch(epoch: int) -> None:
        """The rest of an epoch."""
        data.train.set_epoch(epoch)
        loader.set_epoch(epoch)
        model.train()
        scheduler.step(epoch)  # does nothing with --sched-on-updates
        done = progress.update - epoch * updates
        for images, labels in skip_first_batches(loader, done) if done else loader:
            scheduler.step_update(progress.update)
            seed_everything(args.seed, progress.update, accelerator.process_index)
            if mixup:
                images, labels = mixup(images, labels)
            rate = max(group["lr"] for group in optimizer.param_groups)
            loss = update(images, labels)
            progress.update += 1
            if ema:
                ema.update(plain, progress.update)
            bar.update()
            if progress.update % args.log_every == 0:
                loss = accelerator.reduce(loss, "mean").item()
                if not math.isfinite(loss):
                    raise RunError(f"the loss is {loss} at update {progress.update}; try a smaller --lr or --amp no")
                bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", top1=f"{max(progress.best, 0):.2f}")
                accelerator.log({"train/loss": loss, "train/lr": rate}, step=progress.update)
            within = progress.update % updates
            if args.checkpoint_every and within and progress.update % args.checkpoint_every == 0:
                run.save(accelerator, progress.update)

    def finish_epoch(epoch: int) -> dict[str, float]:
        """Validate, log, and save weights and a checkpoint."""
        figures = evaluate(accelerator, model, val_loader, "val")
        if ema:
            figures |= evaluate(accelerator, ema.module, val_loader, "ema")
        top1 = figures["ema/top1" if ema else "val/top1"]
        accelerator.log(figures, step=progress.update)
        names = ["last.pth", *(["best.pth"] if top1 > progress.best else [])]
        weights = {"arch": args.model, "epoch": epoch, "top1": top1, "state_dict": accelerator.get_state_dict(model)}
        if ema:
            weights["state_dict_ema"] = Average(ema.module).state_dict()
        run.save_weights(accelerator, weights, *names)
        progress.best = max(progress.best, top1)
        run.save(accelerator, progress.update)
        return figures

    figures: dict[str, float] = {}
    with tqdm(
        total=epochs * updates, initial=progress.update, unit="update", disable=not accelerator.is_main_process
    ) as bar:
        for epoch in range(progress.update // updates, epochs):
            train_epoch(epoch)
            figures = finish_epoch(epoch)
    accelerator.print(f"best top-1 accuracy: {progress.best:.2f} %")
    accelerator.end_training()
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0; 2 for bad arguments or data, with a message."""
    args = parse(argv)
    try:
        train(args)
    except (ArgumentError, DataError, RunError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
