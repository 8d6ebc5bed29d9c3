"""pytest's side of the suites: options, one test a row, and how a measured row gets into pytest-benchmark's JSON."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

from .measure import fit, harness, processes
from .measure.session import CONTEXT_LOST, Run
from .suites.groups import DTYPES, ContextLost, LeftOut, groups
from .suites.providers import BY_NAME, providers

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of t2t_fast")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--bench-quick", action="store_true", help="only the headline rows")
    group.addoption("--bench-rows", metavar="FILE", type=Path, help="the run file, rewritten after every row")
    group.addoption("--bench-seconds", type=float, metavar="N", help="start no new group after N seconds")
    group.addoption("--bench-command", metavar="TEXT", default="pytest benchmarks", help="what started the run")


def pytest_configure(config):
    capture = config.pluginmanager.getplugin("capturemanager")
    live = sys.stdout.isatty()

    def write(text):
        with capture.global_and_fixture_disabled():
            terminal = config.pluginmanager.getplugin("terminalreporter")
            if live:
                width = max(40, terminal._tw.fullwidth - 1)
                terminal.write(f"\r\x1b[2K{text[:width]}", flush=True)
            else:
                terminal.write_line(text, flush=True)

    options = ("bench_device", "bench_quick", "bench_rows", "bench_seconds", "bench_command")
    config.stash[RUN] = Run(*(config.getoption(name) for name in options), write, live)


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        run = metafunc.config.stash[RUN]
        cells = [
            (group, provider.name)
            for group in groups(metafunc.module.SUITE, run.device, run.quick)
            for provider in providers(group, run.device)
        ]
        metafunc.parametrize("row", cells, ids=[f"{group.id}-{name}" for group, name in cells])


def pytest_collection_modifyitems(config, items):
    """The headline dtype of every suite before the second one of any."""
    order = DTYPES[config.stash[RUN].device]
    items.sort(key=lambda item: order.index(item.callspec.params["row"][0].dtype) if _has_row(item) else 0)


def pytest_collection_finish(session):
    run = session.config.stash[RUN]
    for item in session.items:
        if _has_row(item):
            run.add(*item.callspec.params["row"])
    run.begin()
    if any(BY_NAME[name].compiled for names in run.plan.values() for name in names):
        # its import is no part of whoever is compiled first
        importlib.import_module("torch._inductor.compile_fx")
    # garbage is collected before each group: to look through all that the imports made takes longer than some of them
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    session.config.stash[RUN].save()


def _has_row(item):
    return "row" in getattr(item, "fixturenames", ())


def pytest_report_teststatus(report):
    """No dots between the lines of progress."""
    if report.when == "call" and report.outcome in ("passed", "skipped"):
        return report.outcome, "", report.outcome.upper()
    return None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""
    machine_info["t2t_fast"] = config.stash[RUN].environment


@pytest.fixture
def find(row, request):
    """A function that finishes a row with ``measure(run, group, name) -> kind, entry``, unless it was finished before.

    Returns the entry; skips with the reason why there is none.
    """
    group, name = row
    run = request.config.stash[RUN]

    def found(measure):
        kept = run.kept(group, name)
        if kept is not None:
            kind, entry = kept
            if kind == "left_out":
                pytest.skip(entry["reason"])
            return entry
        try:
            return measure(run, group, name)
        except LeftOut as reason:
            run.leave_out(group, name, reason)
            pytest.skip(str(reason))
        except ContextLost as failure:
            pytest.exit(str(failure), CONTEXT_LOST)
        except Exception as failure:
            run.leave_out(group, name, failure)
            raise

    return found


@pytest.fixture
def record(row, find, benchmark):
    """A function that has the row measured if need be and hands its rounds to pytest-benchmark."""

    def measure():
        found = find(Run.timed)
        benchmark.group = row[0].id
        benchmark.extra_info["row"] = {key: value for key, value in found.items() if key != "times"}
        harness.REPLAY.load(found["times"])
        benchmark.pedantic(lambda: None, rounds=len(found["times"]), iterations=1)

    return measure


@pytest.fixture
def largest_batch(find):
    """A function that looks for the largest batch of the row's provider."""

    def measure(run, group, name):
        run.check_time()
        run.measure_machine()
        entry = fit.measure(group, name, run.device, lambda text: run.say(f"{group.id}, {name}: {text}"))
        run.finish("fits", entry, group, name)
        return entry

    return lambda: find(measure)


@pytest.fixture
def side_by_side(find):
    """A function that measures the row's provider in several processes."""

    def measure(run, group, name):
        run.check_time()
        run.measure_machine()
        entry = processes.measure(group, name, lambda text: run.say(f"{group.id}, {name}: {text}"))
        run.finish("processes", entry, group, name)
        return entry

    return lambda: find(measure)
