"""What a run of ``make gpu`` leaves in its folder: ``summary.json``, ``summary.md``, and all of it in one archive."""

import io
import json
import tarfile

from . import run_file
from .goals import judge

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


def write(out, summary):
    """Write both summaries and the archive, each whole or not at all. Returns the archive's path.

    Raises:
        OSError: the folder, or the one that it lies in, cannot be written.
    """
    _replace(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    _replace(out / "summary.md", text(summary))
    archive = archive_of(out)
    partial = archive.with_name(f"{archive.name}.part")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".part"):
            content = path.read_bytes()  # at once: parts that run write their files anew
            member = tarfile.TarInfo(f"{out.name}/{path.relative_to(out)}")
            member.size, member.mtime = len(content), int(path.stat().st_mtime)
            file.addfile(member, io.BytesIO(content))
    partial.replace(archive)
    return archive


def archive_of(out):
    """Where a folder's archive lies: beside it."""
    return out.with_name(f"{out.name}.tar.gz")


def _replace(path, content):
    partial = path.with_suffix(f"{path.suffix}.part")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _table(heads, lines):
    cells = [heads, ["---"] * len(heads), *lines]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in cells]


def text(summary):
    """``summary.md``: the parts, then the goals of each folder of rows and what it lacks."""
    environment = summary["environment"]
    lines = [f"# {'Quick run' if summary['quick'] else 'Run'} of make gpu, {summary['started']}", ""]
    lines += [f"- {key}: {value}" for key, value in environment.items() if isinstance(value, str)]
    lines += ["" if "finished" in summary else "\nThis run did not come to its end.\n"]
    parts = [
        (
            f"[{line['part']}]({line['log']})" if line.get("log") else line["part"],
            line["result"],
            f"{line['seconds']:.0f}",
            f"{line['limit']:.0f}",
            line.get("reason", ""),
        )
        for line in summary["parts"]
    ]
    lines += _table(("part", "result", "seconds", "of at most", ""), parts)
    for folder, found in summary["suites"].items():
        lines += ["", f"## {folder}", "", *_folder(folder, found)]
    return "\n".join(lines) + "\n"


def _folder(folder, found):
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
        lines += ["", *_table(("goal", "wanted", "measured", ""), goals)]
    return lines
