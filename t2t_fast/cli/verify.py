"""``t2t-fast verify``."""

from ..testing import CASES
from ..verification import MODEL, VerifyReport, verify
from .common import Progress, UsageError, choose_device


def run(options):
    """Print the table and a block to paste into a bug report; 1 if a comparison failed."""
    known = [*CASES, MODEL]
    unknown = [name for name in options.op or () if name not in known]
    if unknown:
        raise UsageError(f"--op must be one of {', '.join(known)}, got {unknown[0]!r}")
    device = choose_device(options.device)
    progress = _Steps()
    try:
        reports = [
            verify(op, dtypes=options.dtype, backends=options.backend, device=device, progress=progress)
            for op in options.op or [None]
        ]
    finally:
        progress.close()
    report = VerifyReport(
        tuple(row for each in reports for row in each.rows),
        reports[0].environment,
        sum(each.seconds for each in reports),
    )
    print(report)
    print("\nTo paste into a bug report:\n")
    print(report.paste())
    return 0 if report.ok else 1


class _Steps:
    """``verify``'s progress on a terminal; elsewhere the table alone is enough."""

    def __init__(self):
        self.line = None

    def __call__(self, done, total, what):
        if self.line is None:
            self.line = Progress(total)
        self.line.done, self.line.total, self.line.text = done, total, "verify"
        self.line.detail(what)

    def close(self):
        if self.line is not None:
            self.line.close()
