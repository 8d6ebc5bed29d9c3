"""The command ``t2t-fast``: demo, verify, env, bench, export. A subcommand's dependencies are imported when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__, backends
from ..errors import BackendUnavailable, CheckpointError, NothingToSwap
from . import arguments
from .common import CommandError, UsageError

EXPECTED = (CommandError, BackendUnavailable, CheckpointError, NothingToSwap, OSError)
"""Errors whose text is the whole message; any other is a bug and shows its traceback."""

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        0 for success; 1 where something failed (a comparison, a missing package, an unreadable file); 2 for bad usage.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    try:
        options, rest = parser.parse_known_args(given)
        if rest and options.command != "bench":  # the benchmark suite parses its own options
            options.parser.error(f"unknown arguments: {' '.join(rest)}")
        if options.command is None:
            parser.print_help()
            return 2
        problem = backends.problem()
        if problem is not None and options.command != "env":  # env shows it
            raise UsageError(problem)
        options.rest = rest
        return arguments.run(options)
    except SystemExit as stop:  # of argparse; a caller of main gets the code instead
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("t2t-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe is gone; avoid a second error at the interpreter's exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        print(f"t2t-fast: error: {error}", file=sys.stderr)
        return int(getattr(error, "code", 1))


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and its subcommands."""
    parser = _Parser(
        prog="t2t-fast",
        description="Fused soft split and Performer for T2T-ViT models: demo, verification, benchmarks, export.",
    )
    parser.add_argument("--version", action="version", version=f"t2t-fast {__version__}")
    parser.set_defaults(command=None, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, (summary, add) in arguments.COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        add(command)
        command.set_defaults(command=name, parser=command)
    return parser
