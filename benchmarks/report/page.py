"""The report of a run as one HTML page that opens without a network: the headline first, and every row."""

from base64 import b64encode
from io import BytesIO

from ..suites.groups import LITE
from . import words
from .charts import FAR, PICTURES
from .crossover import curves, sentences
from .frame import BASELINE, OURS, SUITES, cases, headline, in_main_dtype, timed
from .goals import judge
from .tables import template

SECTIONS = {
    "Speed-up": (
        "Every bar starts at upstream's own speed (1×): to the right is faster, to the left slower; losses are red. "
        "The charts show the headline sizes in one dtype; the table of all rows has the others. † computes another "
        "function.",
        ("chart", "chart-models", "chart-operators"),
    ),
    "Memory": (
        "Kept for backward: the bytes that autograd saves in a training forward. Peak: the most bytes that a call "
        "allocates at a time. Neither includes the parameters. Less is better.",
        ("memory",),
    ),
    "Largest batch that fits": (
        "The most images whose whole training step stays below the limit. A step with one more image did not.",
        ("fits",),
    ),
    "How far from the limits of the machine": (
        "The floor is the time that a fused implementation would take if it moved its bytes at the measured speed of a "
        f"copy and computed at the measured speed of dense products. Our rows below {100 * FAR:.0f} % are red. More "
        "than 100 % is possible where data stays in a cache, which the copy does not. A number in the second picture "
        "is the case with that number in the first; operators without products are not in it.",
        ("floor", "roofline"),
    ),
    "Scaling": (
        "Time an image against the batch and the image side, both on logarithmic axes. A line that ends early has no "
        "next size, because it did not fit or was not measured: see what was left out.",
        ("scaling",),
    ),
    "Performer attention by the number of tokens": (
        "Time and memory a token. The cost of softmax attention grows with the square of the number of tokens, so its "
        "line rises.",
        ("crossover",),
    ),
    "Several processes": (
        "Data-parallel training by processes with one thread each. Dotted: the speed of the first count times the "
        "number of processes.",
        ("processes",),
    ),
    "Latency": ("One call at a time with few images, as a service answers them.", ("latency",)),
}
"""Heading -> (words, names of pictures); a section is left out where a run has none of its pictures."""

COLUMNS = (
    *("suite", "subject", "px", "batch", "dtype", "mode", "provider", "ms\n20 % – 80 %", "× upstream\n20 % – 80 %"),
    *("images/s", "GB/s\nTFLOP/s", "% of\nfloor", "saved\nMB/img", "peak\nMB/img", "error"),
)


def _case_cards(case, rows):
    """(ratio, better, worse, words): the speed-up and, for training steps of T2T modules, the memory."""
    by_name = {row.provider: row for row in rows}
    ours, upstream = by_name.get(OURS), by_name.get(BASELINE)
    if ours is None or upstream is None or not ours.speedup_median > 0:
        return
    yield ours.speedup_median, "faster", "slower", case
    if ours.level == "module" and ours.mode == "training":
        for key, what in (("saved_bytes", "kept for backward"), ("peak_bytes", "peak memory")):
            if getattr(ours, key) > 0 and getattr(upstream, key) > 0:
                yield getattr(upstream, key) / getattr(ours, key), "less", "more", f"{what}, {case}"


def _cards(found):
    """The headline: lite models and the Performer's module, else the run's first rows, and the batches that fit."""
    rows = in_main_dtype(headline(timed(found)))
    module = timed(rows, "module")
    first = timed(rows, "models", "training")
    chosen = [*cases(first[first["subject"].isin(LITE)]), *cases(module[module["subject"] == "performer"])]
    chosen = chosen or cases(timed(rows)[:60])
    cards = [card for case in chosen for card in _case_cards(*case)][:10]
    fits = found[(found["suite"] == "memory") & found["subject"].isin(LITE)]
    batches = fits.pivot(index=["what", "size"], columns="provider", values="batch") if len(fits) else fits
    for (what, size), row in batches.iterrows():
        if row.get(OURS, 0) > 0 and row.get(BASELINE, 0) > 0 and len(cards) < 12:
            text = f"batch that fits, {what}, {size:.0f} px: {row[OURS]:.0f} instead of {row[BASELINE]:.0f} images"
            cards.append((row[OURS] / row[BASELINE], "larger", "smaller", text))
    return cards


def _facts(environment):
    """(name, value) of everything that is noted about where a run was measured."""
    for key, value in environment.items():
        if key == "limits":
            speed = value["bytes_per_s"] / 1e9
            yield "measured limits", f"copy {speed:.1f} GB/s; products: {words.products(value)}"
        elif isinstance(value, dict):
            yield key, ", ".join(f"{name} {each or '(not installed)'}" for name, each in value.items())
        elif key != "command":
            yield key, value


def _image(path):
    """A PNG file as base64 of lossless WebP, which is about half as large."""
    from PIL import Image

    drawn = BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(drawn, "webp", lossless=True, quality=60, method=5)
    return b64encode(drawn.getvalue()).decode("ascii")


def report(run, found, paths, undrawn=None):
    """The page.

    Args:
        run: :class:`run_file.RunFile`; found: its frame; paths: picture name -> PNG file (:func:`charts.draw`);
            undrawn: why there are no pictures, or ``None``.

    Returns:
        the HTML.
    """
    rows, goals = timed(found), judge(run.rows)
    losses = rows[rows["lost"] & rows["own"]].sort_values("speedup_median", kind="stable")
    headings = ["Goals"] * bool(goals)
    headings += [heading for heading, (_, names) in SECTIONS.items() if any(name in paths for name in names)]
    headings += ["All rows", *["Where this package is slower"] * (len(losses) > 0)]
    headings += [*["What was left out"] * bool(run.left_out), "Where and how this was measured"]
    return template("page.html", autoescape=True).render(
        run=run,
        environment={"quick": False, "command": None, **run.environment},
        undrawn=undrawn,
        cards=_cards(found),
        headings=headings,
        reached=[goal for goal in goals if goal.verdict == "reached"],
        missed=[goal for goal in goals if goal.verdict != "reached"],
        sections=SECTIONS,
        sentences=sentences(curves(found), run),
        images={name: _image(path) for name, path in paths.items()},
        alts={name: make.__doc__.splitlines()[0] for name, make in PICTURES.items()},
        suites=list(SUITES),
        columns=COLUMNS,
        rows=list(rows.itertuples()),
        losses=list(losses.itertuples()),
        left_out=words.left_out(run.left_out),
        facts=list(_facts(run.environment)),
        notes=words.NOTES,
    )
