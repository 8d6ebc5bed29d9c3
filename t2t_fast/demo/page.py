"""The report's files: pictures, one HTML page that contains them, the numbers as JSON; and a summary as text."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch

from . import charts, pictures
from .half import HalfResult
from .photo import Photo
from .style import RC

TEMPLATE = Path(__file__).with_name("page.html")
FORMS = ("before", "after")


def megabytes(value: float) -> str:
    """Bytes in MB or GB."""
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def draw(
    out: Path,
    photo: Photo,
    x: torch.Tensor,
    stages: list[tuple[torch.Tensor, tuple[int, int]]],
    logits: tuple[torch.Tensor, torch.Tensor],
    data: dict[str, Any],
    halves: list[HalfResult],
) -> dict[str, Path]:
    """Write the PNG files.

    Returns:
        name -> path.
    """
    batch = data["model"]["batch"]
    times = [(row["what"], *((row[f]["median"], row[f]["low"], row[f]["high"]) for f in FORMS)) for row in data["time"]]
    memory = [(row["what"], *((row[f], None, None) for f in FORMS)) for row in data["memory"]]
    with matplotlib.rc_context(RC):
        first = pictures.zoom_tokens(x)
        figures = {
            "photo": pictures.photo_figure(photo, x),
            "windows": pictures.windows_figure(x, first),
            "tokens": pictures.tokens_figure(x, first),
            "restructured": pictures.restructured_figure(x, stages),
            "logits": charts.logits_figure(*logits),
            "time": charts.bars_figure(times, milliseconds, f"time of a batch of {batch}"),
            "memory": charts.bars_figure(memory, megabytes, f"memory of a batch of {batch}"),
            "half": charts.half_figure(x, halves),
        }
        paths = {name: out / f"{name}.png" for name in figures}
        for name, figure in figures.items():
            figure.savefig(paths[name])
    return paths


def write(out: Path, data: dict[str, Any], paths: dict[str, Path]) -> Path:
    """Write ``report.json`` and ``report.html``; returns the page's path."""
    (out / "report.json").write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    path = out / "report.html"
    images = {name: base64.b64encode(file.read_bytes()).decode("ascii") for name, file in paths.items()}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    path.write_text(template.render(**data, images=images, **_tables(data)), encoding="utf-8")
    return path


def _tables(data: dict[str, Any]) -> dict[str, Any]:
    """The page's tables, as rows of cells."""
    parity = data["parity"]
    top = zip(*(parity[f"{name}_{form}"] for form in FORMS for name in ("top5", "top5_logits")), strict=True)

    def spread(timing: dict[str, Any]) -> str:
        median, low, high = (milliseconds(timing[name]) for name in ("median", "low", "high"))
        return f"{median} ({low} to {high})"

    return {
        "top": [(a, f"{x:.6f}", b, f"{y:.6f}") for a, x, b, y in top],
        "times": [
            (row["what"], *(spread(row[f]) for f in FORMS), f"{row['ratio']:.2f}×", row["before"]["rounds"])
            for row in data["time"]
        ],
        "bytes": [(row["what"], *(megabytes(row[f]) for f in FORMS), f"{row['ratio']:.2f}×") for row in data["memory"]],
        "halves": [
            (
                row["dtype"],
                f"× {row['gain']:g}",
                row["form"],
                f"{row['inner_tokens_not_finite']} of {row['inner_tokens']}",
                f"{row['tokens_not_finite']} of {row['tokens']}",
                "not finite" if row["error"] is None else f"{row['error']:.1e}",
            )
            for row in data["half"]
        ],
        "half_words": half_words(data["half"]),
    }


def summary(data: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    photo, model, parity = data["photo"], data["model"], data["parity"]
    weights = f"random weights, seed {model['seed']}" if model["checkpoint"] is None else "weights of the checkpoint"
    top = "same" if parity["top5_before"] == parity["top5_after"] else "different"
    lines = [
        f"photo    {photo['name']}, {photo['width']} x {photo['height']} -> {photo['img_size']} x {photo['img_size']}",
        f"model    {model['name']}, {model['parameters'] / 1e6:.1f} M parameters, {weights}",
        f"machine  {data['environment']['device']}, torch {data['environment']['torch']}, batch {model['batch']}",
        f"logits   {'same' if parity['ok'] else 'DIFFERENT'}: largest difference {parity['max_abs_difference']:.1e}, "
        f"cosine {parity['cosine']:.9f}, {top} top 5",
        f"         error against float64: before {parity['error_before']:.1e}, after {parity['error_after']:.1e}",
        "",
        f"{'':42} {'before':>10} {'after':>10} {'ratio':>7}",
    ]
    rows = [(row, [milliseconds(row[form]["median"]) for form in FORMS]) for row in data["time"]]
    rows += [(row, [megabytes(row[form]) for form in FORMS]) for row in data["memory"]]
    lines += [f"{row['what']:42} {cells[0]:>10} {cells[1]:>10} {row['ratio']:6.2f}x" for row, cells in rows]
    return "\n".join([*lines, "", *half_words(data["half"]), *data["notes"]])


def half_words(rows: list[dict[str, Any]]) -> list[str]:
    """The result of the half-precision experiment, one sentence per dtype."""
    sentences = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        parts = []
        for form in FORMS:
            bad = [r for r in rows if (r["dtype"], r["form"]) == (dtype, form) and r["tokens_not_finite"]]
            counts = [f"{r['tokens_not_finite']} of {r['tokens']} at weights x {r['gain']:g}" for r in bad]
            parts.append(f"{form} {'tokens not finite: ' + ', '.join(counts) if counts else 'all tokens finite'}")
        sentences.append(f"autocast {dtype}: {'; '.join(parts)}")
    return sentences
