"""The subcommands' arguments, and the functions that import a subcommand and run it."""

import argparse
from importlib import import_module

from ..config import BACKENDS

DTYPES = ("fp32", "fp16", "bf16", "fp64")


def positive(text):
    """An int of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text):
    """A number of seconds, at least 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _device(parser):
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="by default CUDA if there is one"
    )


def _demo(parser):
    parser.add_argument(
        "--photo", metavar="PATH", help="an image file; a photograph of Matplotlib's sample data if not given"
    )
    parser.add_argument(
        "--model", default="t2t_vit_14", metavar="NAME", help="an upstream T2T-ViT, by default %(default)s"
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="weights of that model; random ones if not given")
    parser.add_argument(
        "--img-size",
        type=positive,
        default=224,
        metavar="N",
        help="side of the square input, a multiple of 16; by default %(default)s",
    )
    parser.add_argument(
        "--out", default="demo-report", metavar="DIR", help="where the report goes, by default %(default)s"
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="images a timed run; by default 4, on CUDA 64")
    _device(parser)
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=6.0,
        metavar="S",
        help="time to spend on each timed row, by default %(default)s",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows under torch.compile")


def _verify(parser):
    parser.add_argument(
        "--op", action="append", metavar="NAME", help='an operator, or "model"; may be repeated; all if not given'
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; every one if not given")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; all four if not given")
    _device(parser)


def _env(parser):
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _bench(parser):
    parser.add_argument("--quick", action="store_true", help="only the headline rows: under ten minutes on two cores")
    parser.add_argument(
        "--report",
        "--out",
        metavar="DIR",
        help="folder for report.html, its pictures, CSV and JSON; one of its own if not given",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="tell what is slower in B than in A; 1 if anything is"
    )
    parser.epilog = "Further arguments are handed to the suite (python -m benchmarks -h lists them)."


def _export(parser):
    parser.add_argument("model", metavar="MODEL", help="a name of t2t_fast.list_models()")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--checkpoint", metavar="PATH", help="weights; random ones if not given")
    parser.add_argument(
        "--img-size",
        type=positive,
        nargs="+",
        default=[224],
        metavar="N",
        help="side, or height and width; by default 224",
    )
    parser.add_argument("--in-chans", type=positive, default=3, metavar="N", help="channels of the image, by default 3")
    parser.add_argument(
        "--num-classes", type=int, default=1000, metavar="N", help="classes, 0 for no head; by default 1000"
    )
    parser.add_argument(
        "--format", choices=("onnx", "program", "both"), default="both", help="program: torch.export's; by default both"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="batch size, fixed in the file; by default 1"
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="leave the batch size free")
    parser.add_argument("--name", help="the files' name; by default the model's")


def _runs(module):
    """A function that imports ``cli.<module>`` and calls its ``run``."""
    return lambda options: import_module(f".{module}", __package__).run(options)


COMMANDS = {
    "demo": (
        "a photograph through a T2T-ViT before and after the swap: same logits, time, memory",
        _demo,
        _runs("demo"),
    ),
    "verify": ("compare the fast path with the float64 reference on this machine", _verify, _runs("verify")),
    "env": ("versions, devices, native build, and the backend of each operator with reasons", _env, _runs("env")),
    "bench": ("run the benchmark suite of the source tree", _bench, _runs("bench")),
    "export": ("write a model as ONNX and as a torch.export program of plain operators", _export, _runs("export")),
}
"""Name -> (summary, function that adds the arguments, function that runs it)."""
