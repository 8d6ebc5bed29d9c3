"""The README: its code runs, its commands exist, its links lead somewhere, its numbers are those of the named run."""

import contextlib
import importlib.util
import io
import re
import shlex

import pytest
import torch

import t2t_fast
from support import ROOT
from t2t_fast import backends
from t2t_fast.cli import build_parser
from t2t_fast.ops._common import native_library as native

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
INLINE = [code for code in re.findall(r"`([^`\n]+)`", TEXT) if re.match(r"make |t2t-fast |python -m ", code)]


def test_two_commands_come_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


def test_the_gate_runs_the_readmes_test_command():
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_python_blocks_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    printed = io.StringIO()
    names = {}
    with contextlib.redirect_stdout(printed):
        for language, block in BLOCKS:
            if language == "python":
                exec(compile(block, "README.md", "exec"), names)
    assert names["tokens"].shape == (2, 48, 256) and names["grid"] == (6, 8)
    assert names["columns"].shape == (2, 768, 147)
    assert names["report"].reinitialised
    if (reason := native.reason(backends.Request("cpu", torch.float32, {}), ("cpu",))) is not None:
        pytest.skip(f"the README's table has the native backend: {reason}")
    # the table below the first block is what it prints
    table = next(block for language, block in BLOCKS if language == "text")
    assert printed.getvalue().startswith("\n".join(line.rstrip() for line in table.splitlines()[:1]))
    for line in table.splitlines():
        assert line.rstrip() in [each.rstrip() for each in printed.getvalue().splitlines()]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS + INLINE))
def test_commands_exist(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    elif words[0] == "t2t-fast":
        _, rest = build_parser().parse_known_args(words[1:])
        assert not rest or words[1] == "bench"
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    else:
        options = {"-v", "--no-build-isolation"}
        assert [word for word in words if word not in options] == ["pip", "install", "."], command


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link


def test_variables_are_those_of_the_code():
    code = "".join(path.read_text() for path in [ROOT / "setup.py", *(ROOT / "t2t_fast").rglob("*.py")])
    for name in set(re.findall(r"T2T_FAST_\w+", TEXT)):
        assert name in code, name


def test_names_of_the_package_exist():
    for name in set(re.findall(r"t2t_fast\.(\w+)", TEXT)) - {"_C"}:  # only where it was built
        assert hasattr(t2t_fast, name) or importlib.util.find_spec(f"t2t_fast.{name}"), name
