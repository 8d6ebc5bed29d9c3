"""The report of a run as one HTML page, which opens without network: what matters most first, and every row."""

from html import escape

from ..suites.groups import LITE
from . import crossover
from . import html as page
from .cases import OURS, SUITES, cases, floor_share, headline, lost, main_dtype, of, ordered, ours, suite
from .goals import judge
from .pictures import PICTURES
from .roofline import FAR
from .words import (
    NOTES,
    error,
    label,
    megabytes_per_image,
    number,
    percent,
    products,
    spread,
    without_numbers,
)

STYLE = (
    page.STYLE
    + """
main { max-width: 1256px }
nav { margin: 18px 0 0; font-size: 14.5px; line-height: 1.9 }
nav a { margin-right: 16px }
a { color: var(--after) }
a:not(:hover) { text-decoration: none }
.goals td:not(:first-child), .goals th { white-space: nowrap }
tr.bad td { color: var(--alarm) }
.plain td, .plain th { text-align: left; vertical-align: top }
.find { display: flex; gap: 14px; align-items: baseline; margin: 14px 0 0 }
.find input { font: inherit; font-size: 14.5px; padding: 7px 12px; width: 420px; border: 1px solid #c3cbd5;
  border-radius: 8px; background: #fff; color: inherit }
.find output { color: var(--muted); font-size: 14px }
.rows { max-height: 1200px; overflow: auto; background: #fff; border: 1px solid var(--line); margin: 12px 0 }
#rows { font-size: 12px; width: 100%; margin: 0; border: 0 }
#rows th, #rows td { padding: 4px }
#rows thead th { position: sticky; top: 0; background: #fff; padding: 0; box-shadow: inset 0 -1px var(--line);
  vertical-align: bottom }
#rows button { font: inherit; color: inherit; background: none; border: 0; padding: 6px 4px; text-align: inherit;
  width: 100%; cursor: pointer; white-space: pre-line }
#rows button:hover { color: var(--ink) }
#rows th[aria-sort=ascending] button::after { content: " ▲"; font-size: 9px }
#rows th[aria-sort=descending] button::after { content: " ▼"; font-size: 9px }
#rows td { white-space: nowrap }
#rows .words { text-align: left }
#rows .wrapped { white-space: normal }
.cards { grid-template-columns: repeat(auto-fill, minmax(268px, 1fr)) }
#rows small { color: var(--muted); font-size: 10.5px }
#rows .ours { font-weight: 600 }
#rows .bad, #rows .bad small { color: var(--alarm) }
"""
)

SCRIPT = """
const table = document.getElementById("rows"), body = table.tBodies[0], all = [...body.rows];
const count = document.querySelector(".find output");
function filter(text) {
  const words = text.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of all) {
    const held = (row.textContent + " " + row.dataset.group).toLowerCase();
    row.hidden = !words.every(word => held.includes(word));
    shown += !row.hidden;
  }
  count.textContent = shown + " of " + all.length + " rows";
}
function sort(head) {
  const column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => row.cells[column].dataset.sort;
  const compare = head.dataset.kind === "number"
    ? (a, b) => Number(key(a)) - Number(key(b)) : (a, b) => key(a).localeCompare(key(b), "en");
  const empty = all.filter(row => key(row) === ""), rest = all.filter(row => key(row) !== "").sort(compare);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...(up ? rest : rest.reverse()), ...empty);
}
document.getElementById("filter").addEventListener("input", event => filter(event.target.value));
for (const head of table.tHead.rows[0].cells) head.querySelector("button").addEventListener("click", () => sort(head));
filter("");
"""
"""Clicks on a heading of the table of all rows sort it, the text box filters it."""


def _heading(words):
    return f'<h2 id="{_anchor(words)}">{escape(words)}</h2>'


def _anchor(words):
    return "".join(letter if letter.isalnum() else "-" for letter in words.lower())


def _paragraph(words):
    return f"<p>{escape(words)}</p>"


