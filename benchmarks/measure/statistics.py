"""Medians and percentiles of rounds."""

import numpy as np


def summary(values, **shares):
    """Name -> percentile, linear between the two nearest values; by default the median, the 20th and the 80th."""
    shares = shares or {"median": 0.5, "p20": 0.2, "p80": 0.8}
    return dict(zip(shares, np.quantile(values, list(shares.values())).tolist(), strict=True))


def ratios(numerators, denominators):
    """Summary of the rounds' ratios."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])
