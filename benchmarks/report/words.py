"""Numbers and sentences of the report."""

NOTES = """\
Rows of a case were measured interleaved, round by round; a speed-up is the median of the rounds' ratios to upstream
eager. "% of floor" is the least time that a fused implementation could take with this machine's own copy bandwidth and
dense products, over the measured time; GB/s and TFLOP/s are that implementation's bytes and FLOPs over the measured
time (so they say how close a row is to it, not what it moved); "% of copy" is these GB/s over those of a copy. Saved:
bytes kept for backward, inputs included; peak: most bytes that a call allocates at a time; neither with the parameters.
First call: compilation and autotuning, or an eager first call. Error: relative, against float64, output and worst
gradient. † computes another function: a yardstick, no replacement. ▼ slower than upstream eager."""
"""Explains the columns."""


def number(value, digits=3):
    """So many significant digits, of large numbers all, without an exponent; nothing for ``None``."""
    if value is None:
        return ""
    if value >= 10**digits - 0.5:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share, digits=3):
    """A share of 1 in percent, without the sign."""
    return number(None if share is None else 100 * share, digits)


def spread(summary, factor=1.0):
    """median (p20 – p80)."""
    if summary is None:
        return ""
    middle, low, high = (number(factor * summary[key]) for key in ("median", "p20", "p80"))
    return f"{middle} ({low} – {high})"


def label(entry):
    """A provider's label, marked where it computes another function."""
    return entry["label"] + ("\u00a0†" if entry["another_function"] else "")


def error(row):
    """The relative errors of the output and, where there is one, of the worst gradient."""
    if row["error"] is None:
        return "not compared" if row["another_function"] else "within dropout's noise"
    gradient = "" if row["gradient_error"] is None else f" / {row['gradient_error']:.0e}"
    return f"{row['error']:.0e}{gradient}"


def megabytes_per_image(row, key):
    """A memory field in MB an image."""
    return None if row[key] is None else row[key] / row["batch"] / 1e6


def products(limits):
    """The measured speeds of dense products, a dtype each."""
    return ", ".join(f"{name} {speed / 1e12:.2f} TFLOP/s" for name, speed in limits["flop_per_s"].items())


def heading(environment):
    """Where and with what a run was measured."""
    limits = environment["limits"]
    where = environment["device"]
    if environment.get("driver"):
        where += f", driver {environment['driver']}"
    return (
        f"{environment['date'][:10]}, {where}; t2t_fast {environment['t2t_fast']}, torch {environment['torch']}, "
        f'Python {environment["Python"]}; torch.compile mode "{environment["compile_mode"]}"; '
        f"measured limits: copy {limits['bytes_per_s'] / 1e9:.1f} GB/s, {products(limits)}."
    )


def signature(environment):
    """The same in one short line, for pictures."""
    return (
        f"{environment['date'][:10]} · {environment['device']} · torch {environment['torch']} · "
        f"t2t_fast {environment['t2t_fast']}"
    )


def without_numbers(left_out):
    """(cases, provider, reason) for each provider and reason: its groups or, of more than three, their number."""
    groups = {}
    for each in left_out:
        groups.setdefault((each["provider"], each["reason"]), []).append(each["group"])
    return [
        (", ".join(names) if len(names) <= 3 else f"{len(names)} cases", provider, reason)
        for (provider, reason), names in groups.items()
    ]


def amdahl(members):
    """What replacing the front end alone can bring to a model, or nothing."""
    for row in members:
        share, limit = row["front_end_share"], row["amdahl_limit"]
        if share:
            # timed apart, it can take longer than inside a model that meets memory which is mapped already
            words = f"Amdahl's limit {limit:.2f}×" if limit else "which sets no limit"
            return f"front end {100 * share:.0f} % of upstream's time, {words}"
    return ""
