"""Pieces of the report's HTML: one file with its pictures inside, so that it opens without network."""

import base64
from html import escape
from pathlib import Path

STYLE = """
:root { --ink: #1c2530; --muted: #5f6b7a; --line: #e3e8ee; --after: #0a7d72; --alarm: #c8323a }
* { box-sizing: border-box }
body { margin: 0; background: #f6f8fa; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em }
h2 { font-size: 21px; margin: 48px 0 6px }
p { margin: 6px 0 14px; max-width: 78ch }
.lead { font-size: 18px; color: var(--muted) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 14px; margin: 26px 0 }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px }
.card b { display: block; font-size: 27px; line-height: 1.2; color: var(--after); font-variant-numeric: tabular-nums }
.card.bad b { color: var(--alarm) }
.card span { color: var(--muted); font-size: 14px }
.note { border-left: 4px solid #d9a441; background: #fff8e8; padding: 10px 16px; border-radius: 0 8px 8px 0 }
.bad.note { border-color: var(--alarm); background: #fdeeee }
figure { margin: 14px 0 8px; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px }
img { display: block; width: 100%; height: auto }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); font-size: 14.5px; margin: 12px 0;
  font-variant-numeric: tabular-nums }
th, td { padding: 6px 14px; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left }
th { color: var(--muted); font-weight: 600 }
pre { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace }
.wide { overflow-x: auto }
footer { margin-top: 48px; color: var(--muted); font-size: 14px }
"""


def figure(path, alt):
    """The PNG file at ``path`` inside the page; ``alt`` says what it shows."""
    code = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{code}" alt="{escape(alt)}"></figure>'


def table(head, rows, marks=None):
    """A table of plain cells, escaped here; ``marks``: a CSS class for each row, "" for none."""

    def line(cells, tag, mark=""):
        start = f'<tr class="{mark}">' if mark else "<tr>"
        return start + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    rows = list(rows)
    marks = [""] * len(rows) if marks is None else marks
    body = "".join(line(row, "td", mark) for row, mark in zip(rows, marks, strict=True))
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def card(number, words, bad=False):
    """A large number over what it is; red where it is ``bad``."""
    return f'<div class="card{" bad" if bad else ""}"><b>{escape(number)}</b><span>{escape(words)}</span></div>'


def cards(members):
    """Cards side by side."""
    return f'<div class="cards">{"".join(members)}</div>'


def document(title, parts, style=STYLE, script=""):
    """The whole page: a plain-text title and pieces of HTML, of which empty ones are left out."""
    end = f"<script>{script}</script>\n" if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f"<body><main>\n{chr(10).join(part for part in parts if part)}\n</main>{end}</body></html>\n"
    )
