"""Code that several tests share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the repository."""

ARCHIVE = (ROOT / "PKG-INFO").exists()
"""Whether this is an unpacked source archive, which lacks what MANIFEST.in leaves out."""
LEFT_OUT = "MANIFEST.in leaves the files of this test out of a source archive"
