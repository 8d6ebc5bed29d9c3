"""What a run of ``make gpu`` leaves in its folder: ``summary.json``, ``summary.md``, and all of it in one archive."""

import io
import json
import tarfile
import time
import zlib
from itertools import groupby
from pathlib import Path

from ..measure import run_file
from ..report.goals import judge
from .plan import CHECKS

OK, FAILED, CUT_OFF, INTERRUPTED = "ok", "failed", "cut off at its limit", "interrupted"
NO_TIME, LEFT_OUT, NOT_ASKED = "no time left", "left out in a quick run", "not asked for"

SUCCESS = (OK, NO_TIME, LEFT_OUT, NOT_ASKED)
"""Results of a part that did not go wrong."""


def collect(out):
    """What the suites' files hold so far: folder -> numbers of entries, planned and found, what is left out, goals."""
    found = {}
    for path in sorted(out.glob("*/rows.json")):
        try:
            run = run_file.read(path)
            goals = [judgement._asdict() for judgement in judge(run.rows)]
        except Exception as failure:  # noqa: BLE001 - one bad file must not end a run that is rare
            found[path.parent.name] = {"error": f"{type(failure).__name__}: {failure}"}
            continue
        found[path.parent.name] = {
            "rows": len(run.rows),
            "fits": len(run.fits),
            "processes": len(run.processes),
            "planned": run.planned,
            "left_out": run.left_out,
            "goals": goals,
        }
    return found


ARCHIVE_BYTES = 16_000_000
"""The most that an archive takes: a machine that is lent hands back no larger file."""

KEPT = ("summary.json", "summary.md", "rows.json")
"""Files that an archive leaves out last."""


def write(out, summary, page=None, archive=None):
    """Write both summaries and the archive, each whole or not at all.

    Args:
        out: folder of the run; summary: what is written, with what the archive leaves out added; page: where a copy of
            ``summary.md`` goes, if it is wanted; archive: by default :func:`archive_of`.

    Raises:
        OSError: a file cannot be written.
    """
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".part")
    # at once: parts that run write their files anew
    contents = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    packed, left_out = pack(out.name, _with_summaries(contents, summary, []), ARCHIVE_BYTES)
    if left_out:  # the summaries name them
        packed, left_out = pack(out.name, _with_summaries(contents, summary, left_out), ARCHIVE_BYTES)
    for name in ("summary.json", "summary.md"):
        _replace(out / name, _with_summaries({}, summary, left_out)[name])
    if page is not None:
        _replace(page, (out / "summary.md").read_bytes())
    _replace(archive_of(out) if archive is None else archive, packed)


def _with_summaries(contents, summary, left_out):
    summary["not_in_archive"] = left_out
    own = {"summary.json": json.dumps(summary, indent=1) + "\n", "summary.md": text(summary)}
    return contents | {name: content.encode() for name, content in own.items()}


def pack(folder, contents, most):
    """An archive of a folder's files, and the names of those that it leaves out so that it takes ``most`` bytes.

    These are the largest logs, then the largest of the other files.
    """
    sizes = {name: len(zlib.compress(content, 6)) for name, content in contents.items()}
    waiting = sorted(sizes, key=lambda name: (Path(name).name in KEPT, not name.endswith(".log"), -sizes[name]))
    left_out = []
    while True:
        # what files take together is less than what each takes by itself, but for their heads
        while sum(sizes.values()) > most and waiting:
            left_out.append(waiting.pop(0))
            del sizes[left_out[-1]]
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as file:
            for name in sizes:
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size, member.mtime = len(contents[name]), int(time.time())
                file.addfile(member, io.BytesIO(contents[name]))
        if len(packed.getvalue()) <= most or not waiting:
            return packed.getvalue(), left_out
        left_out.append(waiting.pop(0))
        del sizes[left_out[-1]]


def archive_of(out):
    """Where a folder's archive lies: beside it."""
    return out.with_name(f"{out.name}.tar.gz")


def _replace(path, content):
    partial = path.with_suffix(f"{path.suffix}.part")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    partial.replace(path)


def _table(heads, lines):
    cells = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in cells]


