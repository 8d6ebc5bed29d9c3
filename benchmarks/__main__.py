"""Run the suites: ``python -m benchmarks [--quick] [--out DIR] [--filter WORDS] [--device cpu|cuda]``.

Writes into the folder: ``raw.json`` (pytest-benchmark), ``rows.json`` (normalised, grows row by row), ``table.md``,
``chart.png``, ``chart-operators.png``, and with rows of several lengths of attention ``crossover.png``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("test_module.py", "test_models.py", "test_ops.py")
"""In the order in which they run: what matters most first, for runs with a time limit."""


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the headline rows, a few minutes on two CPU cores")
    parser.add_argument("--out", type=Path, help="folder for the results; by default .benchmarks/<date-machine-commit>")
    parser.add_argument("--filter", help='rows whose name fits, as pytest\'s -k: "module and performer and not 384px"')
    parser.add_argument("--device", choices=("cpu", "cuda"), help='by default "cuda" if there is a GPU')
    parser.add_argument("--max-seconds", type=float, help="start no new group of rows after so many seconds")
    return parser.parse_args(argv)


def suite_command(arguments, out):
    """The pytest command of a run."""
    command = [sys.executable, "-m", "pytest", *(str(Path("benchmarks", name)) for name in SUITES)]
    # the project's own options are for its tests
    command += ["-q", "--no-header", "-o", "addopts=", "-o", "console_output_style=classic", "-p", "no:cacheprovider"]
    command += ["--benchmark-quiet", f"--benchmark-json={out / 'raw.json'}", f"--bench-rows={out / 'rows.json'}"]
    command += [f"--bench-device={arguments.device}"]
    if arguments.quick:
        command += ["--bench-quick"]
    if arguments.max_seconds is not None:
        command += [f"--bench-seconds={arguments.max_seconds}"]
    if arguments.filter:
        command += ["-k", arguments.filter]
    return command


def run_suites(arguments, out):
    """Run pytest with an empty Inductor cache, so that "first call" means what it says. Returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="t2t-fast-bench-") as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        return subprocess.run(suite_command(arguments, out), cwd=ROOT, env=environment).returncode


def main(argv=None):
    """Run the suites and write the report. Returns 0, or pytest's exit code if a row failed or none was selected."""
    arguments = parse(argv)
    import torch

    from . import machine, report
    from .goals import judge

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks: --device cuda needs a GPU, torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    out = (arguments.out or ROOT / ".benchmarks" / machine.run_name(arguments.device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.json"
    rows.unlink(missing_ok=True)
    code = run_suites(arguments, out)
    if not rows.exists():
        print("python -m benchmarks: no row was measured", file=sys.stderr)
        return code or 1
    written = report.write(rows, out)
    _, found, _ = report.read(rows)
    for goal in judge(found):
        print(f"{goal.verdict:11}  {goal.measured:24}  wanted {goal.wanted:6}  {goal.what}")
    for path in (rows, *written):
        print(path)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
