"""Peers in processes of their own: the processes, OpenVINO and ONNX Runtime with upstream's graph, their failures."""

import gc
import multiprocessing
import signal
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.measure import harness
from benchmarks.report.goals import judge
from benchmarks.suites import goals, groups, providers, remote, runtimes, subjects
from benchmarks.suites.groups import Group, LeftOut
from support import ROOT, graphs
from support.rows import made_row

IMAGES = np.arange(6, dtype=np.float32).reshape(2, 3)
GROUP = Group("module", "performer", 32, 2, "fp32", "inference", False, "latency")


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


def _worker(load, *arguments, copies=1):
    return remote.Worker("peer", load, arguments, IMAGES, copies)


def _measure(group=GROUP, names=("upstream", "openvino", "onnxruntime"), **options):
    return harness.measure(group, list(names), "cpu", 0.0, lambda text: None, **options)


def test_a_worker_answers_with_its_output_and_its_own_seconds():
    worker = _worker(graphs.scaled, 2)
    try:
        assert np.array_equal(worker.output(), 2 * IMAGES)
        assert 0 < worker.turn() < 0.1
    finally:
        worker.close()
    worker.close()
    with pytest.raises(RuntimeError, match="peer: its process was ended before"):
        worker.turn()


def test_a_worker_rotates_its_inputs_and_has_no_pytorch():
    worker = _worker(graphs.places, copies=3)
    found = [worker.output() for _ in range(6)]
    worker.close()
    places = [place for place, _ in found]
    assert len(set(places)) == 3 and places[:3] == places[3:]
    assert not any(imported for _, imported in found)


def test_what_a_worker_imports_does_not_import_pytorch():
    names = "benchmarks.__main__, benchmarks.suites.remote, benchmarks.suites.runtimes"
    words = [sys.executable, "-c", f"import sys, {names}; print('torch' in sys.modules)"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [("left out", LeftOut, "^not on this processor$"), ("cut", RuntimeError, "^ForeignError: the graph is cut$")],
)
def test_a_worker_that_cannot_load_is_ended(kind, error, words):
    with pytest.raises(error, match=words):
        _worker(graphs.broken, kind)


def test_a_worker_that_dies_or_hangs_is_ended(monkeypatch):
    worker = _worker(graphs.dying, "", "", 1, 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^peer: its process ended \(SIGKILL\)$"):
            worker.turn()
    worker.close()
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.2)
    monkeypatch.setattr(remote, "END_SECONDS", 0.2)
    worker = _worker(graphs.slow, 60)
    with pytest.raises(RuntimeError, match=r"^peer: its process gave no answer within 0 s and was ended$"):
        worker.turn()


def test_a_worker_ends_when_nothing_refers_to_it():
    worker = _worker(graphs.scaled, 1)
    process = worker._process
    del worker
    gc.collect()
    process.join(10)
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The path of the graph of :data:`GROUP`'s module."""
    subject = subjects.build(GROUP, "cpu")
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    return runtimes.export(deepcopy(subject.original).eval(), subject.images, path)


@pytest.fixture
def exported(monkeypatch, graph):
    """Replaces the export, which takes seconds, by :func:`graph`."""
    monkeypatch.setattr(runtimes, "export", lambda module, images, path: graph)


def test_other_runtimes_are_checked_and_timed(exported):
    folders = set(_folders())
    results = _measure()
    for name in ("openvino", "onnxruntime"):
        row = results[name]
        assert isinstance(row, harness.Participant), row
        assert len(row.times) == harness.ROUNDS["latency"][0] and min(row.times) > 0
        assert 0 < row.facts["error"] < 1e-5
        assert row.facts["saved_bytes"] is row.facts["peak_bytes"] is row.facts["unfused"] is None
    assert set(_folders()) <= folders


def _folders():
    return [path.name for path in Path(tempfile.gettempdir()).glob("t2t-fast-graph-*")]


def test_bfloat16_is_computed_or_its_reason_is_given(exported):
    results = _measure(GROUP._replace(dtype="bf16"), ["upstream", "openvino", "onnxruntime", "t2t_fast-fp32"])
    if isinstance(results["openvino"], LeftOut):
        assert str(results["openvino"]) == "OpenVINO computes in bfloat16 only on processors that have it"
    else:
        assert results["openvino"].facts["error"] > 1e-4
    if isinstance(results["onnxruntime"], LeftOut):
        assert "bfloat16 only on 64-bit Arm processors" in str(results["onnxruntime"])
    assert results["upstream"].facts["error"] > 1e-4 > results["t2t_fast-fp32"].facts["error"]


def test_onnx_runtime_accepts_its_settings_for_arm(monkeypatch, graph):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(runtimes.platform, "machine", lambda: "aarch64")
    call = runtimes.load_onnxruntime(graph, "bf16", 1)
    assert call(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 4, subjects.MODULE_WIDTH)


