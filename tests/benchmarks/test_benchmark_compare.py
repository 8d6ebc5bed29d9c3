"""Comparison of two runs: noise bands, verdicts on known changes, exit codes, old files."""

import gzip
import random
from math import log
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.measure import run_file
from benchmarks.report import compare, frame
from benchmarks.suites import providers
from support.rows import ENVIRONMENT, made_row

GROUP = "module-performer-224px-b8-fp32-inference"
ROUNDS = 20


def scattered(middle, seed, spread=0.02, rounds=ROUNDS):
    draw = random.Random(seed)
    return [middle * (1 + draw.uniform(-spread, spread)) for _ in range(rounds)]


def made(times, *others, left_out=(), planned=0, environment=ENVIRONMENT, **fields):
    """A run of one group; ``times``: provider -> times of its rounds; ``fields`` of these rows; ``others``: rows."""
    rows = [made_row(name, values, **fields) for name, values in times.items()]
    return run_file.RunFile(environment, [*rows, *others], list(left_out), planned)


def verdicts(comparison):
    return {(change.provider, change.what): change.verdict for change in comparison.changes.itertuples()}


def saved(path, run):
    run_file.write(path, run)
    return str(path)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15), (30, 10, 21), (50, 18, 33)]
)
def test_ranks_of_the_interval_are_those_of_published_tables(count, low, high):
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert compare.interval(values) == (low, high)


def test_interval_coverage():
    draw = random.Random(1)
    intervals = [compare.interval([draw.expovariate(1) for _ in range(20)]) for _ in range(4000)]
    covered = sum(low <= log(2) <= high for low, high in intervals) / len(intervals)
    assert 0.95 <= covered <= 0.97  # 95.9 % by the formula


def test_the_interval_holds_the_median_of_every_visit():
    values = [1.0] * 20 + [3.0] * 6
    assert compare.interval(values) == (1, 1)
    assert compare.interval(values, [20, 6]) == (1, 3)


def test_a_visit_that_was_disturbed_widens_the_band():
    """The median rises by a third, but both runs contain fast and slow visits."""
    times = [0.03] * 11 + [0.04] * 8 + [0.03] * 11, [0.03] * 8 + [0.04] * 22
    visits = [11, 8, 11], [8, 11, 11]
    a, b = (made({"upstream": [0.1] * 30, "t2t_fast": t}, visits=v) for t, v in zip(times, visits, strict=True))
    assert verdicts(compare.compare(a, b))["t2t_fast", "speedup"] == "within noise"
    without = [run._replace(rows=[{**row, "visits": []} for row in run.rows]) for run in (a, b)]
    assert verdicts(compare.compare(*without))["t2t_fast", "speedup"] == "slower"


def test_slower_row_on_a_slower_machine():
    """B's machine takes twice as long; t2t_fast also becomes slower by a fifth, the compiled row does not."""
    a = made({"upstream": scattered(0.1, 1), "t2t_fast": scattered(0.03, 2), "t2t_fast-compiled": scattered(0.02, 3)})
    b = made({"upstream": scattered(0.2, 4), "t2t_fast": scattered(0.072, 5), "t2t_fast-compiled": scattered(0.04, 6)})
    found = compare.compare(a, b)
    assert verdicts(found) == {
        ("t2t_fast", "speedup"): "slower",
        ("t2t_fast-compiled", "speedup"): "same",
        ("upstream", "time"): "not judged",
    }
    (change,) = found.regressions.itertuples()
    assert change.ratio == pytest.approx(1.2, rel=0.02)
    assert 1 < change.low < change.ratio < change.high
    assert (found.repeated("speedup"), found.repeated("time")) == ((1, 2), (0, 3))
    by_time = compare.compare(a, b, by="time")
    assert set(verdicts(by_time).values()) == {"slower"} and len(by_time.changes) == 3
    back = compare.compare(b, a)
    assert verdicts(back)["t2t_fast", "speedup"] == "faster" and back.regressions.empty


def test_machine_drift_is_reported_and_removed():
    """In B all rows but one take 1.2 times as long."""
    a = made({"upstream": [0.1] * 9, "t2t_fast": [0.03] * 9, "aten": [0.05] * 9})
    b = made({"upstream": [0.12] * 9, "t2t_fast": [0.036] * 9, "aten": [0.05] * 9})
    found = compare.compare(a, b)
    assert found.drift == pytest.approx(1.2) and not found.warnings
    assert (found.repeated("time"), found.repeated("time", found.drift)) == ((1, 3), (2, 3))
    assert compare.summary(found)[1:3] == [
        "times: 1 of 3 rows differ by less than 0.05",
        "drift: upstream takes 1.200 times as long in B; without it, 2 of 3 differ by less than 0.05",
    ]
    alone = compare.compare(made({"t2t_fast": [0.03] * 9}), made({"t2t_fast": [0.036] * 9}), by="time")
    assert alone.drift is None and "drift" not in "".join(compare.summary(alone))


