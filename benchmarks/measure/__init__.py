"""How it is measured: clocks, rounds, a run and its file."""
