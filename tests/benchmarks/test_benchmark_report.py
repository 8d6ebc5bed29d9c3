"""The benchmarks' report: its pictures are legible, its page works in a browser, and it contains every row."""

import csv
import importlib.util
import json
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations

import pytest

from benchmarks.measure import run_file
from benchmarks.report import __main__ as report
from benchmarks.report import charts, frame, goals, style, words
from benchmarks.report.page import report as html
from benchmarks.suites import groups
from benchmarks.suites.providers import PROVIDERS
from support import ROOT, browser
from support.rows import ENVIRONMENT, made_of_everything, made_row, made_run

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("matplotlib is not installed", allow_module_level=True)

SHOWN = 1178
"""Width of a picture in CSS pixels on a page 1280 pixels wide; checked by test_page_in_a_browser."""

NAMES = list(charts.PICTURES)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a report with entries of every kind, and its run."""
    folder = tmp_path_factory.mktemp("report")
    source = folder / "rows.json"
    source.write_text(json.dumps(made_of_everything()))
    report.write(source, folder)
    return folder, run_file.read(source)


def _run(rows, **more):
    return run_file.RunFile(**{"environment": ENVIRONMENT, "left_out": [], **more, "rows": rows})


def _timed(run):
    """The rows of the page's table; largest batches and processes appear only in pictures."""
    return [row for row in run.rows if row["suite"] not in ("memory", "processes")]


class Page(HTMLParser):
    """A page's references, its headings, and for each row of its table: group, whether hidden, text of the cells."""

    def __init__(self, text):
        super().__init__()
        self.references, self.rows, self.headings, self._inside, self._heading = [], [], [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[key] for key in ("src", "href", "srcset", "action") if key in attributes]
        self._inside = attributes.get("id") == "rows" or (self._inside and tag != "table")
        self._heading = tag == "h2"
        if self._inside and tag == "tr" and "data-group" in attributes:
            self.rows.append([attributes["data-group"], "hidden" in attributes])
        if self._inside and tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)
            self._heading = False
        if self._inside and self.rows and len(self.rows[-1]) > 2:
            self.rows[-1][-1] += data


