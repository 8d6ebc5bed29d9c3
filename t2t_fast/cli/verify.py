"""``t2t-fast verify``."""

import argparse

from ..testing import CASES
from ..verification import MODEL, VerifyReport, verify
from .common import Progress, UsageError, choose_device


def run(options: argparse.Namespace) -> int:
    """Print the table and a block to paste into a bug report; 1 if a comparison failed."""
    known = [*CASES, MODEL]
    unknown = [name for name in options.op or () if name not in known]
    if unknown:
        raise UsageError(f"--op must be one of {', '.join(known)}, got {unknown[0]!r}")
    device = choose_device(options.device)
    with Progress(quiet=True) as progress:
        report = VerifyReport.merged(
            verify(op, dtypes=options.dtype, backends=options.backend, device=device, progress=progress.at)
            for op in options.op or [None]
        )
    print(f"{report}\n\nTo paste into a bug report:\n\n{report.paste()}")
    return 0 if report.ok else 1
