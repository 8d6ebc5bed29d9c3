"""What the subcommands share: errors, progress, the device, optional packages."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import CommandError

if TYPE_CHECKING:
    import torch


class UsageError(CommandError):
    """The arguments are invalid; exit code 2."""

    code = 2


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal; elsewhere one line per step, none if ``quiet``."""

    def __init__(self, total: int = 0, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.quiet = quiet and not self.live
        self.total, self.done, self.text = total, 0, ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def step(self, text: str) -> None:
        """The next of ``total`` steps begins."""
        self.at(self.done + 1, self.total, text)

    def at(self, done: int, total: int, text: str) -> None:
        """Step ``done`` of ``total``."""
        self.done, self.total, self.text = done, total, text
        self._show("" if self.live else "\n")

    def detail(self, text: str) -> None:
        """A detail of the current step; shown on a terminal only."""
        if self.live:
            self._show("", f": {text}")

    def _show(self, end: str, detail: str = "") -> None:
        if self.quiet:
            return
        line = f"[{self.done:{len(str(self.total))}}/{self.total}] {self.text}{detail}"
        self.stream.write(f"\r\x1b[2K{line[:110]}{end}" if self.live else f"{line}{end}")
        self.stream.flush()

    def close(self) -> None:
        """Remove the line."""
        if self.live:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()


def choose_device(name: str) -> "torch.device":
    """The ``torch.device`` of "auto", "cpu" or "cuda"."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch finds no CUDA device (see t2t-fast env)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def existing_file(option: str, path: str | None) -> str | None:
    """``path``, if it is ``None`` or a file."""
    if path is not None and not Path(path).is_file():
        raise UsageError(f"{option}: there is no file {path}")
    return path


def require(extra: str, *modules: str) -> None:
    """Raise unless the optional modules of an extra can be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CommandError(f"this command needs {name} ({error}): pip install 't2t_fast[{extra}]'") from error
