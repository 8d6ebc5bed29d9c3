"""``python -m benchmarks.report rows.json --out DIR``."""

from .files import main

if __name__ == "__main__":
    raise SystemExit(main())