def _ratio_card(ratio, better, worse, words):
    """A card that says in words and colour whether a ratio (over 1: better) is a gain."""
    bad = ratio < 1
    return page.card(f"{1 / ratio if bad else ratio:.2f}× {worse if bad else better}", words, bad)


def _case_cards(case):
    """The cards of a case: the speed-up and, of T2T modules, what a training step keeps and needs."""
    by_provider = {row["provider"]: row for row in case.rows}
    mine, upstream = by_provider.get(OURS), by_provider.get("upstream")
    if mine is None or mine["speedup"] is None:
        return []
    found = [_ratio_card(mine["speedup"]["median"], "faster", "slower", case.title)]
    if mine["level"] == "module" and mine["mode"] == "training":
        for key, words in (("saved_bytes", "kept for backward"), ("peak_bytes", "peak memory")):
            if mine[key] and upstream[key]:
                found.append(_ratio_card(upstream[key] / mine[key], "less", "more", f"{words}, {case.title}"))
    return found


def _fit_cards(fits):
    batches = {(each["group"], each["provider"]): each["batch"] for each in fits}
    found = []
    for each in fits:
        base = batches.get((each["group"], "upstream"))
        if each["provider"] == OURS and each["batch"] and base:
            words = f"batch that fits, {each['subject']}, {each['size']} px: {each['batch']} instead of {base} images"
            found.append(_ratio_card(each["batch"] / base, "larger", "smaller", words))
    return found


def _cards(run):
    """The headline: lite models and the Performer's module, else whatever this run is about, and fitting batches."""
    rows = headline(run.rows)
    rows = [row for row in rows if row["dtype"] == main_dtype(rows)]
    first = [row for row in of(rows, "models", "training") if row["subject"] in LITE]
    first += [row for row in of(rows, "module") if row["subject"] == "performer"]
    chosen = cases(first or ordered(rows)[:60])
    found = [card for case in chosen for card in _case_cards(case)][:10]
    return page.cards(found + _fit_cards([each for each in run.fits if each["subject"] in LITE])[:2])


def _unfinished(run):
    if run.complete:
        return ""
    return (
        f'<p class="bad note">This run is not complete: {run.finished} of {run.planned} planned rows are finished. '
        "What is here was measured; the rest is missing, or was visited less often than planned.</p>"
    )


def _goals(run):
    judged = judge(run.rows)
    if not judged:
        return []
    reached = [goal for goal in judged if goal.verdict == "reached"]
    missed = [goal for goal in judged if goal.verdict != "reached"]
    return [
        _heading("Goals"),
        _paragraph(
            f"{len(reached)} of {len(judged)} goals whose rows this run has are reached, {len(missed)} are not."
        ),
        '<div class="goals">',
        page.table(
            ("goal", "wanted", "measured (20 % to 80 %)", ""),
            [*reached, *missed],
            [""] * len(reached) + ["bad"] * len(missed),
        ),
        "</div>",
    ]


SECTIONS = (
    (
        "Speed-up",
        "Every bar starts at upstream's own speed (1×): to the right is faster, to the left slower; losses are red. "
        "Sizes are the headline ones, in one dtype; the table of all rows has the others. † computes another function.",
        ("chart", "chart-models", "chart-operators"),
    ),
    (
        "Memory",
        "Kept for backward: bytes that autograd saves in a training forward. Peak: most bytes that a call allocates at "
        "a time. Neither counts the parameters. Less is better.",
        ("memory",),
    ),
    (
        "Largest batch that fits",
        "The most images whose whole training step stays below the limit. A step with one image more did not.",
        ("fits",),
    ),
    (
        "How far from the limits of the machine",
        "The floor is the time that a fused implementation would take if it moved its bytes at the measured speed of a "
        f"copy and computed at the measured speed of dense products. Ours below {100 * FAR:.0f} % are red. More than "
        "100 % is possible where data stays in a cache, which the copy does not. In the second picture a number is the "
        "case of that number in the first; operators without products have no place there.",
        ("floor", "roofline"),
    ),
    (
        "Scaling",
        "Time an image against the batch and the image side, both on logarithmic axes. Where a line ends before "
        "another one, the next size did not fit or was not measured: see what was left out.",
        ("scaling",),
    ),
    (
        "Performer attention by the number of tokens",
        "Time and memory a token. Softmax attention grows with the square of the number of tokens, so its line rises.",
        ("crossover",),
    ),
    (
        "Several processes",
        "Data-parallel training by processes of one thread each. Dotted: the first count's speed times the processes.",
        ("processes",),
    ),
    ("Latency", "One call at a time with few images, as a service answers them.", ("latency",)),
)
"""(heading, words, names of pictures): a section is left out where a run has none of its pictures."""


