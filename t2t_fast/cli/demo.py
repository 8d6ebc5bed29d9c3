"""``t2t-fast demo``."""

import argparse
from pathlib import Path

from .common import Progress, UsageError, choose_device, existing_file, require


def run(options: argparse.Namespace) -> int:
    """Make the report and print its summary; 1 if the logits differ."""
    require("demo", "jinja2", "matplotlib", "PIL")
    from ..demo import page
    from ..demo.run import MODELS, Settings, make_report

    if options.model not in MODELS:
        raise UsageError(f"--model must be one of {', '.join(MODELS)}, got {options.model!r}")
    if options.img_size % 16 or options.img_size < 32:
        raise UsageError(f"--img-size must be a multiple of 16 and at least 32, got {options.img_size}")
    device = choose_device(options.device)
    settings = Settings(
        model=options.model,
        img_size=options.img_size,
        device=device,
        batch=options.batch or (64 if device.type == "cuda" else 4),
        seconds=options.seconds,
        compile=not options.no_compile,
        photo=existing_file("--photo", options.photo),
        checkpoint=existing_file("--checkpoint", options.checkpoint),
    )
    with Progress() as progress:
        data, path = make_report(settings, Path(options.out), progress)
    print(f"{page.summary(data)}\n\nreport: {path}")
    return 0 if data["parity"]["ok"] else 1