def verdict(summary):
    """What the checks say of a run's numbers: (words, what the tables call the numbers).

    Every row's result was compared with float64 before it was timed; the checks look at everything else.
    """
    lines = [line for line in summary["parts"] if line["result"] != LEFT_OUT]
    failed = [line["part"] for line in lines if line["result"] == FAILED]
    checks = [line for line in lines if line["part"].startswith(CHECKS)]
    wrong = [line["part"] for line in checks if line["result"] == FAILED]
    unfinished = sum(line["result"] != FAILED and not _checked(line) for line in checks)
    others = [part for part in failed if part not in wrong]
    words = []
    if wrong:
        words.append(f"CHECKS FAILED: {', '.join(wrong)}. Do not trust the numbers of this run.")
    if others:
        words.append(f"FAILED: {', '.join(others)}.")
    if unfinished or not checks:
        words.append(f"{unfinished} of {len(checks)} checks are incomplete." if checks else "No check ran.")
    mark = "CHECKS FAILED" if wrong else "not all checked" if unfinished or not checks else ""
    return " ".join(words) or "Every part that ran succeeded, and every check passed.", mark


def _checked(line):
    """Whether a check succeeded and checked something: tests that are all skipped succeed as well."""
    return line["result"] == OK and ("passed" in line.get("said", "") or not line["part"].startswith("tests-"))


def text(summary):
    """``summary.md``: whether the numbers can be trusted, the goals of each folder of rows, the parts."""
    environment = summary["environment"]
    words, mark = verdict(summary)
    lines = [
        f"# {'Quick run' if summary['quick'] else 'Run'} of make gpu, {summary['started']}",
        "",
        f"**{words}**",
        "",
    ]
    if "finished" not in summary:
        lines += ["This run did not come to its end.", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if isinstance(value, str)]
    if "seconds" in summary:
        lines.append(f"- time: {summary['seconds']:.0f} s of {summary['total']:.0f} s since the process started")
    for folder, found in sorted(summary["suites"].items(), key=lambda each: each[0] != "headline"):
        lines += ["", f"## {folder}{mark and f': {mark}'}", "", *_folder(folder, found, mark)]
    lines += ["", "## Parts", ""]
    lines += _table(("part", "result", "seconds", "of at most", ""), _parts(summary["parts"]))
    if summary.get("not_in_archive"):
        lines += ["", f"Too large for the archive: {', '.join(summary['not_in_archive'])}"]
    return "\n".join(lines) + "\n"


def _parts(lines):
    """The table's rows: neighbours that succeeded and whose names begin alike are one."""
    found = []
    for (family, result), members in groupby(lines, key=lambda line: (line["part"].partition("-")[0], line["result"])):
        several = list(members)
        seconds, limit = (max(line[key] for line in several) for key in ("seconds", "limit"))
        if len(several) > 1 and result in SUCCESS:
            reasons = {line.get("reason", "") for line in several}
            found.append((f"{family}-* ({len(several)})", result, f"{seconds:.0f}", f"{limit:.0f}", "; ".join(reasons)))
            continue
        for line in several:
            name = f"[{line['part']}]({line['log']})" if line.get("log") else line["part"]
            numbers = f"{line['seconds']:.0f}", f"{line['limit']:.0f}"
            found.append((name, result, *numbers, line.get("reason") or line.get("said", "")))
    return found


def _folder(folder, found, mark):
    if "error" in found:
        return [f"{folder}/rows.json cannot be read: {found['error']}"]
    entries = found["rows"] + found["fits"] + found["processes"]
    of = "" if found["planned"] is None else f" of {found['planned']}"
    lines = [f"{entries}{of} rows with numbers: [table.md]({folder}/table.md), [report.html]({folder}/report.html)"]
    reasons = {}
    for each in found["left_out"]:
        reasons[each["reason"]] = reasons.get(each["reason"], 0) + 1
    lines += [f"- {count} without: {' '.join(reason.split())}" for reason, count in reasons.items()]
    if found["goals"]:
        goals = [(goal["what"], goal["wanted"], goal["measured"], goal["verdict"]) for goal in found["goals"]]
        lines += ["", *_table(("goal", "wanted", f"measured{mark and f' ({mark})'}", ""), goals)]
    return lines
