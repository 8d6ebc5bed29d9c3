"""What the questions share: the command line, and figures."""

import argparse

import torch

COLORS = {"fp32": "#0072b2", "bf16": "#009e73", "fp16": "#d55e00"}


def parser(name, doc):
    """A command line with ``--device``; ``doc`` is the docstring of ``benchmarks.questions.NAME``."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.questions.{name}", description=doc.splitlines()[0])
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def panels(words, *titles):
    """A figure with two panels side by side, and what was measured above them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(titles), figsize=(12.5, 5.4), layout="constrained")
    figure.suptitle(words, fontsize=9, color="#555555")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path):
    """Write a figure with the legend of its first panel as a PNG. Returns its path."""
    import matplotlib.pyplot as plt

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
