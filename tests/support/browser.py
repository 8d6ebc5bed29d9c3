"""Pages in headless Chromium: console messages, the DOM after the scripts ran, and screenshots."""

import re
import shutil
import subprocess
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
WIDTH = 1280


class Page(NamedTuple):
    """The page's HTML after loading, its console messages, and its height in pixels."""

    dom: str
    console: list
    height: int


def chromium():
    """The path of Chromium, or ``None``."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def _run(path, profile, *options, height):
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *OFFLINE]
    command += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", *options, path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found


def load(path, profile, script="", height=900):
    """Open a copy of a page with ``script`` run at its end; ``profile``: an empty folder for Chromium."""
    copy = path.with_name(f"{path.stem}-opened.html")
    measure = "document.body.dataset.pageHeight = document.documentElement.scrollHeight;"
    text = path.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"<script>{script}\n{measure}</script></body>"), encoding="utf-8")
    found = _run(copy, profile, "--dump-dom", height=height)
    console = [line for line in found.stderr.splitlines() if ":CONSOLE" in line]
    return Page(found.stdout, console, int(re.search(r'data-page-height="(\d+)"', found.stdout)[1]))


def screenshot(path, profile, target, height):
    """Write a screenshot of the page; ``height`` is in pixels."""
    _run(path, profile, f"--screenshot={target}", height=height)
