"""``t2t-fast convert``."""

import argparse

from .common import CommandError, UsageError


def run(options: argparse.Namespace) -> int:
    """Write the file and print the report."""
    from ..interop.checkpoints import convert_checkpoint

    given = {}
    if options.img_size is not None:
        if len(options.img_size) > 2:
            raise UsageError(f"--img-size takes a side or H W, got {len(options.img_size)} numbers")
        given["img_size"] = (options.img_size[0], options.img_size[-1])
    if options.qk_scale is not None:
        given["qk_scale"] = options.qk_scale
    try:
        report = convert_checkpoint(
            options.source,
            options.target,
            to=options.to,
            model=options.model,
            head=not options.no_head,
            use_ema=not options.no_ema,
            trained_with=options.trained_with,
            rescale=not options.no_rescale,
            overwrite=options.overwrite,
            **given,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    print(report)
    return 0
