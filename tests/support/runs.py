"""Incomplete run files, and runs that resume them."""

from benchmarks.measure import run_file, session
from benchmarks.suites.groups import Group

from .rows import ENVIRONMENT, made_row

FIRST, SECOND = (Group("op", f"token_mlp-stage{stage}", 224, 8, "fp32", "inference", False, "ops") for stage in (1, 2))
FITTING = Group("model", "t2t_vit_7", 224, None, "fp32", "training", False, "memory")


def finished_row(group, provider):
    """A row of a :class:`Group` with all visits of a CPU run."""
    return made_row(provider, [0.1, 0.2, 0.3], **{**group._asdict(), "group": group.id, "visits": [1, 1, 1]})


def written(folder, found, left_out=(), planned=99):
    """The path of a run file in ``folder`` with these rows and the made-up environment."""
    path = folder / "rows.json"
    run_file.write(path, run_file.RunFile(ENVIRONMENT, list(found), list(left_out), planned))
    return path


def resumed(path, *planned):
    """A :class:`session.Run` that resumes the file at ``path``; ``planned``: (group, provider) of each row."""
    return session.Run(plan_of(planned), "cpu", False, path, "a command", None, lambda *line: None)


def plan_of(planned):
    """Group -> providers, from (group, provider) pairs."""
    return {group: [name for other, name in planned if other == group] for group, _ in planned}
