"""Data sets of ``train.py``: image folders, CIFAR and scikit-learn's digits, with reproducible augmentation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import Dataset
from torchvision import datasets, transforms

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
STATISTICS = {
    "folder": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "digits": ((0.5,) * 3, (0.5,) * 3),
}
"""Data set -> mean and standard deviation that images are normalised with."""
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


class DataError(ValueError):
    """The data is not where it should be, or does not have the expected classes."""


def seed_everything(*position: int) -> None:
    """Seed Python, NumPy and PyTorch with a function of a position in the run, such as (seed, update, process).

    Random numbers then depend on where a run is and not on what it drew before, so that they are the same after a
    resume, with any number of loader processes.
    """
    set_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))


class Augmented(Dataset):
    """Images with a random transform whose random numbers depend on (seed, epoch, index) only."""

    def __init__(self, images: Dataset, transform: Callable[[Image.Image], torch.Tensor], seed: int) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        number = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)
        torch.default_generator.manual_seed(number)  # not the GPU's: this also runs in loader processes
        return self.transform(image), label


class Digits(Dataset):
    """scikit-learn's 1797 handwritten digits (8 x 8 pixels): 1437 for training, 360 for validation, stratified."""

    def __init__(self, train: bool, transform: Callable[[Image.Image], Any] | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
        images, labels = parts[0::2] if train else parts[1::2], parts[2::2] if train else parts[3::2]
        self.images, self.labels = np.round(images[0] * (255 / 16)).astype(np.uint8), labels[0]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.labels[index])


@dataclass
class Data:
    """Training and validation images, and the number of classes."""

    train: Augmented
    val: Dataset
    classes: int


def check_data(args: Any) -> None:
    """Raise :class:`DataError` if the folders of ``--data`` are missing; nothing is read or downloaded."""
    if args.dataset == "digits":
        return
    if args.data is None:
        raise DataError(f"--dataset {args.dataset} needs --data DIR")
    wanted = [Path(args.data) / part for part in ("train", "val")] if args.dataset == "folder" else [Path(args.data)]
    for folder in wanted:
        if not folder.is_dir() and not (args.download and args.dataset != "folder"):
            layout = " (expected DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE)" if args.dataset == "folder" else ""
            raise DataError(f"--data: there is no folder {folder}{layout}")


def train_transform(args: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Any]:
    """``--aug imagenet``: timm's; ``crop``: resized, padded by 1/8, cropped and flipped; ``none``: resized."""
    size = args.img_size
    if args.aug == "imagenet":
        return create_transform(
            size,
            is_training=True,
            scale=args.scale,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation="random",
            mean=mean,
            std=std,
            re_prob=args.reprob,
            re_mode="pixel",
        )
    crop = [transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip(args.hflip)]
    steps = [transforms.Resize((size, size)), *(crop if args.aug == "crop" else [])]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def load_data(args: Any) -> Data:
    """The data set that the arguments of ``train.py`` name.

    Raises:
        DataError: a folder is missing, train and val have different classes, or ``--num-classes`` is not their number.
    """
    check_data(args)
    mean, std = STATISTICS[args.dataset]
    if args.aug == "imagenet":
        plain = create_transform(
            args.img_size, is_training=False, crop_pct=args.crop_pct, interpolation="bicubic", mean=mean, std=std
        )
    else:
        plain = transforms.Compose(
            [
                transforms.Resize((args.img_size, args.img_size)),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
    if args.dataset == "digits":
        train, val = Digits(train=True), Digits(train=False, transform=plain)
    elif args.dataset == "folder":
        train, val = (open_folder(Path(args.data) / part) for part in ("train", "val"))
        if train.classes != val.classes:
            different = sorted(set(train.classes) ^ set(val.classes))
            raise DataError(
                f"--data: train has {len(train.classes)} classes and val {len(val.classes)}; they must have the same "
                f"folders, but these are in one only: {', '.join(different[:5])}"
            )
        val.transform = plain
    else:
        cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.dataset]
        try:
            train = cls(args.data, train=True, download=args.download)
            val = cls(args.data, train=False, transform=plain)
        except RuntimeError as error:
            raise DataError(f"--data: no {args.dataset} in {args.data}; give --download to fetch it") from error
    classes = CLASSES.get(args.dataset) or len(train.classes)
    if args.num_classes not in (None, classes):
        raise DataError(f"--num-classes: the data has {classes} classes, got {args.num_classes}")
    return Data(Augmented(train, train_transform(args, mean, std), args.seed), val, classes)


def open_folder(folder: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"--data: {error}") from error