def test_slower_peer_is_no_regression():
    peers = {"upstream": scattered(0.2, 1), "t2t_fast": scattered(0.05, 2)}
    a = made({**peers, "upstream-compiled": scattered(0.1, 3)})
    b = made({**peers, "upstream-compiled": scattered(0.2, 3)})
    found = compare.compare(a, b)
    assert verdicts(found)["upstream-compiled", "speedup"] == "slower"
    assert found.regressions.empty
    last = compare.summary(found)[-1]
    assert last.startswith("1 slower, ") and "no regressions of t2t_fast" in last


def test_scatter_is_no_regression():
    """The median rises by a fifth, but the rounds scatter by more."""
    a = made({"upstream": [0.1] * 7, "t2t_fast": [0.03, 0.02, 0.05, 0.03, 0.04, 0.03, 0.03]})
    b = made({"upstream": [0.1] * 7, "t2t_fast": [0.036, 0.02, 0.05, 0.036, 0.05, 0.036, 0.03]})
    assert verdicts(compare.compare(a, b))["t2t_fast", "speedup"] == "within noise"
    assert verdicts(compare.compare(a, b, threshold=0.25))["t2t_fast", "speedup"] == "same"


def test_narrow_band_within_the_threshold_is_the_same():
    a = made({"upstream": [0.1] * 20, "t2t_fast": [0.03] * 20})
    b = made({"upstream": [0.1] * 20, "t2t_fast": [0.031] * 20})
    assert verdicts(compare.compare(a, b))["t2t_fast", "speedup"] == "same"
    assert verdicts(compare.compare(a, b, threshold=0.02))["t2t_fast", "speedup"] == "slower"


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(100, 102, "more memory"), (100, 98, "less memory"), (100, 100.9, None), (0, 5, "more memory"), (5, None, None)],
)
def test_memory(before, after, verdict):
    times = {"upstream": [0.1] * 7, "t2t_fast": [0.03] * 7}
    a, b = made(times, saved=before), made(times, saved=after)
    found = compare.compare(a, b)
    assert verdicts(found).get(("t2t_fast", "saved_bytes")) == verdict
    assert bool(len(found.regressions)) == (verdict == "more memory")


@pytest.mark.parametrize(
    ("after", "limit", "verdict"), [(36, 2e9, "fewer images"), (38, 2e9, "more images"), (9, 1e9, "not judged")]
)
def test_largest_batches(after, limit, verdict):
    fit = {"suite": "memory", "group": "memory-t2t_vit_7-224px-fp32-training", "provider": "t2t_fast"}
    fit |= {"batch": 37, "limit_bytes": 2e9}
    found = compare.compare(made({}, fit), made({}, {**fit, "batch": after, "limit_bytes": limit}))
    assert verdicts(found) == {("t2t_fast", "batch"): verdict}
    assert bool(len(found.regressions)) == (verdict == "fewer images")


def test_processes_have_times_only():
    row = {"suite": "processes", "group": "processes-t2t_vit_7-224px-b2-fp32-training-n2", "provider": "t2t_fast"}
    a, b = (made({}, {**row, "times": [seconds] * 8}) for seconds in (0.1, 0.2))
    assert verdicts(compare.compare(a, b)) == {("t2t_fast", "time"): "not judged"}
    assert verdicts(compare.compare(a, b, by="time")) == {("t2t_fast", "time"): "slower"}


def test_rows_of_one_run_only():
    """A failed row is a regression; a row that was not measured is not."""
    times = {name: [0.1] * 7 for name in ("upstream", "t2t_fast", "t2t_fast-compiled", "aten")}
    fewer = {name: times[name] for name in ("upstream", "aten")} | {"aten-compiled": [0.1] * 7}
    reasons = {"t2t_fast": "failed: AssertionError: wrong", "t2t_fast-compiled": "the time limit of 9 s had passed"}
    left_out = [{"group": GROUP, "provider": name, "reason": reason} for name, reason in reasons.items()]
    found = compare.compare(made(times), made(fewer, left_out=left_out))
    said = {
        change.provider: (change.verdict, change.reason)
        for change in found.changes.itertuples()
        if change.what == "row"
    }
    assert said == {
        "t2t_fast": ("failed", reasons["t2t_fast"]),
        "t2t_fast-compiled": ("gone", reasons["t2t_fast-compiled"]),
        "aten-compiled": ("new", ""),
    }
    assert list(found.regressions["provider"]) == ["t2t_fast"]


def test_a_run_in_which_everything_failed_is_a_regression(tmp_path):
    left_out = [{"group": GROUP, "provider": "t2t_fast", "reason": "failed: RuntimeError: no"}]
    a, b = made({"t2t_fast": [0.1] * 7}), made({}, left_out=left_out)
    assert command.main(["--compare", saved(tmp_path / "a.json", a), saved(tmp_path / "b.json", b)]) == 1


