"""The numbers of README.md and docs/performance.md: ``python -m benchmarks.report.readme [--check] [--readme FILE]``.

Replaces the text between ``<!-- numbers: FOLDER[, FOLDER...] -->`` and ``<!-- /numbers -->`` by tables made from the
folders' run files; between ``<!-- headline: ... -->`` and ``<!-- /headline -->`` by the headline rows alone. Folders
are named relative to the page. Each has a part of its own, and no ratio is taken across two runs. The words around the
tables are in ``templates/numbers.md``.
"""

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path

from ..measure import run_file
from ..suites.runtimes import RUNTIMES
from .frame import BASELINE, OURS, frame, pd, timed
from .goals import judge
from .words import number, template

MARKED = re.compile(
    r"^<!-- (?P<part>headline|numbers): (?P<folders>[^\n]*) -->\n(?P<text>.*?)(?=^<!-- /(?P=part) -->$)", re.M | re.S
)
ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "README.md", ROOT / "docs" / "performance.md"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PEERS = [f"{BASELINE}-compiled", *RUNTIMES]
SHOWN = [BASELINE, f"{BASELINE}-compiled", f"{BASELINE}-graph", *RUNTIMES]
SHOWN += [OURS, f"{OURS}-compiled", f"{OURS}-graph", f"{OURS}-fp32"]
EMPTY = "–"


def _text(form, *columns):
    """Columns as one column of text, with a dash where a value is missing; ``form``: a function of the values."""
    rows = zip(*columns, strict=True)
    cells = [EMPTY if any(map(pd.isna, values)) else form(*values) for values in rows]
    return pd.Series(cells, columns[0].index, object)


def _seconds(seconds):
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1e3 * seconds)} ms"


def _worded(found, *suites):
    """The rows of some suites with columns of text."""
    rows = timed(found, *suites)
    baseline, time = rows["provider"] == BASELINE, _text(_seconds, rows["median_s"])
    speedups = [rows[f"speedup_{each}"] for each in ("median", "p20", "p80")]
    speedup, spread = _text("{:.2f}×".format, speedups[0]), _text("{:.2f}× ({:.2f} – {:.2f})".format, *speedups)
    latency = time + ", " + _text(_seconds, rows["p95_s"])
    where = _text("{:.0f} px, batch {:.0f}".format, rows["size"], rows["batch"])
    return rows.assign(
        time=time,
        speedup=speedup,
        spread=spread,
        cell=time.where(baseline, time + ", " + spread),
        brief=time + ", " + speedup,
        latency=latency.where(baseline | (speedup == EMPTY), latency + "; " + speedup),
        share=_text("{:.0f} %".format, 100 * rows["floor_share"]),
        left=_text(str, rows["unfused"]),
        kept=_text("{} MB".format, rows["saved_mb"].map(number, na_action="ignore")),
        precision=rows["dtype"].map(DTYPES),
        where=where,
        model=_text("`{}`, {}".format, rows["subject"], where),
        image=_text("`{}`, {:.0f} px".format, rows["subject"], rows["size"]),
        module=_text(str.capitalize, rows["subject"]),
        operator=rows["subject"].replace({"(.*?)-.*": r"`\1`"}, regex=True),
        stage=rows["subject"].replace({".*-(stage)?": "", "fuseformer": "FuseFormer"}, regex=True),
        head=rows["label"].replace({", eager": "", "torch.compile": "`torch.compile`"}, regex=True),
    )


def _joined(cells):
    """The texts of several cases in one cell; a unit is written once."""
    return EMPTY if (cells == EMPTY).all() else " / ".join(cells).replace(" % /", " /")


def _pivot(title, rows, line, column, heads, cases=()):
    """A table of text; ``None`` without rows.

    Args:
        title: heading of the first column, with names of columns of ``rows`` in braces; rows: with columns of text;
            line: the column of ``rows`` whose values are the lines; column: the one whose values are columns; heads:
            (column of text, value of ``column``) -> heading; cases: columns whose values share a cell.
    """
    if rows.empty:
        return None
    texts = list(dict.fromkeys(text for text, _ in heads))
    found = rows.pivot_table(texts, [line, *cases], column, "first", sort=False).fillna(EMPTY)
    found = found.groupby(level=0, sort=False).agg(_joined).reindex(columns=list(heads), fill_value=EMPTY)
    return found.set_axis(list(heads.values()), axis=1).rename_axis(title.format(**rows.iloc[0]))


