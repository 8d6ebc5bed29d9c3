"""``t2t-fast export``."""

import argparse

from ..models import list_models
from .common import CommandError, Progress, UsageError, existing_file

BOTH = ("onnx", "program")


def run(options: argparse.Namespace) -> int:
    """Write the files and print their table."""
    from ..interop.create import create_model
    from ..interop.export import export_model
    from ..interop.export.triton import PLATFORMS, write_triton_repository

    if options.model not in list_models():
        raise UsageError(f"unknown model {options.model!r}; known are {', '.join(list_models())}")
    if len(options.img_size) > 2:
        raise UsageError(f"--img-size takes a side or H W, got {len(options.img_size)} numbers")
    checkpoint = existing_file("--checkpoint", options.checkpoint)
    size, channels = (options.img_size[0], options.img_size[-1]), options.in_chans
    chosen = options.format or ["both"]
    formats = tuple(dict.fromkeys(each for name in chosen for each in (BOTH if name == "both" else (name,))))
    if options.triton_repository is not None and not set(formats) & set(PLATFORMS):
        raise UsageError(f"--triton-repository needs --format {', '.join(PLATFORMS)}, got {', '.join(formats)}")
    try:
        model = create_model(
            options.model, img_size=size, in_chans=channels, num_classes=options.num_classes, checkpoint=checkpoint
        )
        with Progress(1 + 2 * len(formats)) as progress:
            report = export_model(
                model.eval(),
                options.out,
                name=options.name or options.model,
                img_size=size,
                in_chans=channels,
                batch=options.batch,
                dynamic_batch=options.dynamic_batch,
                dynamic_size=options.dynamic_size,
                formats=formats,
                progress=progress.step,
            )
        print(report)
        if options.triton_repository is not None:
            print(f"Triton's model is in {write_triton_repository(report, options.triton_repository)}")
    except (ValueError, RuntimeError, ImportError) as error:
        raise CommandError(str(error)) from error
    if checkpoint is None:
        print("The weights are random; use --checkpoint to export a trained model.")
    return 0
