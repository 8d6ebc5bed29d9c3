"""What an export wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class ExportedFile:
    """One written file.

    Attributes:
        format: its format; path, size: the file and its bytes (weights kept in a second file included).
        nodes: operator -> number of nodes, empty for compiled code.
        shapes: input shapes (B, C, H, W) at which the file was compared with the model, none without a check.
        max_abs_error, max_rel_error: largest difference from the model's output, and that divided by the largest
            output; ``None`` without a check.
        agreement: share of the compared rows whose largest output is the model's, over all first outputs of the shape
            (B, classes); ``None`` without one.
    """

    format: str
    path: Path
    size: int
    nodes: dict[str, int]
    shapes: tuple[Shape, ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    agreement: float | None = None

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes among :attr:`shapes`."""
        return tuple(dict.fromkeys(shape[0] for shape in self.shapes))


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote; ``str()`` is a table.

    Attributes:
        name: the files' name; input_shape: (B, C, H, W) of the input; dynamic_batch, dynamic_size: whether B, and
        whether H and W, are free.
        smallest: with ``dynamic_size`` the smallest (H, W), else (H, W).
        outputs: the shape of each output, -1 where it is free.
        dtype: of input and weights; files: one :class:`ExportedFile` for each format.
    """

    name: str
    input_shape: Shape
    dynamic_batch: bool
    dtype: torch.dtype
    files: tuple[ExportedFile, ...]
    dynamic_size: bool = False
    smallest: tuple[int, int] = (1, 1)
    outputs: tuple[tuple[int, ...], ...] = ()

    @property
    def free_shape(self) -> tuple[str, str, str, str]:
        """The input's shape with the names of the free axes."""
        batch, channels, height, width = map(str, self.input_shape)
        if self.dynamic_size:
            height, width = "height", "width"
        return "batch" if self.dynamic_batch else batch, channels, height, width

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        table = [("format", "file", "MB", "nodes", "max abs error", "max rel error", "top-1", "checked at")]
        for file in self.files:
            error = ("-", "-", "-", "not checked")
            if file.shapes:
                top = "-" if file.agreement is None else f"{file.agreement:.0%}"
                shapes = ", ".join("x".join(map(str, shape)) for shape in file.shapes)
                error = (f"{file.max_abs_error:.1e}", f"{file.max_rel_error:.1e}", top, shapes)
            nodes = str(sum(file.nodes.values())) if file.nodes else "-"
            table.append((file.format, str(file.path), f"{file.size / 1e6:.2f}", nodes, *error))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{self.name}: input ({', '.join(self.free_shape)}) {dtype}"]
        if self.dynamic_size:
            lines[0] += f", height and width from {self.smallest[0]} and {self.smallest[1]} on"
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        for file in self.files:
            counts = sorted(file.nodes.items(), key=lambda item: (-item[1], item[0]))
            if counts:
                lines.append(f"{file.format} nodes: " + ", ".join(f"{op} {count}" for op, count in counts))
        return "\n".join(line.rstrip() for line in lines)