def _texts(figure):
    """The visible texts of a figure with their boxes in pixels; tick labels beyond the axes are not drawn."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    drawn = []
    for axis in figure.axes:
        for ticks in (axis.xaxis, axis.yaxis):
            low, high = sorted(ticks.get_view_interval())
            every = ticks.get_major_ticks() + ticks.get_minor_ticks()
            for tick in every:
                drawn += [] if low <= tick.get_loc() <= high else [tick.label1, tick.label2]
    hidden = {id(text) for text in drawn}
    found = [
        text
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
    ]
    return [(text, Text.get_window_extent(text)) for text in found]  # an annotation's own extent includes its arrow


def _figure(run, name):
    """A picture of a run, and its texts from :func:`_texts`."""
    from matplotlib.style import context

    select, make = charts.PICTURES[name]
    with context(style.STYLE):
        figure = make(run, select(frame.frame(run)))
        return figure, _texts(figure)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_can_be_read(made, name):
    """On a page 1280 pixels wide, no text is smaller than 10 pixels, cut off, or overlaps other text."""
    figure, texts = _figure(made[1], name)
    assert len(texts) >= 10
    pixels_per_point = SHOWN / figure.get_figwidth() / 72
    for text, box in texts:
        assert text.get_fontsize() * pixels_per_point >= 10, text
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (first, one), (second, other) in combinations(texts, 2):
        assert not one.padded(-1).overlaps(other.padded(-1)), f"{first} lies on {second}"


def test_every_provider_has_a_colour():
    assert {provider.name for provider in PROVIDERS} <= set(style.COLORS)
    assert len(set(style.COLORS.values())) == len(style.COLORS)


def test_files(made):
    folder, _ = made
    names = {path.name for path in folder.iterdir()}
    assert names == {"rows.json", "report.html", "rows.csv", *(f"{name}.png" for name in NAMES)}


def test_page_is_complete_and_self_contained(made):
    folder, run = made
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.rows) == len(_timed(run))
    assert {group for group, *_ in page.rows} == {row["group"] for row in _timed(run)}
    assert sum("▼" in row[2 + 8] for row in page.rows) == frame.frame(run)["lost"].sum() > 0
    assert all(reference.startswith(("#", "data:image/webp;base64,")) for reference in page.references)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "python -m benchmarks --filter &#39;&lt;everything&gt;&#39;" in text
    assert "needs 99 GB" in text and "timm (not installed)" in text
    assert f"{run.finished} of 500 planned rows are finished" in text
    for judged in goals.judge(run.rows):
        assert judged.what in text


def test_page_of_few_rows_omits_empty_sections(tmp_path):
    source = tmp_path / "rows.json"
    (tmp_path / "scaling.png").write_text("of an earlier report into this folder")
    source.write_text(json.dumps(_run(made_run())._asdict()))
    written = report.write(source, tmp_path)
    assert set(written) | {source} == set(tmp_path.iterdir())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    headings = Page(text).headings
    assert {"Goals", "Speed-up", "Memory", "All rows", "Where this package is slower"} <= set(headings)
    assert not {"Scaling", "Latency", "Several processes", "Largest batch that fits"} & set(headings)
    assert "not complete" not in text


def test_report_without_pillow(tmp_path, monkeypatch, capsys):
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(made_of_everything()))
    monkeypatch.setitem(sys.modules, "PIL", None)
    written = report.write(source, tmp_path / "out")
    assert {path.name for path in written} == {"report.html", "rows.csv"}
    assert not list((tmp_path / "out").glob("*.png"))
    page_text = (tmp_path / "out" / "report.html").read_text()
    for said in (page_text, capsys.readouterr().err):
        assert "a report with pictures needs PIL" in said and "python -m benchmarks.report" in said


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("report.__main__", ["rows.json"]), ("__main__", ["--compare", "a", "b"]), ("report.readme", [])],
)
def test_missing_packages_are_named_in_one_line(module, arguments):
    code = f"import runpy, sys; sys.modules['pandas'] = None; sys.argv[1:] = {arguments}; "
    code = f"{code}runpy.run_module('benchmarks.{module}', run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert "pip install 't2t_fast[bench]'" in found.stderr and found.stderr.count("\n") == 1


def test_page_marks_what_got_worse():
    rows = [made_row("upstream", [0.1] * 3), made_row("t2t_fast", [0.2] * 3)]
    rows = [{**row, "mode": "training", "saved_bytes": saved} for row, saved in zip(rows, (1e6, 4e6), strict=True)]
    run = _run(rows)
    text = html(run, frame.frame(run), {})
    assert '<div class="card bad"><b>2.00× slower</b>' in text
    assert '<div class="card bad"><b>4.00× more</b>kept for backward' in text
    assert "<h2>Where this package is slower</h2>" in text and "<tr><td>T2T module, Performer" in text
    assert text.count('class="lost"') == 1


def test_every_suite_has_a_heading():
    assert set(frame.SUITES) == set(groups.TIMED)


def test_order_of_the_rows(made):
    """Lite models first, then modules, latency, operators and scaling, whatever the order of the file."""
    shown = [(row.suite, row.subject) for row in frame.timed(frame.frame(made[1])).itertuples()]
    suites = list(dict.fromkeys(suite for suite, _ in shown))
    assert suites == ["models", "training", "module", "latency", "ops", "scaling"]
    assert made[1].rows[0]["subject"] == "t2t_vit_14" and shown[0] == ("models", "t2t_vit_7")


def test_headline_is_one_group_of_a_subject_and_mode():
    cells = {"b1": (224, 1), "b8": (224, 8), "b64": (224, 64), "big": (384, 8)}
    rows = [made_row("t2t_fast", [0.1], group=name, size=size, batch=batch) for name, (size, batch) in cells.items()]
    for members, group in ((rows, "b8"), (rows[::2], "b64"), (rows[3:], "big")):
        assert list(frame.headline(frame.frame(_run(members)))["group"]) == [group]


def test_farthest_from_the_floor_first(made):
    figure, _ = _figure(made[1], "floor")
    shares = {}
    for text in (text for axis in figure.axes for text in axis.texts if text.get_text()):
        shares.setdefault(text.get_position()[1], []).append(float(text.get_text().split()[0]))
    lowest = [min(shares[y]) for y in sorted(shares)]
    assert lowest == sorted(lowest) and len(set(lowest)) > 3


def test_csv(made):
    folder, run = made
    read = list(csv.DictReader((folder / "rows.csv").open(encoding="utf-8")))
    assert len(read) == len(run.rows) and list(read[0]) == frame.COLUMNS
    for line, row in zip(read, run.rows, strict=True):
        assert (line["group"], line["provider"]) == (row["group"], row["provider"])
        if row["suite"] in ("memory", "processes"):
            continue
        assert float(line["median_s"]) == row["seconds"]["median"] and int(line["rounds"]) == len(row["times"])
        assert line["speedup_p20"] == ("" if row["speedup"] is None else str(row["speedup"]["p20"]))
    ours = next(line for line in read if line["provider"] == "t2t_fast")
    assert ours["backends"] == "performer_layer=native"
    fits = [line for line in read if line["suite"] == "memory"]
    assert [(int(line["batch"]), line["rounds"]) for line in fits] == [(37, ""), (142, ""), (0, ""), (12, "")]
    assert {line["processes"] for line in read if line["suite"] == "processes"} == {"1", "2", "4"}


def test_the_command_writes_the_report_of_a_run(tmp_path, capsys):
    source = tmp_path / "rows.json"
    run_file.write(source, _run(made_run()))
    assert report.main([str(source), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    read = list(csv.DictReader((tmp_path / "out" / "rows.csv").open(encoding="utf-8")))
    assert [line["suite"] for line in read] == ["module"] * 5 + ["models"] * 2
    assert len(Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).rows) == len(read)


@pytest.mark.parametrize("content", ["{}", "no JSON", None], ids=["another file", "no JSON", "missing"])
def test_invalid_run_file(tmp_path, capsys, content):
    source = tmp_path / "rows.json"
    if content is not None:
        source.write_text(content)
    assert report.main([str(source), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m benchmarks.report: ") and "rows.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, ""), (0.01234, "0.0123"), (1.0, "1.00"), (99.96, "100."), (999.7, "1000"), (12345.6, "12346")],
)
def test_number(value, expected):
    assert words.number(value) == expected.rstrip(".")


needs_chromium = pytest.mark.skipif(
    browser.chromium() is None, reason=f"no browser on the PATH: {', '.join(browser.NAMES)}"
)


@needs_chromium
def test_page_in_a_browser(made, tmp_path):
    """The console is empty, pictures have the expected width, nothing exceeds the window, and all of it is drawn."""
    path = made[0] / "report.html"
    facts = """
        const images = [...document.images];
        document.body.dataset.images = images.filter(image => image.naturalWidth > 0).length;
        document.body.dataset.shown = Math.min(...images.map(image => image.clientWidth));
        const rows = document.querySelector(".rows");
        document.body.dataset.wide = document.documentElement.scrollWidth + rows.scrollWidth - rows.clientWidth;"""
    page = browser.load(path, tmp_path / "profile", facts)
    assert page.console == []
    for key, value in (("images", len(NAMES)), ("shown", SHOWN), ("wide", browser.WIDTH)):
        assert f'data-{key}="{value}"' in page.dom
    browser.screenshot(path, tmp_path / "another", tmp_path / "page.png", page.height)
    header = (tmp_path / "page.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (browser.WIDTH, page.height)


@needs_chromium
def test_table_sorts_and_filters_in_a_browser(made, tmp_path):
    script = """
        const heads = [...document.querySelectorAll("#rows th")];
        heads.find(head => head.textContent.startsWith("× upstream")).click();
        const search = document.getElementById("filter");
        search.value = "module TRAINING performer-224";
        search.dispatchEvent(new Event("input"));"""
    page = browser.load(made[0] / "report.html", tmp_path / "profile", script)
    assert page.console == []
    rows = Page(page.dom).rows
    speedups = [row[2 + 8].strip() for row in rows]
    known = [float(text.split()[0]) for text in speedups if text]
    assert known == sorted(known) and len(set(known)) > 3
    assert set(speedups[len(known) :]) == {""} and len(known) < len(rows) == len(_timed(made[1]))
    shown = {group for group, hidden, *_ in rows if not hidden}
    assert shown == {"module-performer-224px-b8-fp32-training"}
    assert f"5 of {len(rows)} rows" in page.dom


@needs_chromium
@pytest.mark.parametrize("script", ["console.error('broken')", "undefined.broken"])
def test_console_errors_are_caught(tmp_path, script):
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><body><script>{script}</script></body>")
    assert browser.load(path, tmp_path / "profile").console
