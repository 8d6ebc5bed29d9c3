"""``t2t-fast export``."""

from pathlib import Path

from ..models import list_models
from .common import CommandError, UsageError


def run(options):
    """Write the files and print what they are."""
    from ..interop.create import create_model
    from ..interop.export import export_model

    if options.model not in list_models():
        raise UsageError(f"unknown model {options.model!r}; known are {', '.join(list_models())}")
    if len(options.img_size) > 2:
        raise UsageError(f"--img-size takes a side or H W, got {len(options.img_size)} numbers")
    if options.checkpoint is not None and not Path(options.checkpoint).is_file():
        raise UsageError(f"--checkpoint: there is no file {options.checkpoint}")
    height, width = options.img_size[0], options.img_size[-1]
    formats = ("onnx", "program") if options.format == "both" else (options.format,)
    try:
        model = create_model(
            options.model,
            img_size=(height, width),
            in_chans=options.in_chans,
            num_classes=options.num_classes,
            checkpoint=options.checkpoint,
        )
        report = export_model(
            model.eval(),
            options.out,
            name=options.name or options.model,
            img_size=(height, width),
            in_chans=options.in_chans,
            batch=options.batch,
            dynamic_batch=options.dynamic_batch,
            formats=formats,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise CommandError(str(error)) from error
    print(report)
    if options.checkpoint is None:
        print("The weights are random: give --checkpoint to export a trained model.")
    return 0