def _providers(title, rows, line, text):
    """A table with a column for each provider of :data:`SHOWN` that was measured."""
    rows = rows[rows["provider"].isin(SHOWN)]
    heads = {(text, row.provider): row.head for row in rows.itertuples()}
    return _pivot(title, rows, line, "provider", heads)


def _models(found, headline):
    """Whole models, the lite ones first; for the headline at the first size and batch only."""
    rows = _worded(found, "models", "training").sort_values("lite", kind="stable")
    rows = rows[rows["where"] == rows["where"].iloc[0]] if headline and len(rows) else rows
    ours, upstream = (rows[rows["provider"] == name] for name in (OURS, BASELINE))
    peers = rows[rows["provider"].isin(PEERS) & (rows["mode"] == "inference")]
    rows = ours.merge(upstream[["model", "mode", "time"]], on=["model", "mode"], suffixes=("", "_before"))
    rows["change"] = rows["time_before"] + " → " + rows["time"]
    heads = {("change", "inference"): "inference", ("spread", "inference"): "speed-up"}
    heads |= {("change", "training"): "training step", ("spread", "training"): "speed-up"}
    table = _pivot("whole model, {precision}", rows, "model", "mode", heads)
    if table is None:
        return None
    for place, (head, times) in enumerate(peers.groupby("head", sort=False), 2):  # behind our own inference
        cells = times.set_index("model")["brief"].reindex(table.index, fill_value=EMPTY)
        table.insert(place, head.removeprefix(f"{BASELINE}, "), cells)
    return table.assign(**{"not fused": rows.groupby("model")["left"].first()})


def _modules(found):
    """T2T modules.

    Returns:
        the table of the first case with all providers; its rows of t2t_fast with a floor; the speed-ups of t2t_fast
        for every module, size and batch, if there are others.
    """
    rows = _worded(found, "module")
    first = rows[rows["model"] == rows["model"].iloc[0]] if len(rows) else rows
    kept = first[first["mode"] == "training"].assign(mode="kept for backward, per image", cell=first["kept"])
    lines = pd.concat([first.replace({"mode": {"training": "training: forward and backward"}}), kept])
    table = _providers("T2T module ({module}), {where}, {precision}", lines, "mode", "cell")
    ours = rows[rows["provider"] == OURS]
    floors = ours[(ours["share"] != EMPTY) & ours.index.isin(first.index)]
    heads = {("speedup", where): where for where in ours.sort_values(["size", "batch"])["where"]}
    others = ours.assign(module=ours["module"] + " module") if len(rows) > len(first) else ours.iloc[:0]
    others = _pivot("eager, inference / training", others, "module", "where", heads, ["mode"])
    return {"first": table, "floors": floors.to_dict("records"), "others": others}


def _operators(found):
    """Every operator at 224 px in the headline dtype, a line for all its places in the T2T module."""
    rows = _worded(found[found["size"] == 224], "ops").query("provider == @OURS")
    rows = rows[rows["dtype"].isin(rows["dtype"].head(1))]
    heads = {("speedup", "inference"): "forward", ("share", "inference"): "floor / time"}
    heads |= {("speedup", "training"): "forward and backward", ("share", "training"): "floor / time"}
    table = _pivot("operator, batch {batch:.0f}, {precision}", rows, "operator", "mode", heads, ["stage"])
    if table is not None:
        table.insert(0, "stage", rows.drop_duplicates(["operator", "stage"]).groupby("operator")["stage"].agg(_joined))
    return table


def _fits(found):
    """The largest batches, a line for all sizes of a model."""
    fits = found[found["suite"] == "memory"]
    sizes = fits.groupby(["subject", "dtype", "limit_bytes"])["size"]
    sizes = sizes.transform(lambda each: " / ".join(f"{size:.0f}" for size in each.unique()))
    limits, dtypes = fits["limit_bytes"].map(lambda limit: number(limit / 1e9)), fits["dtype"].map(DTYPES)
    lines = _text("`{}`, {}, {} px, {} GB".format, fits["subject"], dtypes, sizes, limits)
    fits = fits.assign(line=lines, images=_text("{:.0f}".format, fits["batch"]))
    heads = {("images", row.provider): row.label for row in fits.itertuples()}
    return _pivot("largest batch whose training step fits", fits, "line", "provider", heads, ["size"])


