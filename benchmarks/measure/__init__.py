"""How it is measured: clocks, interleaved rounds, a run and its file."""
