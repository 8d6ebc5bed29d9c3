"""Options, markers and the state that every test starts from."""

import contextlib
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; Triton decides that when it defines them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support import interpreter
from t2t_fast import backends
from t2t_fast.config import BACKENDS
from t2t_fast.ops._common import native_library as native
from t2t_fast.ops._common import triton_runtime

ROOT = Path(__file__).resolve().parent.parent

with contextlib.suppress(ImportError):  # test_properties.py skips without it
    from hypothesis import settings

    settings.register_profile("long")  # make properties

if triton_runtime.INTERPRETED:
    interpreter.hasten()

# pytest-xdist marks its workers by environment variables. Commands that tests run must not inherit them:
# pytest-benchmark would measure nothing in the benchmarks' own suites.
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]


def pytest_addoption(parser):
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=[name for name in BACKENDS if name != "auto"],
        help="fail each test of this backend that would be skipped; may be given several times",
    )


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def pytest_configure(config):
    """Give every run compile caches of its own, which workers and child processes share; divide cores among workers.

    A run that is killed while it compiles leaves incomplete files. In the user's caches they would make every later run
    fail. The folder's name is new in each run, so nothing that is left over is ever read.
    """
    if hasattr(config, "workerinput"):
        # workers inherit the controller's caches; more threads than cores would only wait for each other
        threads = max(1, cores() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        return
    folder = tempfile.mkdtemp(prefix="t2t_fast-test-caches-")
    environment = pytest.MonkeyPatch()
    for variable in CACHES:
        environment.setenv(variable, os.path.join(folder, variable.lower()))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.add_cleanup(environment.undo)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For ``-n auto``: one worker per core and per 4 GB of memory (a worker uses up to 3 GB), at most eight."""
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return max(1, min(cores(), int(gigabytes / 4), 8))


@cache
def _makes_once(path):
    """Whether a test file has a module-wide fixture."""
    return 'scope="module"' in (ROOT / path).read_text(encoding="utf-8")


def scope(nodeid):
    """The unit that one worker runs: a file with a module-wide fixture, or a single test."""
    path = nodeid.partition("::")[0]
    return path if _makes_once(path) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The scheduler of ``--dist loadgroup``; xdist's own does not group under pytest 9.2."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        # long tests start first, so that none runs alone at the end
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    without_device = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(without_device)


@pytest.fixture(autouse=True)
def known_state():
    """Every test starts with seed 0, and memory that it allocates but does not write is NaN (the maximum for integers).

    The fill is PyTorch's own and reaches every eager allocation; buffers inside code made by ``torch.compile`` are
    not filled. It needs deterministic mode, here with warnings only, because some CUDA kernels have no such form.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def self_tests(request, monkeypatch):
    """Interpreted kernels skip the self-test at their first call, which would take most of a test's time.

    Tests marked ``self_test`` run it; there no kernel is known to work yet.
    """
    if request.node.get_closest_marker("self_test") is not None:
        monkeypatch.setattr(triton_runtime, "_trials", {})
    elif triton_runtime.INTERPRETED:
        monkeypatch.setattr(triton_runtime, "trial", lambda *call: None)


def _running(request):
    """The backend of a fixture's parameter; skips where it cannot run the test's ``dtype`` (float32 by default)."""
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32
    wanted = backends.Request("cpu", dtype, {})
    reasons = {
        "native": native.reason(wanted, native.devices("performer_layer"), native.SINGLE),
        "triton": triton_runtime.reason(wanted),
    }
    if reasons.get(request.param) is not None:
        pytest.skip(f"{request.param}: {reasons[request.param]}")
    return request.param


@pytest.fixture(params=["aten", "native"])
def fused(request):
    """Each fused backend that implements every operator, on this CPU."""
    return _running(request)


@pytest.fixture(params=["aten", "native", "triton"])
def attending(request):
    """Each fused backend that implements the attention, on this CPU (Triton interpreted)."""
    return _running(request)


def cut_off(x, bits):
    """float32 with its last mantissa bits truncated, as matrix units read TF32 (13 bits less)."""
    return (x.view("int32") & -(1 << bits)).view("float32")


def towards_zero(x):
    """float64 rounded towards zero to float32."""
    nearest = x.astype("float32")
    beyond = abs(nearest.astype("float64")) > abs(x)
    return (nearest.view("int32") - beyond).view("float32")  # the next integer below is the next float towards zero


TERMS = 8
"""Number of TF32 products that a matrix unit sums at a time."""


@pytest.fixture
def matrix_units(monkeypatch):
    """Emulates matrix units for float32: TF32 operands of 10 bits, and the sum truncated after every 8 terms.

    Returns the set of operand types and precisions that were used.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original, seen = builder.create_dot, set()

    def create_dot(self, a, b, d, precision, *rest):
        name = str(precision).rpartition(".")[-1].lower()
        if a.data.dtype != "float32":
            seen.add(str(a.data.dtype))
            return original(self, a, b, d, precision, *rest)
        seen.add(name)
        # the interpreter computes the second one in bfloat16, whose values TF32 can represent
        assert name in ("tf32", "tf32x3"), name
        first, second = (cut_off(part.data, 13).astype("float64") for part in (a, b))
        total = d.data
        for begin in range(0, first.shape[1], TERMS):
            part = first[:, begin : begin + TERMS] @ second[begin : begin + TERMS]
            total = towards_zero(total.astype("float64") + part)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    return seen


def _fail_if_required(report, config, parameters=()):
    """Turn a skip into a failure if it concerns a backend that ``--require-backend`` names.

    A skip concerns a backend if the test is parametrized with its name or the reason for the skip mentions it.
    """
    reason = report.longrepr[2]
    for name in config.getoption("--require-backend"):
        if name in parameters or re.search(rf"\b{name}\b", reason):
            report.outcome = "failed"
            report.longrepr = f"--require-backend {name}, but {report.nodeid} would be skipped: {reason}"
            return


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        _fail_if_required(report, item.config, [value for value in parameters if isinstance(value, str)])
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped:
        _fail_if_required(report, collector.config)
    return report