def _faster(found):
    """(runtime, its cases, those in which it is faster than t2t_fast) of every other runtime."""
    ours = found[found["provider"] == OURS].set_index("group")["speedup_median"]
    peers = found[found["provider"].isin(RUNTIMES) & found["group"].isin(ours.index)]
    peers = peers.assign(faster=peers["speedup_median"] > peers["group"].map(ours))
    counts = peers.groupby("label", sort=False)["faster"].agg(["size", "sum"])
    return [(label.removeprefix(f"{BASELINE}, "), *row) for label, row in zip(counts.index, counts.values, strict=True)]


def _machine(folder, headline):
    """What the template shows of a folder of results."""
    run = run_file.read(folder)
    found = frame(run)
    ours = timed(found).dropna(subset="speedup_median").sort_index().query("own")
    chosen = ours["provider"].str.startswith(OURS)
    title = "one image, {precision}: median, 95th percentile"
    # the dtypes in the order in which they were measured
    parts = [found[found["dtype"] == dtype] for dtype in timed(found)["dtype"].unique()]
    latency = [_providers(title, _worded(part, "latency"), "image", "latency") for part in parts]
    return {
        "files": [file.name for file in folder.iterdir()],
        "environment": run.environment,
        "models": [_models(part, headline) for part in parts],
        "modules": [_modules(part) for part in parts],
        "latency": latency,
        "faster": _faster(timed(found)),
        "operators": _operators(found),
        "fits": _fits(found),
        "ours": ours[chosen],
        "others": ours[~chosen],
        "goals": judge(run.rows),
        "left_out": len(run.left_out),
    }


def _wrapped(text):
    """Paragraphs of 120 characters with code in one piece; tables and pictures as they are."""
    blocks = []
    for block in re.split(r"\n{2,}", text.strip()):
        if not block.startswith(("|", "![")):
            kept = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), " ".join(block.split()))
            block = textwrap.fill(kept, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
        blocks.append(block)
    return "\n\n".join(blocks)


def generated(page):
    """(the text of a page as it is, the text with its numbers made anew).

    Raises:
        ValueError: there is not one pair of markers, or a folder that is no run's.
    """
    text = page.read_text()
    marked = list(MARKED.finditer(text))
    if len(marked) != 1:
        pair = "<!-- numbers: FOLDER[, FOLDER...] --> and <!-- /numbers --> (or headline)"
        raise ValueError(f"{page}: expected {pair} once, each on a line, got {len(marked)} pairs")
    (found,) = marked
    headline, names = found["part"] == "headline", re.split(r"\s*,\s*", found["folders"].strip())
    machines = {name: _machine(page.parent / name, headline) for name in names}
    gpu = any(machine["environment"].get("gpu") for machine in machines.values())
    root = re.match(r"(\.\./)*", names[0])[0]  # from the page to the repository
    body = _wrapped(template("numbers.md").render(machines=machines, headline=headline, gpu=gpu, root=root))
    return text, f"{text[: found.start('text')]}\n{body}\n\n{text[found.end('text') :]}"


def main(argv=None):
    """Write the numbers of the pages, or check them. Returns 0; 1 if they differ; 2 if they cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; show what differs")
    parser.add_argument("--readme", type=Path, help="one page; by default README.md and docs/performance.md")
    arguments = parser.parse_args(argv)
    differs = False
    for page in [arguments.readme] if arguments.readme else PAGES:
        try:
            text, wanted = generated(page)
        except (OSError, ValueError) as failure:
            print(f"{parser.prog}: {failure}", file=sys.stderr)
            return 2
        if not arguments.check:
            page.write_text(wanted)
            print(page)
            continue
        lines = text.splitlines(), wanted.splitlines()
        difference = list(difflib.unified_diff(*lines, page.name, f"{page.name}, generated", "", "", 1, ""))
        print("\n".join(difference) if difference else f"{page.name}: the numbers are those of the runs")
        differs |= bool(difference)
    return 1 if differs else 0


if __name__ == "__main__":
    raise SystemExit(main())
