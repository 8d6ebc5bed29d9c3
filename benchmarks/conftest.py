"""pytest's side of the suites: options, one test a row, and how a measured row gets into pytest-benchmark's JSON."""

import pytest

from . import harness
from .groups import LeftOut, groups
from .providers import providers
from .session import Run

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of t2t_fast")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--bench-quick", action="store_true", help="only the headline rows")
    group.addoption("--bench-rows", metavar="FILE", help="normalised rows as JSON, rewritten after every row")
    group.addoption("--bench-seconds", type=float, metavar="N", help="start no new group after N seconds")


def pytest_configure(config):
    def write_line(text):
        capture = config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            config.pluginmanager.getplugin("terminalreporter").write_line(text)

    options = ("bench_device", "bench_quick", "bench_rows", "bench_seconds")
    config.stash[RUN] = Run(*(config.getoption(name) for name in options), write_line)


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        run = metafunc.config.stash[RUN]
        cells = [
            (group, provider.name)
            for group in groups(metafunc.module.LEVEL, run.device, run.quick)
            for provider in providers(group, run.device)
        ]
        metafunc.parametrize("row", cells, ids=[f"{group.id}-{name}" for group, name in cells])


def pytest_collection_finish(session):
    for item in session.items:
        if "row" in getattr(item, "fixturenames", ()):
            session.config.stash[RUN].add(*item.callspec.params["row"])


def pytest_report_teststatus(report):
    """No dots between the lines of progress."""
    return ("passed", "", "PASSED") if report.when == "call" and report.passed else None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""
    machine_info["t2t_fast"] = config.stash[RUN].environment


@pytest.fixture
def record(row, benchmark, request):
    """A function that measures the row's group if need be and hands the row's rounds to pytest-benchmark."""
    group, name = row
    run = request.config.stash[RUN]

    def leave_out(reason):
        run.leave_out(group, name, reason)
        benchmark.skipped = True
        pytest.skip(reason)

    def measure():
        if run.out_of_time(group):
            leave_out(f"the time limit of {run.limit:.0f} s had passed")
        result = run.result(group, name)
        if isinstance(result, LeftOut):
            leave_out(str(result))
        if isinstance(result, Exception):
            run.leave_out(group, name, f"failed: {type(result).__name__}: {result}")
            raise result
        found = run.row(group, name)
        benchmark.group = group.id
        benchmark.extra_info["row"] = {key: value for key, value in found.items() if key != "times"}
        harness.REPLAY.load(result.times)
        benchmark.pedantic(lambda: None, rounds=len(result.times), iterations=1)

    return measure