def _section(heading, words, names, paths, run):
    alts = {picture.name: picture.alt for picture in PICTURES}
    there = [name for name in names if name in paths]
    if not there:
        return []
    parts = [_heading(heading), _paragraph(words)]
    if "crossover" in there:
        parts += [_paragraph(f"{sentence}.") for sentence in crossover.sentences(crossover.curves(run.rows))]
    return [*parts, *(page.figure(paths[name], alts[name]) for name in there)]


COLUMNS = (
    ("suite", "words"),
    ("subject", "words"),
    ("px", "number"),
    ("batch", "number"),
    ("dtype", "words"),
    ("mode", "words"),
    ("provider", "words"),
    ("ms\n20 % – 80 %", "number"),
    ("× upstream\n20 % – 80 %", "number"),
    ("images/s", "number"),
    ("GB/s\nTFLOP/s", "number"),
    ("% of\nfloor", "number"),
    ("saved\nMB/img", "number"),
    ("peak\nMB/img", "number"),
    ("error", "words"),
)


def _cell(value, words, mark=""):
    """A cell that sorts by ``value``; ``words``: its HTML."""
    mark = f' class="{mark}"' if mark else ""
    return f'<td{mark} data-sort="{"" if value is None else escape(str(value))}">{words}</td>'


def _range(summary, factor, ending=""):
    low, high = (number(factor * summary[key]) for key in ("p20", "p80"))
    return f"{number(factor * summary['median'])}{ending} <small>{low}–{high}</small>"


def _speedup(row):
    if row["speedup"] is None:
        return _cell(None, "")
    middle = row["speedup"]["median"]
    if row["provider"] == "upstream":
        return _cell(middle, "1")
    return _cell(middle, ("▼ " if lost(row) else "") + _range(row["speedup"], 1), "bad" if lost(row) else "")


def _plain(value):
    return _cell(value, number(value))


def _row(row):
    provider = "words wrapped ours" if row["provider"] == OURS else "words wrapped"
    cells = [
        _cell(list(SUITES).index(suite(row)), escape(suite(row)), "words"),
        _cell(row["subject"], escape(row["subject"]), "words wrapped"),
        _cell(row["size"], "" if row["size"] is None else str(row["size"])),
        _cell(row["batch"], str(row["batch"])),
        _cell(row["dtype"], escape(row["dtype"]), "words"),
        _cell(row["mode"], escape(row["mode"]), "words"),
        _cell(row["label"], escape(label(row)), provider),
        _cell(row["seconds"]["median"], _range(row["seconds"], 1e3)),
        _speedup(row),
        _plain(row["images_per_s"]),
        _cell(row["gb_per_s"], f"{number(row['gb_per_s'])}<br><small>{number(row['tflop_per_s'])}</small>"),
        _cell(floor_share(row), percent(floor_share(row), 2)),
        _plain(megabytes_per_image(row, "saved_bytes")),
        _plain(megabytes_per_image(row, "peak_bytes")),
        _cell(row["error"], escape(error(row)), "words wrapped"),
    ]
    return f'<tr data-group="{escape(row["group"])}">{"".join(cells)}</tr>'


