"""The speed of other projects' models before and after ``swap``, on a CPU, as a Markdown table.

``PYTHONPATH=.:tests python tests/support/foreign_speed.py --write docs/swap.md`` measures the models of
``support.foreign`` at realistic sizes and replaces the table between two comments of the page. The original and the
swapped model are copies with the same weights, called in turn, so that a slow phase of the machine meets both.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

from support.foreign import FOREIGN
from support.swapping import flat
from t2t_fast import swap
from t2t_fast.testing import errors

START, END = "<!-- foreign-speed -->", "<!-- /foreign-speed -->"
TOLERANCE = 1e-4


def step(model, images, training):
    """One call; with ``training`` also its backward pass."""
    if not training:
        with torch.no_grad():
            model(images)
        return
    sum(result.square().mean() for result in flat(model(images))).backward()
    model.zero_grad(set_to_none=True)


def timed(model, images, training):
    start = time.perf_counter()
    step(model, images, training)
    return time.perf_counter() - start


def measure(name, real, rounds, seconds):
    """[(original's median, swapped one's median, the rounds' ratios)] of inference and of forward and backward.

    Args:
        rounds: the largest number of rounds; seconds: after which no further round begins, for each of the two.
    """
    before, images = FOREIGN[name].model(real), FOREIGN[name].images(real)
    after = copy.deepcopy(before)
    swap(after)
    with torch.no_grad():
        for ours, theirs in zip(flat(after(images)), flat(before(images)), strict=True):
            error = errors(ours, theirs)[0]
            if not error < TOLERANCE:
                raise RuntimeError(f"{name}: the swapped model's result differs by {error:.1e}")
    found = []
    for training in (False, True):
        pair = before.train(training), after.train(training)
        for model in (*pair, after):  # caches and memory; a remembered call is recorded at the second one
            step(model, images, training)
        begin, times = time.perf_counter(), []
        while len(times) < rounds and (not times or time.perf_counter() - begin < seconds):
            first, second = pair if len(times) % 2 == 0 else pair[::-1]
            one, two = timed(first, images, training), timed(second, images, training)
            times.append((one, two) if len(times) % 2 == 0 else (two, one))
        ratios = [old / new for old, new in times]
        found.append((*(statistics.median(column) for column in zip(*times, strict=True)), ratios))
    return found


def shown(old, new, ratios):
    """Two cells: the times, and the ratio with the 20th and 80th percentile of the rounds."""
    low, high = (
        (min(ratios), max(ratios)) if len(ratios) < 5 else (statistics.quantiles(ratios, n=5)[i] for i in (0, 3))
    )
    unit, scale = ("s", 1.0) if old >= 1.0 else ("ms", 1e3)
    times = f"{old * scale:.3g} {unit} → {new * scale:.3g} {unit}"
    return times, f"{statistics.median(ratios):.2f}× ({low:.2f} – {high:.2f})"


def table(rows, rounds):
    lines = [
        f"Measured on a CPU with {torch.get_num_threads()} threads, torch {torch.__version__}, float32, in up to "
        f"{rounds} rounds; medians, and the 20th and 80th percentile of the rounds in brackets.",
        "",
        "| model | input | inference | speed-up | forward and backward | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def replaced(page, text):
    """A page with another text between the two comments."""
    head, start, rest = page.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page must contain {START} and {END}")
    return f"{head}{START}\n\n{text}\n\n{END}{tail}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="the largest number of rounds")
    parser.add_argument("--seconds", type=float, default=4.0, help="per model and mode, after which no round begins")
    parser.add_argument("--minutes", type=float, default=5.5, help="for all models: late ones get fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests: shows that the script works")
    parser.add_argument("--models", nargs="+", choices=FOREIGN, default=list(FOREIGN))
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    given = parser.parse_args(arguments)
    if given.write is not None:
        replaced(given.write.read_text(), "")  # before the measurement: whether there is a place for the table
    rows, end = [], time.perf_counter() + 60 * given.minutes
    for name in given.models:
        begin = time.perf_counter()
        share = (end - begin) / (len(given.models) - len(rows)) / 3  # two modes, and as much for building and proving
        found = measure(name, not given.tiny, given.rounds, min(given.seconds, share))
        images = FOREIGN[name].images(not given.tiny)
        rows.append([name, " x ".join(map(str, images.shape)), *(cell for each in found for cell in shown(*each))])
        print(f"{name}: {', '.join(rows[-1][2:])}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        gc.collect()
    text = table(rows, given.rounds)
    print(text)
    if given.write is not None:
        given.write.write_text(replaced(given.write.read_text(), text))


if __name__ == "__main__":
    main()
