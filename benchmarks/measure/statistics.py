"""Medians and percentiles of rounds."""

import numpy as np


def percentile(values, share):
    """The ``share`` (0 to 1) percentile, linear between the two nearest values."""
    return float(np.quantile(values, share))


def summary(values):
    """Median, 20th and 80th percentile."""
    return {"median": percentile(values, 0.5), "p20": percentile(values, 0.2), "p80": percentile(values, 0.8)}


def ratios(numerators, denominators):
    """Summary of the rounds' ratios."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])
