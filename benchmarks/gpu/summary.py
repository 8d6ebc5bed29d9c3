"""What ``make gpu`` leaves: ``summary.json`` and ``summary.md`` in its folder, and an archive beside it."""

import io
import json
import tarfile
import time
from collections import Counter

from ..measure import run_file
from ..measure.text_tables import markdown
from .plan import CHECKS

OK, FAILED, CUT_OFF, INTERRUPTED = "ok", "failed", "cut off at its limit", "interrupted"
NO_TIME, NOT_RUN = "no time left", "not run"
# Maximum size of an archive: rented machines return no larger file
ARCHIVE_BYTES = 16_000_000


def collect(out):
    """The suites' results so far: folder -> numbers of measured and planned rows, reasons of missing rows, goals."""
    from ..report.goals import judge  # imports torch

    found = {}
    for path in sorted(out.glob("*/rows.json")):
        try:
            run = run_file.read(path)
            found[path.parent.name] = {
                "measured": len(run.rows),
                "planned": run.planned,
                "left_out": Counter(" ".join(row["reason"].split()) for row in run.left_out),
                "goals": [judgement._asdict() for judgement in judge(run.rows)],
            }
        except Exception as failure:  # noqa: BLE001 - a bad file must not end the run
            found[path.parent.name] = {"error": f"{type(failure).__name__}: {failure}"}
    return found


def archive_of(out):
    """The path of a folder's archive: beside it."""
    return out.with_name(f"{out.name}.tar.gz")


def write(out, summary):
    """Write both summaries and the archive, each atomically.

    The archive leaves out the largest logs, then the largest other files, ``rows.json`` last, until it has at most
    :data:`ARCHIVE_BYTES`; the summaries list them.

    Raises:
        OSError: a file cannot be written.
    """
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".part"]
    # read once: running parts rewrite their files
    contents = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(files)}
    removable = sorted(
        contents.keys() - {"summary.json", "summary.md"},
        key=lambda name: (name.endswith("rows.json"), not name.endswith(".log"), -len(contents[name])),
    )
    left_out = summary["not_in_archive"] = []
    while True:
        contents["summary.json"] = (json.dumps(summary, indent=1) + "\n").encode()
        contents["summary.md"] = text(summary).encode()
        packed = _pack(out.name, contents)
        if len(packed) <= ARCHIVE_BYTES or not removable:
            break
        left_out.append(removable.pop(0))
        del contents[left_out[-1]]
    targets = {out / name: contents[name] for name in ("summary.json", "summary.md")}
    for path, content in {**targets, archive_of(out): packed}.items():
        partial = path.with_suffix(f"{path.suffix}.part")
        partial.write_bytes(content)
        partial.replace(path)


def _pack(folder, contents):
    """The bytes of an archive with these files (name -> bytes) in a folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(content), int(time.time())
            file.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def verdict(parts):
    """What the checks say about a run's numbers: a sentence, and whether all checks passed.

    Every row was compared with float64 before it was timed; the checks cover everything else.
    """
    failed = [line["part"] for line in parts if line["result"] == FAILED]
    checks = [line for line in parts if line["part"].startswith(CHECKS)]
    # pytest also succeeds if it skips every test
    passed = sum(
        line["result"] == OK and ("passed" in line["said"] or not line["part"].startswith("tests-")) for line in checks
    )
    words = f"{passed} of {len(checks)} checks passed."
    if failed:
        words += f" FAILED: {', '.join(failed)}."
    if any(name.startswith(CHECKS) for name in failed):
        words += " Do not trust the numbers of this run."
    return words, passed == len(checks)


def text(summary):
    """``summary.md``: whether the numbers can be trusted, the goals of each folder of rows, the parts."""
    words, trusted = verdict(summary["parts"])
    title = f"# {'Quick run' if summary['quick'] else 'Run'} of make gpu, {summary['started']}"
    lines = [title, "", f"**{words}**", ""]
    if "finished" not in summary:
        lines += ["This run did not finish.", ""]
    lines += [f"- {key}: {value}" for key, value in summary["environment"].items() if isinstance(value, str)]
    lines.append(f"- time: {summary['seconds']:.0f} s of {summary['total']:.0f} s since the process started")
    for folder, found in sorted(summary["suites"].items(), key=lambda each: each[0] != "headline"):
        lines += ["", f"## {folder}{'' if trusted else ': NOT ALL CHECKS PASSED'}", ""]
        if "error" in found:
            lines.append(f"{folder}/rows.json cannot be read: {found['error']}")
            continue
        lines.append(f"{found['measured']} of {found['planned']} rows with numbers: {folder}/rows.json")
        lines += [f"- {count} without: {reason}" for reason, count in found["left_out"].items()]
        if found["goals"]:
            lines += ["", *markdown(("goal", "wanted", "measured", ""), map(dict.values, found["goals"]))]
    lines += ["", "## Parts", "", *markdown(("part", "result", "seconds", ""), map(dict.values, summary["parts"]))]
    if summary["not_in_archive"]:
        lines += ["", f"Too large for the archive: {', '.join(summary['not_in_archive'])}"]
    return "\n".join(lines) + "\n"
