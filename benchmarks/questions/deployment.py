"""Exported files in runtimes without Python: ``python -m benchmarks.questions.deployment [--write PAGE]``.

Upstream's model (``t2t_fast.reference``) is exported by ``torch.onnx.export`` and by AOTInductor for one batch and one
image size. The swapped model is exported by ``export_model`` for the same size, and that of ``create_model`` once for
every batch and size. ONNX Runtime and OpenVINO read the same ONNX files. Each runtime has a process of its own, in
which the files run in turn, round by round. Before that, each result is compared with upstream's in float64.

``--folder`` keeps the files and the measured rows; what is there is not made or measured again, so a long measurement
can be made in parts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from ..measure.statistics import ratios, summary
from ..measure.text_tables import markdown

START, END = "<!-- deployment -->", "<!-- /deployment -->"
SIZE, MODELS, BATCHES = 224, ("t2t_vit_7", "t2t_vit_14"), (8, 1)
UPSTREAM, FIXED, FREE, RESHAPED = "upstream", "fixed", "free", "free, then reshaped"
TOLERANCE = {"OpenVINO, bf16": 0.1}  # of the largest output; 1e-4 in float32
HEADS = (
    "model",
    "batch",
    "runtime",
    "upstream",
    "t2t_fast",
    "speed-up",
    "free size",
    "speed-up",
    "error: ours, theirs",
)


def _onnx_runtime(path, shape, threads, precision):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def _openvino(path, shape, threads, precision):
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(shape)
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda x: next(iter(request.infer({0: x}, share_inputs=True).values())).copy()


def _aot_inductor(path, shape, threads, precision):
    import torch

    torch.set_num_threads(threads)
    package = torch._inductor.aoti_load_package(path)

    def run(x):
        with torch.no_grad():
            found = package(torch.from_numpy(x))
        return (found[0] if isinstance(found, (tuple, list)) else found).numpy()

    return run


# Name -> how to load a file, the ending of its files, the precision, the forms that run there
RUNTIMES = {
    "OpenVINO": (_openvino, ".onnx", "f32", (UPSTREAM, FIXED, FREE, RESHAPED)),
    "OpenVINO, bf16": (_openvino, ".onnx", "bf16", (UPSTREAM, FIXED, FREE, RESHAPED)),
    "ONNX Runtime": (_onnx_runtime, ".onnx", "f32", (UPSTREAM, FIXED, FREE)),
    "AOTInductor": (_aot_inductor, ".aoti.pt2", "f32", (UPSTREAM, FIXED)),
}


def path_of(folder, model, form, batch, ending):
    """Where a form's file is; the files of a free size serve every batch."""
    return folder / (f"{model}-free{ending}" if form in (FREE, RESHAPED) else f"{model}-{form}-{batch}{ending}")


def models(name, size):
    """Upstream's model and the two of this package, with the same weights."""
    import copy

    import torch

    import t2t_fast
    from t2t_fast import reference

    torch.manual_seed(0)
    upstream = getattr(reference, name)(img_size=size).eval()
    swapped = copy.deepcopy(upstream)
    t2t_fast.swap(swapped)
    free = t2t_fast.create_model(name, img_size=size).eval()
    free.load_state_dict(upstream.state_dict())
    return {UPSTREAM: upstream, FIXED: swapped, FREE: free}


def make(folder, model, form, batch, ending, size):
    """Export one file, unless it is there."""
    path = path_of(folder, model, form, batch, ending)
    if path.exists():
        return
    import torch

    import t2t_fast

    module = models(model, size)[form]
    if form != UPSTREAM:
        formats = {".onnx": "onnx", ".aoti.pt2": "aoti"}[ending]
        free = {"dynamic_batch": form == FREE, "dynamic_size": form == FREE}
        name = path.name.removesuffix(ending)
        t2t_fast.export_model(
            module, folder, name=name, img_size=size, batch=batch, formats=formats, check=False, **free
        )
        return
    x = torch.zeros(batch, 3, size, size)
    with torch.no_grad():
        if ending == ".onnx":
            torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False).save(str(path))
        else:
            torch._inductor.aoti_compile_and_package(torch.export.export(module, (x,)), package_path=str(path))


def expected(folder, model, batch, size):
    """Images, and upstream's result in float64, in a file."""
    path = folder / f"{model}-{batch}-{size}.npz"
    if not path.exists():
        import torch

        from t2t_fast.testing import natural_images

        x = natural_images(batch, 3, size, size)
        with torch.no_grad():
            y = models(model, size)[UPSTREAM].double()(x.double())
        np.savez(path, x=x.numpy(), y=y.numpy())
    return path


