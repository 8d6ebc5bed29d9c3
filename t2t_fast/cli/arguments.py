"""The subcommands' arguments, and the functions that import and run a subcommand."""

import argparse
from collections.abc import Callable
from importlib import import_module

from ..config import BACKENDS

PROJECTS = ("upstream", "mmpretrain", "paddle", "timm", "vit-pytorch", "lanl")
DTYPES = ("fp32", "fp16", "bf16", "fp64")

EXPORT_FORMATS = ("both", "onnx", "program", "aoti", "openvino", "onnx-int8")


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds, at least 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: CUDA if available")


def _demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--photo", metavar="PATH", help="an image file; default: a photograph of Matplotlib's sample data")
    add("--model", default="t2t_vit_14", metavar="NAME", help="an upstream T2T-ViT; default: %(default)s")
    add("--checkpoint", metavar="PATH", help="weights of that model; default: random weights")
    size = "side of the square input, a multiple of 16; default: %(default)s"
    add("--img-size", type=positive, default=224, metavar="N", help=size)
    add("--out", default="demo-report", metavar="DIR", help="folder of the report; default: %(default)s")
    add("--batch", type=positive, metavar="N", help="images per timed call; default: 4, on CUDA 64")
    _device(parser)
    add("--seconds", type=seconds, default=6.0, metavar="S", help="duration of each timed row; default: %(default)s")
    add("--no-compile", action="store_true", help="skip the rows under torch.compile")


def _verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help='an operator, or "model"; may be repeated; default: all')
    add("--backend", action="append", choices=BACKENDS, help="may be repeated; default: all")
    add("--dtype", action="append", choices=DTYPES, help="may be repeated; default: all")
    _device(parser)


def _env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="only the headline rows: under ten minutes on two cores")
    add(
        "--report",
        "--out",
        metavar="DIR",
        help="folder for report.html, its pictures, CSV and JSON; default: a new one",
    )
    add("--resume", action="store_true", help="continue the run in that folder")
    compare = "report the rows of run B that are worse than in A; the exit code is 1 if one is of t2t_fast"
    add("--compare", nargs=2, metavar=("A", "B"), help=compare)
    parser.epilog = "Further arguments are passed to the suite (python -m benchmarks -h lists them)."


def _export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name of t2t_fast.list_models()")
    add("--out", required=True, metavar="DIR", help="folder for the files")
    add("--checkpoint", metavar="PATH", help="weights; default: random weights")
    size = "side, or height and width; default: 224"
    add("--img-size", type=positive, nargs="+", default=[224], metavar="N", help=size)
    add("--in-chans", type=positive, default=3, metavar="N", help="channels of the image; default: 3")
    add("--num-classes", type=int, default=1000, metavar="N", help="classes, 0 for no head; default: 1000")
    formats = (
        "program: a torch.export program; aoti: compiled by AOTInductor; openvino: .xml and .bin; onnx-int8: ONNX with "
        "int8 weights; both: onnx and program; may be repeated; default: both"
    )
    add("--format", action="append", choices=EXPORT_FORMATS, help=formats)
    add("--aoti", dest="format", action="append_const", const="aoti", help="the same as --format aoti")
    add("--batch", type=positive, default=1, metavar="N", help="batch size, fixed in the file; default: 1")
    add("--dynamic-batch", action="store_true", help="leave the batch size free")
    add("--dynamic-size", action="store_true", help="leave height and width free")
    triton = "also write a model repository of the Triton Inference Server, with the onnx, onnx-int8 or aoti file"
    add("--triton-repository", metavar="DIR", help=triton)
    add("--name", help="name of the files; default: the model's")


def _convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="IN", help="a checkpoint of any project, .pth, .safetensors or .pdparams")
    add(
        "target",
        metavar="OUT",
        help="the file to write: .pth, .safetensors or .pdparams, which decides the type",
    )
    add("--to", choices=PROJECTS, help="the project whose names the tensors get; default: the names stay")
    add("--model", metavar="NAME", help="a name of t2t_fast.list_models(); default: found by names and shapes")
    size = "side, or height and width, of the position table; default: a square, by its number of entries"
    add("--img-size", type=positive, nargs="+", metavar="N", help=size)
    add("--qk-scale", type=float, metavar="S", help="attention scale of the model's blocks; default: the model's")
    add("--no-ema", action="store_true", help="use the plain weights where the file has averaged ones too")
    add("--no-head", action="store_true", help="leave the head out")
    add("--trained-with", choices=("mmpretrain",), help="mmpretrain 1.2 trained the weights, with its attention scale")
    add("--no-rescale", action="store_true", help="to mmpretrain: keep the queries for upstream's attention scale")
    add("--overwrite", action="store_true", help="replace an existing OUT")


def run(options: argparse.Namespace) -> int:
    """Import the subcommand's module and run it."""
    return int(import_module(f".{options.command}", __package__).run(options))


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("a photograph through a T2T-ViT before and after the swap: logits, time, memory", _demo),
    "verify": ("compare the fast path with the float64 reference on this machine", _verify),
    "env": ("versions, devices, native build, and the backend of each operator with reasons", _env),
    "bench": ("run the benchmark suite of the source tree", _bench),
    "export": ("write a model as ONNX, torch.export, AOTInductor or OpenVINO files of plain operators", _export),
    "convert": ("write a checkpoint with another project's names or as another file type, and compare both", _convert),
}
"""Name -> (summary, function that adds the arguments)."""