@pytest.mark.parametrize("package", ["openvino", "onnxscript"])
def test_a_missing_package_leaves_its_rows_out_with_a_reason(monkeypatch, package):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == package else object())
    monkeypatch.setattr(runtimes, "RUNTIMES", {"openvino": runtimes.RUNTIMES["openvino"]})
    results = _measure(names=["upstream", "openvino"])
    assert isinstance(results["openvino"], LeftOut)
    assert str(results["openvino"]) == f"the package {package} is not installed"
    assert results["upstream"].times


def test_a_wrong_graph_is_not_timed(monkeypatch, graph, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import numpy_helper

    model = onnx.load(graph)
    (bias,) = [each for each in model.graph.initializer if each.name.endswith("project.bias")]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    monkeypatch.setattr(runtimes, "export", lambda *call: str(tmp_path / "wrong.onnx"))
    results = _measure(names=["upstream", "onnxruntime"])
    assert isinstance(results["onnxruntime"], LeftOut) and results["upstream"].times
    assert "failed: AssertionError: latency-performer-32px-b2-fp32-inference: output is wrong by" in str(
        results["onnxruntime"]
    )


def test_a_peer_that_dies_in_the_rounds_leaves_the_others(monkeypatch, exported):
    monkeypatch.setitem(runtimes.RUNTIMES, "openvino", runtimes.Runtime("a runtime", graphs.dying))
    results = _measure(names=["upstream", "openvino", "t2t_fast"], rounds=6)
    assert str(results["openvino"]) == "failed: RuntimeError: openvino: its process ended (SIGKILL)"
    assert [len(results[name].times) for name in ("upstream", "t2t_fast")] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_the_exported_model_is_upstreams(name):
    group = Group("model", name, 224, 1, "fp32", "inference", False, "models")
    results = _measure(group)
    assert {name: result.facts["error"] < 1e-5 for name, result in results.items()} == dict.fromkeys(results, True)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_real_run_that_is_ended_leaves_no_process(tmp_path, sent):
    words = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--suite", "latency"]
    words += ["--filter", "performer", "--report", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert any("interleaved rounds of" in line for line in run.stdout)  # reads no further than this line
        below = psutil.Process(run.pid).children(recursive=True)
        workers = [each for each in below if each.parent().pid != run.pid and "spawn_main" in " ".join(each.cmdline())]
        assert len(workers) == 2
        # the process of the suites is killed, as by a lack of memory; the command itself is interrupted
        workers[0].parent().kill() if sent == signal.SIGKILL else run.send_signal(sent)
        said = run.stdout.read()
        assert run.wait(60) == {signal.SIGKILL: 128 + signal.SIGKILL, signal.SIGINT: 130}[sent], said
        _, alive = psutil.wait_procs(below, timeout=15)
        assert not alive


def test_other_runtimes_are_peers_of_inference_on_a_cpu():
    for device in ("cpu", "cuda"):
        for suite in groups.SUITES:
            for group in groups.groups(suite, device, quick=False):
                names = {provider.name for provider in providers.providers(group, device)}
                wanted = device == "cpu" and suite in ("models", "latency")
                assert (names & runtimes.RUNTIMES.keys() == runtimes.RUNTIMES.keys()) == wanted, group
                assert wanted or not names & runtimes.RUNTIMES.keys()
                assert ("t2t_fast-fp32" in names) == (device == "cpu" and group.dtype == "bf16")


def test_bfloat16_on_a_cpu():
    found = [group for suite in groups.SUITES for group in groups.groups(suite, "cpu", quick=False)]
    half = [group for group in found if group.dtype == "bf16"]
    assert {group.suite for group in half} == {"module", "models", "training", "latency"}
    assert {(group.size, group.batch) for group in half} == {(224, 8), (224, 1)}
    quick = [group for suite in groups.SUITES for group in groups.groups(suite, "cpu", quick=True)]
    assert {group.dtype for group in quick} == {"fp32"}


def test_one_filter_selects_the_rows_of_all_goals():
    planned = providers.plan(groups.SUITES, "cpu", False, providers.matching("goal"))
    names = {(group.id, name) for group, names in planned.items() for name in names}
    assert names <= goals.ROWS and all("upstream" in names for names in planned.values())
    for kind, batch in (("model", 8), ("latency", 1)):
        for model in ("t2t_vit_7", "t2t_vit_14"):
            for dtype in ("fp32", "bf16"):
                group = f"{kind}-{model}-224px-b{batch}-{dtype}-inference"
                assert {(group, "openvino"), (group, "t2t_fast")} <= names
    assert {("module-performer-224px-b8-bf16-training", name) for name in ("t2t_fast", "t2t_fast-fp32")} <= names


def test_goals_against_another_runtime_are_named_with_dtype_and_batch():
    fields = dict(level="model", subject="t2t_vit_7", dtype="bf16", batch=1, suite="latency")
    group = "latency-t2t_vit_7-224px-b1-bf16-inference"
    rows = [
        made_row(name, [seconds] * 3, group=group, **fields) for name, seconds in (("openvino", 1), ("t2t_fast", 2))
    ]
    (goal,) = judge(rows)
    assert goal.what == "t2t_vit_7, one image, bfloat16, inference: t2t_fast faster than openvino"
    assert (goal.verdict, goal.measured) == ("not reached", "0.50x (0.50 to 0.50)")