def _all_rows(run):
    losses = [row for row in run.rows if lost(row)]
    mine = [row for row in losses if ours(row["provider"])]
    kinds = {"suite": "number", "error": "number"}
    heads = "".join(
        f'<th scope="col" class="{kind}" data-kind="{kinds.get(name, kind)}"><button>{escape(name)}</button></th>'
        for name, kind in COLUMNS
    )
    return [
        _heading("All rows"),
        _paragraph(
            f"{len(run.rows)} rows; {len(losses)} are slower than upstream eager (▼), of these {len(mine)} are forms "
            "of this package. A click on a heading sorts; every word in the box must occur in a row."
        ),
        '<div class="find"><input id="filter" type="search" placeholder="performer training compile" '
        'aria-label="filter the rows"><output></output></div>',
        f'<div class="rows"><table id="rows"><thead><tr>{heads}</tr></thead>',
        f"<tbody>{chr(10).join(_row(row) for row in ordered(run.rows))}</tbody></table></div>",
    ]


def _losses(run):
    """Where a form of the package is slower than upstream eager, slowest first."""
    rows = sorted(
        (row for row in run.rows if lost(row) and ours(row["provider"])), key=lambda row: row["speedup"]["median"]
    )
    if not rows:
        return []
    cells = [
        (case.title, label(row), spread(row["seconds"], 1e3), spread(row["speedup"]))
        for row in rows
        for case in cases([row])
    ]
    return [
        _heading("Where this package is slower"),
        page.table(("case", "provider", "ms (20 % – 80 %)", "× upstream (20 % – 80 %)"), cells, ["bad"] * len(cells)),
    ]


def _left_out(run):
    if not run.left_out:
        return []
    lines = without_numbers(run.left_out)
    return [
        _heading("What was left out"),
        f'<div class="plain">{page.table(("cases", "provider", "why"), lines)}</div>',
    ]


def _flat(environment):
    """(name, value) of everything that is noted about where a run was measured."""
    for key, value in environment.items():
        if key == "limits":
            yield "measured limits", f"copy {value['bytes_per_s'] / 1e9:.1f} GB/s; products: {products(value)}"
        elif key == "packages":
            yield key, ", ".join(f"{name} {version or '(not installed)'}" for name, version in value.items())
        elif isinstance(value, dict):
            yield key, ", ".join(f"{name} {each}" for name, each in value.items())
        elif key != "command":
            yield key, value


def _how(run):
    command = run.environment.get("command")
    shown = f"<pre>{escape(command)}</pre>" if command else _paragraph("The run does not note its command.")
    return [
        _heading("Where and how this was measured"),
        f'<div class="plain">{page.table(("", ""), _flat(run.environment))}</div>',
        shown,
        _paragraph(NOTES),
    ]


def report(run, paths, undrawn=None):
    """The page.

    Args:
        run: :class:`run_file.RunFile`; paths: picture name -> PNG file (:func:`pictures.draw`); undrawn: why there are
            no pictures, or ``None``.

    Returns:
        the HTML.
    """
    environment = run.environment
    parts = [
        *_goals(run),
        *(part for section in SECTIONS for part in _section(*section, paths, run)),
        *_all_rows(run),
        *_losses(run),
        *_left_out(run),
        *_how(run),
    ]
    headings = [part.partition(">")[2].partition("<")[0] for part in parts if part.startswith("<h2")]
    links = "".join(f'<a href="#{_anchor(words)}">{words}</a>' for words in headings)
    kind = "a quick run, the headline rows only" if environment.get("quick") else "a full run"
    top = [
        "<h1>t2t_fast beside upstream T2T-ViT</h1>",
        f'<p class="lead">{escape(environment["device"])}, {environment["date"][:10]}; '
        f"t2t_fast {escape(environment['t2t_fast'])}, torch {escape(environment['torch'])}; {kind}.</p>",
        _unfinished(run),
        "" if undrawn is None else f'<p class="bad note">No pictures: {escape(undrawn)}.</p>',
        _cards(run),
        f"<nav>{links}</nav>",
    ]
    end = (
        "<footer>Made by python -m benchmarks.report from rows.json alone. "
        "table.md and rows.csv hold the same rows.</footer>"
    )
    return page.document(f"t2t_fast: benchmarks, {environment['device']}", [*top, *parts, end], STYLE, SCRIPT)
