"""``python -m t2t_fast`` is the command ``t2t-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