def serve(runtime, rounds, threads, data, files):
    """Time files in turn; files: form -> path. Form -> the times in seconds and the error."""
    load, _, precision, _ = RUNTIMES[runtime]
    arrays = np.load(data)
    x, y = arrays["x"], arrays["y"]
    loaded = {
        form: load(path, x.shape if form == RESHAPED else None, threads, precision) for form, path in files.items()
    }
    found = {form: {"times": []} for form in loaded}
    for form, run in loaded.items():
        for _ in range(3):
            result = run(x)
        error = float(np.abs(np.nan_to_num(result - y, nan=np.inf)).max() / np.abs(y).max())
        if not error < TOLERANCE.get(runtime, 1e-4):
            raise RuntimeError(f"{runtime}: the result of {files[form]} differs by {error:.1e} of the largest output")
        found[form]["error"] = error
    for index in range(rounds):
        for form in list(loaded)[:: 1 if index % 2 == 0 else -1]:
            start = time.perf_counter()
            loaded[form](x)
            found[form]["times"].append(time.perf_counter() - start)
    return found


def measure(folder, model, batch, runtime, rounds, threads, size):
    """The result of :func:`serve` in a process of its own, kept in the folder."""
    kept = folder / f"{model}-{batch}-{runtime.replace(', ', '-').replace(' ', '-')}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    ending, forms = RUNTIMES[runtime][1], RUNTIMES[runtime][3]
    files = {form: str(path_of(folder, model, form, batch, ending)) for form in forms}
    call = [runtime, rounds, threads, str(expected(folder, model, batch, size)), files]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "benchmarks.questions.deployment", "--serve", json.dumps(call)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    kept.write_text(json.dumps(found))
    return found


def row(model, batch, runtime, found):
    """The cells of :data:`HEADS`."""
    times = {form: [1e3 * each for each in found[form]["times"]] for form in found}

    def cells(form):
        if form not in times:
            return "-", "-"
        low, middle, high = (ratios(times[UPSTREAM], times[form])[name] for name in ("p20", "median", "p80"))
        return f"{summary(times[form])['median']:.3g} ms", f"{middle:.2f}× ({low:.2f} - {high:.2f})"

    errors = " ".join(f"{found[form]['error']:.0e}" for form in (FIXED, UPSTREAM))
    return (model, batch, runtime, cells(UPSTREAM)[0], *cells(FIXED), *cells(FREE), errors)


def table(rows, found, rounds, threads, size):
    """The rows as Markdown, with what was measured."""
    from t2t_fast.environment import cpu_name, version

    reshaped = [
        f"{model}, batch {batch}, {runtime}: {ratios(each[UPSTREAM]['times'], each[RESHAPED]['times'])['median']:.2f}×"
        for (model, batch, runtime), each in found.items()
        if RESHAPED in each
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "openvino"))
    words = (
        f"Measured on {cpu_name()}, {threads} threads, {packages}, {size} px, up to {rounds} rounds: medians, with the "
        "20th and 80th percentile of the rounds in brackets. Errors are relative to the largest logit."
    )
    end = f"Files of a free size after `model.reshape` in OpenVINO: {'; '.join(reshaped)}." if reshaped else ""
    return "\n".join([words, "", *markdown(HEADS, rows), *(["", end] if end else [])])


def replaced(page, text):
    """A page with another text between the two comments."""
    head, start, rest = page.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page must contain {START} and {END}")
    return f"{head}{START}\n\n{text}\n\n{END}{tail}"


def main(argv=None):
    """Print the table, and write it into a page if asked."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.questions.deployment", description=__doc__.split("\n")[0]
    )
    command.add_argument("--models", nargs="+", default=MODELS)
    command.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    command.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    command.add_argument("--size", type=int, default=SIZE)
    command.add_argument("--rounds", type=int, default=20)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument(
        "--folder", type=Path, help="keep files and rows here, and do not make those again that are there"
    )
    command.add_argument("--files-only", action="store_true", help="make the files and measure nothing")
    command.add_argument("--write", type=Path, help="a page whose table is replaced")
    command.add_argument("--serve", help=argparse.SUPPRESS)
    given = command.parse_args(argv)
    if given.serve is not None:
        print(json.dumps(serve(*json.loads(given.serve))))
        return
    if given.write is not None:
        replaced(given.write.read_text(), "")  # before the measurement: whether there is a place for the table
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        calls = [
            (model, batch, runtime) for model in given.models for batch in given.batches for runtime in given.runtimes
        ]
        for model, batch, runtime in calls:
            _, ending, _, forms = RUNTIMES[runtime]
            for form in forms:
                if form != RESHAPED:
                    make(folder, model, form, batch, ending, given.size)
            expected(folder, model, batch, given.size)
        if given.files_only:
            return
        found = {call: measure(folder, *call, given.rounds, given.threads, given.size) for call in calls}
    text = table([row(*call, each) for call, each in found.items()], found, given.rounds, given.threads, given.size)
    print(text)
    if given.write is not None:
        given.write.write_text(replaced(given.write.read_text(), text))


if __name__ == "__main__":
    main()
