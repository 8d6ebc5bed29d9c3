"""``t2t-fast export``."""

import argparse

from ..models import list_models
from .common import CommandError, UsageError, existing_file


def run(options: argparse.Namespace) -> int:
    """Write the files and print their table."""
    from ..interop.create import create_model
    from ..interop.export import export_model

    if options.model not in list_models():
        raise UsageError(f"unknown model {options.model!r}; known are {', '.join(list_models())}")
    if len(options.img_size) > 2:
        raise UsageError(f"--img-size takes a side or H W, got {len(options.img_size)} numbers")
    checkpoint = existing_file("--checkpoint", options.checkpoint)
    size, channels = (options.img_size[0], options.img_size[-1]), options.in_chans
    formats = ("onnx", "program") if options.format == "both" else (options.format,)
    try:
        model = create_model(
            options.model, img_size=size, in_chans=channels, num_classes=options.num_classes, checkpoint=checkpoint
        )
        report = export_model(
            model.eval(),
            options.out,
            name=options.name or options.model,
            img_size=size,
            in_chans=channels,
            batch=options.batch,
            dynamic_batch=options.dynamic_batch,
            formats=formats,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise CommandError(str(error)) from error
    print(report)
    if checkpoint is None:
        print("The weights are random; use --checkpoint to export a trained model.")
    return 0
