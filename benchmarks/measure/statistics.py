"""Medians and percentiles of rounds."""

from statistics import median


def percentile(values, share):
    """The ``share`` (0 to 1) percentile, linear between the two nearest values."""
    values = sorted(values)
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def summary(values):
    """Median, 20th and 80th percentile."""
    return {"median": median(values), "p20": percentile(values, 0.2), "p80": percentile(values, 0.8)}


def ratios(numerators, denominators):
    """Summary of the rounds' ratios."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])
