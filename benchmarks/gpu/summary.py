"""What ``make gpu`` leaves in its folder: ``summary.json``, ``summary.md``, and an archive of everything."""

import io
import json
import tarfile
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

from ..measure import run_file
from ..measure.text_tables import markdown
from .plan import CHECKS

OK, FAILED, CUT_OFF, INTERRUPTED = "ok", "failed", "cut off at its limit", "interrupted"
NO_TIME, LEFT_OUT, NOT_ASKED = "no time left", "left out in a quick run", "not asked for"

SUCCESS = (OK, NO_TIME, LEFT_OUT, NOT_ASKED)
"""Results of a part that did not go wrong."""

ARCHIVE_BYTES = 16_000_000
"""Maximum size of an archive: rented machines return no larger file."""

KEPT = ("summary.json", "summary.md", "rows.json")
"""Files that an archive leaves out last."""


def collect(out):
    """The suites' results so far: folder -> numbers of entries, planned and measured, what is left out, goals."""
    found = {}
    for path in sorted(out.glob("*/rows.json")):
        try:
            run = run_file.read(path)
            found[path.parent.name] = {
                **{name: len(getattr(run, name)) for name in ("rows", "fits", "processes")},
                "planned": run.planned,
                "left_out": run.left_out,
                "goals": _goals(run.rows),
            }
        except Exception as failure:  # noqa: BLE001 - a bad file must not end the run
            found[path.parent.name] = {"error": f"{type(failure).__name__}: {failure}"}
    return found


def _goals(rows):
    try:
        from ..report.goals import judge
    except ImportError:  # the report's packages are not installed
        return []
    return [judgement._asdict() for judgement in judge(rows)]


def archive_of(out):
    """The path of a folder's archive: beside it."""
    return out.with_name(f"{out.name}.tar.gz")


def write(out, summary, page=None, archive=None):
    """Write both summaries and the archive, each atomically.

    The archive leaves out the largest logs, then the largest other files, until it has at most
    :data:`ARCHIVE_BYTES`; the summaries list them.

    Args:
        out: folder of the run; summary: its content; page: path of a copy of ``summary.md``, if wanted; archive: its
            path, by default :func:`archive_of`.

    Raises:
        OSError: a file cannot be written.
    """
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".part"]
    # read once: running parts rewrite their files
    contents = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(files)}
    waiting = sorted(
        contents, key=lambda name: (Path(name).name in KEPT, not name.endswith(".log"), -len(contents[name]))
    )
    left_out = summary["not_in_archive"] = []
    while True:
        contents["summary.json"] = (json.dumps(summary, indent=1) + "\n").encode()
        contents["summary.md"] = text(summary).encode()
        packed = _pack(out.name, contents)
        if len(packed) <= ARCHIVE_BYTES or not waiting:
            break
        left_out.append(waiting.pop(0))
        contents.pop(left_out[-1])
    for path, name in (
        (out / "summary.json", "summary.json"),
        (out / "summary.md", "summary.md"),
        (page, "summary.md"),
    ):
        if path is not None:
            _replace(path, contents[name])
    _replace(archive or archive_of(out), packed)


def _pack(folder, contents):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(content), int(time.time())
            file.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _replace(path, content):
    partial = path.with_suffix(f"{path.suffix}.part")
    partial.write_bytes(content)
    partial.replace(path)


def _checked(line):
    """Whether a check succeeded and checked something: pytest also succeeds if all tests are skipped."""
    return line["result"] == OK and ("passed" in line.get("said", "") or not line["part"].startswith("tests-"))


def verdict(summary):
    """What the checks say about a run's numbers: a sentence, and a mark for the tables ("" if all is well).

    Every row was compared with float64 before it was timed; the checks cover everything else.
    """
    lines = [line for line in summary["parts"] if line["result"] != LEFT_OUT]
    failed = [line["part"] for line in lines if line["result"] == FAILED]
    checks = [line for line in lines if line["part"].startswith(CHECKS)]
    wrong = [part for part in failed if part.startswith(CHECKS)]
    others = [part for part in failed if part not in wrong]
    unfinished = sum(line["result"] != FAILED and not _checked(line) for line in checks)
    words = []
    if wrong:
        words.append(f"CHECKS FAILED: {', '.join(wrong)}. Do not trust the numbers of this run.")
    if others:
        words.append(f"FAILED: {', '.join(others)}.")
    if unfinished or not checks:
        words.append(f"{unfinished} of {len(checks)} checks are incomplete." if checks else "No check ran.")
    mark = "CHECKS FAILED" if wrong else "not all checked" if unfinished or not checks else ""
    return " ".join(words) or "Every part that ran succeeded, and every check passed.", mark


def text(summary):
    """``summary.md``: whether the numbers can be trusted, the goals of each folder of rows, the parts."""
    words, mark = verdict(summary)
    lines = [
        f"# {'Quick run' if summary['quick'] else 'Run'} of make gpu, {summary['started']}",
        "",
        f"**{words}**",
        "",
    ]
    if "finished" not in summary:
        lines += ["This run did not finish.", ""]
    lines += [f"- {key}: {value}" for key, value in summary["environment"].items() if isinstance(value, str)]
    if "seconds" in summary:
        lines.append(f"- time: {summary['seconds']:.0f} s of {summary['total']:.0f} s since the process started")
    for folder, found in sorted(summary["suites"].items(), key=lambda each: each[0] != "headline"):
        lines += ["", f"## {folder}{mark and f': {mark}'}", "", *_folder(folder, found, mark)]
    lines += ["", "## Parts", "", *markdown(("part", "result", "seconds", "of at most", ""), _parts(summary["parts"]))]
    if summary.get("not_in_archive"):
        lines += ["", f"Too large for the archive: {', '.join(summary['not_in_archive'])}"]
    return "\n".join(lines) + "\n"


def _parts(lines):
    """The table's rows; consecutive successful parts of one family share a row."""
    for (family, result), members in groupby(lines, key=lambda line: (line["part"].partition("-")[0], line["result"])):
        several = list(members)
        if len(several) > 1 and result in SUCCESS:
            seconds, limit = (max(line[key] for line in several) for key in ("seconds", "limit"))
            reasons = "; ".join({line.get("reason", "") for line in several})
            yield f"{family}-* ({len(several)})", result, f"{seconds:.0f}", f"{limit:.0f}", reasons
            continue
        for line in several:
            name = f"[{line['part']}]({line['log']})" if line.get("log") else line["part"]
            words = line.get("reason") or line.get("said", "")
            yield name, result, f"{line['seconds']:.0f}", f"{line['limit']:.0f}", words


def _folder(folder, found, mark):
    if "error" in found:
        return [f"{folder}/rows.json cannot be read: {found['error']}"]
    entries = found["rows"] + found["fits"] + found["processes"]
    of = "" if found["planned"] is None else f" of {found['planned']}"
    lines = [f"{entries}{of} rows with numbers: {folder}/rows.json"]
    reasons = Counter(" ".join(each["reason"].split()) for each in found["left_out"])
    lines += [f"- {count} without: {reason}" for reason, count in reasons.items()]
    if found["goals"]:
        goals = [(goal["what"], goal["wanted"], goal["measured"], goal["verdict"]) for goal in found["goals"]]
        lines += ["", *markdown(("goal", "wanted", f"measured{mark and f' ({mark})'}", ""), goals)]
    return lines
