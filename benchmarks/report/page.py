"""The report of a run as one HTML page that opens without a network: the headline, pictures, and every row."""

from base64 import b64encode
from io import BytesIO

from ..suites.groups import LITE
from . import words
from .charts import FAR, PICTURES
from .crossover import curves, sentences
from .frame import BASELINE, OURS, headline, in_main_dtype, timed
from .goals import judge
from .words import template


def _cards(found):
    """(ratio to upstream, words for more and less than 1, case) of lite models and the Performer's module.

    Where a run has neither, of its first rows.
    """
    rows = in_main_dtype(headline(timed(found)))
    front = rows["suite"].isin(("models", "training", "module")) & rows["subject"].isin((*LITE, "performer"))
    rows = rows[front] if front.any() else rows[:60]
    upstream = rows[rows["provider"] == BASELINE].set_index("group")
    cards = []
    for row in rows[(rows["provider"] == OURS) & rows["group"].isin(upstream.index)].itertuples():
        cards.append((row.speedup_median, "faster", "slower", row.case))
        for key, what in (("saved_bytes", "kept for backward"), ("peak_bytes", "peak memory")):
            if row.level == "module" and row.mode == "training" and getattr(row, key) > 0:
                ratio = upstream.loc[row.group, key] / getattr(row, key)
                cards.append((ratio, "less", "more", f"{what}, {row.case}"))
    return [card for card in cards if card[0] > 0][:12]


def _facts(environment):
    """(name, value) of everything that is noted about where a run was measured."""
    for key, value in environment.items():
        if key == "limits":
            value = f"copy {value['bytes_per_s'] / 1e9:.1f} GB/s; products: {words.products(value)}"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {each or '(not installed)'}" for name, each in value.items())
        yield key, value


def _image(path):
    """A PNG file as base64 of lossless WebP, which is about a quarter smaller."""
    from PIL import Image

    drawn = BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(drawn, "webp", lossless=True, quality=60, method=5)
    return b64encode(drawn.getvalue()).decode("ascii")


def report(run, found, paths, undrawn=None):
    """The page as HTML.

    Args:
        run: :class:`run_file.RunFile`; found: its frame; paths: picture name -> PNG file (:func:`charts.draw`);
            undrawn: why there are no pictures, or ``None``.
    """
    rows = timed(found)
    lost = rows[rows["lost"] & rows["own"]].sort_values("speedup_median", kind="stable").itertuples()
    return template("page.html", autoescape=True).render(
        run=run,
        environment={"quick": False, **run.environment},
        undrawn=undrawn,
        cards=_cards(found),
        goals=sorted(judge(run.rows), key=lambda goal: goal.verdict),
        far=FAR,
        sentences=sentences(curves(found), run),
        images={name: _image(path) for name, path in paths.items()},
        alts={name: make.__doc__.splitlines()[0] for name, (_, make) in PICTURES.items()},
        rows=list(rows.itertuples()),
        losses=[(row.case, row.name, words.spread(row, "seconds", 1e3), words.spread(row, "speedup")) for row in lost],
        left_out=words.left_out(run.left_out),
        facts=list(_facts(run.environment)),
        notes=words.NOTES,
    )
