"""``python -m benchmarks.gpu --out DIR``."""

import sys
import time

from .process import process_age
from .run import main

if __name__ == "__main__":
    sys.exit(main(started=time.monotonic() - process_age()))
