"""What the subcommands share: expected errors, progress, the device, optional packages."""

import importlib
import sys


class CommandError(Exception):
    """Something failed in a way that one line explains; exit code 1."""

    code = 1


class UsageError(CommandError):
    """The arguments make no sense; exit code 2."""

    code = 2


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal, a plain line per step elsewhere."""

    def __init__(self, total, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.total, self.done, self.text = total, 0, ""

    def step(self, text):
        """The next of ``total`` steps begins."""
        self.done, self.text = self.done + 1, text
        self._show("" if self.live else "\n")

    def detail(self, text):
        """Where the present step is; shown on a terminal only."""
        if self.live:
            self._show("", f": {text}")

    def _show(self, end, detail=""):
        line = f"[{self.done:{len(str(self.total))}}/{self.total}] {self.text}{detail}"
        self.stream.write(f"\r\x1b[2K{line[:110]}{end}" if self.live else f"{line}{end}")
        self.stream.flush()

    def close(self):
        """Remove the line."""
        if self.live:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()


def choose_device(name):
    """The ``torch.device`` of "auto", "cpu" or "cuda"."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this PyTorch finds no CUDA device (t2t-fast env says more)")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def require(extra, *modules):
    """Raise unless the optional modules of an extra can be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CommandError(f"this needs {name} ({error}): pip install 't2t_fast[{extra}]'") from error