def test_the_worst_comes_first_and_the_counts_last(tmp_path, capsys):
    a = made({"upstream": [0.1] * 9, "t2t_fast": [0.02] * 9, "aten": [0.05] * 9, "aten-compiled": [0.05] * 9})
    b = made({"upstream": [0.1] * 9, "t2t_fast": [0.03] * 9, "aten": [0.04] * 9, "aten-compiled": [0.2] * 9}, planned=9)
    paths = saved(tmp_path / "a.json", a), saved(tmp_path / "b.json", b)
    assert command.main(["--compare", *paths]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "warning: run B was cut off: 4 of 9 planned rows" in lines
    told = [(line.split()[0], line.split()[2]) for line in lines if GROUP in line]
    assert told[:3] == [("slower", "aten-compiled"), ("slower", "t2t_fast"), ("faster", "aten")]
    assert lines[-4:] == [
        "speed-ups: 0 of 3 rows differ by less than 0.05",
        "times: 1 of 4 rows differ by less than 0.05",
        "drift: upstream takes 1.000 times as long in B; without it, 1 of 4 differ by less than 0.05",
        "2 slower, 1 faster, 1 not judged; 2 regressions of t2t_fast's rows (with any backend)",
    ]


def test_different_conditions_are_reported():
    times = {"upstream": [0.1] * 7}
    limits = {"bytes_per_s": 3e10, "flop_per_s": {"fp32": 2.1e11}}
    other = {**ENVIRONMENT, "torch": "2.12", "quick": True, "limits": limits}
    found = compare.compare(made(times), made(times, environment=other, dtype="fp16"), by="time")
    assert found.warnings == [
        "torch: 2.11 in A, 2.12 in B",
        "quick: None in A, True in B",
        "dtypes: fp32 in A, fp16 in B",
        "the machine's own copy bandwidth: B has 1.50 times A's",
    ]


def test_other_devices_are_compared_by_speedup_only():
    a = made({"upstream": [0.1] * 7, "t2t_fast": [0.05] * 7})
    b = made({"upstream": [1.0] * 7, "t2t_fast": [0.5] * 7}, environment={**ENVIRONMENT, "device": "an abacus"})
    found = compare.compare(a, b)
    assert verdicts(found)["t2t_fast", "speedup"] == "same"
    assert found.warnings == ["device: a processor, 2 threads in A, an abacus in B"]
    with pytest.raises(ValueError, match="by: times of different devices"):
        compare.compare(a, b, by="time")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda run: run._replace(rows=[{**row, "group": "another"} for row in run.rows]), [], "no row in common"),
        (lambda run: run._replace(rows=[*run.rows, run.rows[0]]), [], "upstream is there twice"),
        (lambda run: run._replace(rows=[{**row, "times": []} for row in run.rows]), [], "has no times of its rounds"),
        (
            lambda run: run._replace(rows=[run.rows[0], {**run.rows[1], "times": [0.1]}]),
            [],
            "t2t_fast has 1 rounds, upstream 7",
        ),
        (lambda run: run, ["--threshold", "-0.1"], "threshold: expected a share of at least 0, as in 0.05, got -0.1"),
        (lambda run: run, ["--threshold", "nan"], "threshold: expected"),
        (None, [], "No such file"),
    ],
    ids=["other rows", "twice", "no times", "other rounds", "negative", "nan", "missing"],
)
def test_bad_usage_is_one_line_and_code_2(tmp_path, capsys, change, options, words):
    run = made({"upstream": [0.1] * 7, "t2t_fast": [0.05] * 7})
    b = str(tmp_path / "missing.json") if change is None else saved(tmp_path / "b.json", change(run))
    assert command.main(["--compare", saved(tmp_path / "a.json", run), b, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks --compare: ") and words in line


def test_compressed_files_folders_and_rows_without_visits(tmp_path, capsys):
    times = {"upstream": [0.1] * 7, "t2t_fast": [0.025] * 7}
    a, b = made(times), made({**times, "t2t_fast": [0.06] * 7})
    plain = [run._replace(rows=[{k: v for k, v in row.items() if k != "visits"} for row in run.rows]) for run in (a, b)]
    old = saved(tmp_path / "a.json", plain[0])
    packed = tmp_path / "run" / "rows.json.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(old).read_bytes()))
    for path in (packed, packed.parent):
        assert command.main(["--compare", old, str(path)]) == 0
        assert "speed-ups: 1 of 1 rows differ by less than 0.05" in capsys.readouterr().out
    (change,) = compare.compare(*plain).regressions.itertuples()
    assert (change.verdict, change.what, change.a, change.b) == ("slower", "speedup", 4, pytest.approx(5 / 3))


def test_baseline_names_agree():
    assert frame.BASELINE == providers.BASELINE and frame.OURS == providers.OURS
