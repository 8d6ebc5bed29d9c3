"""The output folder of a run of ``train.py``: its arguments, checkpoints, weights and CSV logs.

Files appear under their final names only when they are complete, so a run may be killed at any time.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

MAY_CHANGE = {"resume", "output", "data", "workers", "checkpoint_every", "download", "cpu", "config"}
"""Arguments that may differ when a run is resumed: they do not change its results."""


class RunError(ValueError):
    """The run cannot start, continue or go on; the text is the whole message."""


class Progress:
    """What a checkpoint keeps besides model, optimizer and scaler."""

    def __init__(self) -> None:
        self.update = 0  # optimizer updates so far
        self.best = -1.0  # best validation accuracy so far

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Average:
    """The state of averaged weights, complete in one file also where FSDP2 shards them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True))


class CsvTracker(GeneralTracker):
    """Writes ``train/loss`` to a column ``loss`` of ``train.csv``, and so on; floats have all their digits."""

    name = "csv"
    requires_logging_directory = False

    def __init__(self, folder: Path, progress: Progress) -> None:
        super().__init__()
        self.folder, self.progress = folder, progress

    @on_main_process
    def start(self) -> None:
        """Remove the rows that a killed run wrote after its last checkpoint."""
        for path in self.folder.glob("*.csv"):
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            kept = [row for row in rows[1:] if int(row[0] or 0) <= self.progress.update]
            if kept:
                write_atomically(path, lambda part, rows=(rows[0], *kept): self._write(part, rows))
            else:
                path.unlink()

    @property
    def tracker(self) -> Path:
        return self.folder

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The arguments are in ``arguments.json``."""

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        for table in dict.fromkeys(key.partition("/")[0] for key in values):
            row = {key.partition("/")[2]: repr(value) for key, value in values.items() if key.startswith(f"{table}/")}
            path = self.folder / f"{table}.csv"
            header = [] if path.exists() else [["update", *row]]
            with path.open("a", newline="") as file:
                csv.writer(file).writerows([*header, [step, *row.values()]])

    @staticmethod
    def _write(path: Path, rows: Any) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename it."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


class Run:
    """The output folder: ``arguments.json``, ``checkpoint-N/``, ``last.pth``, ``best.pth``, logs."""

    def __init__(self, args: Any, processes: int) -> None:
        """Raises :class:`RunError` if the folder has a run and ``--resume`` is not given, or it is another run."""
        self.folder = Path(args.output)
        self.record = self.folder / "arguments.json"
        self.arguments = {**vars(args), "processes": processes}
        if args.eval:
            return  # writes nothing
        if not args.resume:
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise RunError(f"--output: {self.folder} is not empty; give --resume to continue its run")
        elif self.record.exists():
            before = json.loads(self.record.read_text())
            now = json.loads(json.dumps(self.arguments))
            changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
            if changed:
                listed = ", ".join(f"{name}: {before.get(name)!r} is now {now[name]!r}" for name in changed)
                raise RunError(f"--resume: the run in {self.folder} has other arguments ({listed})")

    def write_arguments(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.arguments, indent=1)
        write_atomically(self.record, lambda part: part.write_text(text))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the newest last."""
        return sorted(self.folder.glob("checkpoint-*"))

    def save(self, accelerator: Accelerator, update: int) -> None:
        """Save accelerate's state as ``checkpoint-<update>`` and remove older ones. Every process must call this."""
        part = self.folder / "checkpoint.part"
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            name = f"checkpoint-{update:09d}"
            shutil.rmtree(self.folder / name, ignore_errors=True)
            os.replace(part, self.folder / name)
            for old in self.checkpoints():
                if old.name != name:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def save_weights(self, accelerator: Accelerator, weights: dict[str, Any], *names: str) -> None:
        """Write the weights in upstream's format: ``state_dict``, ``state_dict_ema`` and facts about the run."""
        if accelerator.is_main_process:
            for name in names:
                write_atomically(self.folder / name, lambda part: torch.save(weights, part))
