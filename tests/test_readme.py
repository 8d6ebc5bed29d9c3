"""README and docs/: their code runs, commands and links exist, and the README is short."""

import contextlib
import importlib.util
import io
import re
import shlex

import pytest
import torch
from torch.distributed import run as torchrun

import t2t_fast
from support import ARCHIVE, ROOT
from t2t_fast import backends
from t2t_fast.cli import build_parser
from t2t_fast.ops._common import native_library as native

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "tests" / "README.md"]
TEXT = {path: path.read_text() for path in LINKED}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {path: FENCED.findall(text) for path, text in TEXT.items()}
COMMANDS = {
    path: [line for language, block in blocks if language == "sh" for line in block.splitlines()]
    for path, blocks in BLOCKS.items()
}
MOST_WORDS = 1400


def name(path):
    return str(path.relative_to(ROOT))


def inline(text):
    """Commands in backquotes; SECURITY.md also names a command's option alone, as in ``t2t-fast demo --photo``."""
    found = re.findall(r"`(make [a-z][^`\n]*|t2t-fast [a-z]+|python -m [^`\n]+)(?: --[a-z]+)?`", text)
    return [command for command in found if command != "t2t-fast export"]  # its arguments are required


def words(text):
    """Number of words outside tables, code blocks, comments and link targets."""
    text = re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return sum(bool(re.search(r"\w", word)) for word in re.sub(r"\]\([^)]*\)", "]", text).split())


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_launcher(words):
    """Fail unless a command's words before its script are Python or a launcher with arguments that it knows."""
    if words[0] == "torchrun":
        torchrun.get_args_parser().parse_args([*words[1:], "script"])
    elif words[:2] == ["accelerate", "launch"]:
        launch = importlib.import_module("accelerate.commands.launch")
        launch.launch_command_parser().parse_args([*words[2:], "script"])
    else:
        assert words == ["python"], words


def run_blocks(path, folder, monkeypatch):
    """Run a page's Python blocks in order, in one namespace. Returns the namespace and what was printed."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for language, block in BLOCKS[path]:
            if language == "python":
                exec(compile(block, name(path), "exec"), names)
    return names, printed.getvalue()


def test_two_commands_come_first():
    assert COMMANDS[README][:2] == ["make demo", "make test"]


def test_the_gate_runs_the_readmes_test_command():
    assert COMMANDS[README][1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short():
    assert words(TEXT[README]) <= MOST_WORDS


def test_the_claim_is_in_the_results():
    """The speed-ups in the first paragraph are in the generated tables, and the status of GPUs follows."""
    claim, results = TEXT[README].partition("![")[0], TEXT[README].partition("<!-- headline")[2]
    figures = re.findall(r"\d\.\d\d×", claim)
    assert figures and all(re.search(rf"[,|] {figure} \(", results) for figure in figures)
    upstream, *_, ours, _ = [
        float(cell.split()[0]) for cell in re.search(r"kept for backward, per image \|(.*)\|", results)[1].split("|")
    ]
    assert f"1/{int(upstream / ours)} of the memory" in " ".join(claim.split())
    assert "No GPU has run this package yet" in "\n".join(TEXT[README].splitlines()[:15])


def test_the_readmes_code_prints_its_table(tmp_path, monkeypatch):
    _, printed = run_blocks(README, tmp_path, monkeypatch)
    if (reason := native.reason(backends.Request("cpu", torch.float32, {}), ("cpu",))) is not None:
        pytest.skip(f"the README's table shows the native backend: {reason}")
    table = next(block for language, block in BLOCKS[README] if language == "text").splitlines()
    assert printed.splitlines()[0].rstrip() == table[0].rstrip()
    assert {line.rstrip() for line in table} <= {line.rstrip() for line in printed.splitlines()}


@pytest.mark.parametrize(
    "path", [path for path in PAGES[1:] if any(code == "python" for code, _ in BLOCKS[path])], ids=name
)
def test_the_code_of_docs_runs(path, tmp_path, monkeypatch):
    names, printed = run_blocks(path, tmp_path, monkeypatch)
    if path.name == "quickstart.md":
        assert names["tokens"].shape == (2, 48, 256) and names["grid"] == (6, 8)
        assert names["columns"].shape == (2, 768, 147)
        assert names["report"].reinitialised
    if path.name == "swap.md":
        assert "unfused: proj has hooks" in printed


@pytest.mark.parametrize(
    "command", dict.fromkeys(line for path in LINKED for line in [*COMMANDS[path], *inline(TEXT[path])])
)
def test_commands_exist(command, monkeypatch):
    parts = shlex.split(command)
    if "examples/train.py" in parts:
        monkeypatch.chdir(ROOT)  # the arguments name files below it
        monkeypatch.syspath_prepend(ROOT / "examples")
        script = parts.index("examples/train.py")
        check_launcher(parts[:script])
        importlib.import_module("train").parse(parts[script + 1 :])
    elif parts[0] == "make":
        assert re.search(rf"^{parts[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    elif parts[0] == "t2t-fast":
        _, rest = build_parser().parse_known_args(parts[1:])
        assert not rest or parts[1] == "bench"
    elif parts[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(parts[2]) is not None
    else:
        assert [part for part in parts if part != "-v"] == ["pip", "install", "."], command


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_link_targets_exist(path):
    for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", TEXT[path])):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if ARCHIVE and (target.suffix == ".png" or "benchmarks/results" in link):
            continue  # MANIFEST.in leaves them out
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_paths_in_backquotes_exist(path):
    """Files of the package, csrc and the examples that a page names from the root or from ``t2t_fast/``."""
    for code in re.findall(
        r"`((?:t2t_fast|csrc|examples|ops|modules|models|interop|functional)/[\w/.]+\.\w+)`", TEXT[path]
    ):
        if code not in ("t2t_fast/_ops.so", "t2t_fast/_build.json"):  # exist only after a build
            assert any((root / code).exists() for root in (ROOT, ROOT / "t2t_fast", path.parent)), code


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "swap.md"], ids=name)
def test_messages_in_tables_are_those_of_the_code(path):
    """The first cell of each row is a message of the package, with ``...`` for the variable parts."""
    code = "".join(file.read_text() for file in (ROOT / "t2t_fast").rglob("*.py"))
    cells = re.findall(r"^\| `([^`|]*\.\.\.[^`|]*)` \|", TEXT[path], flags=re.MULTILINE)
    assert cells
    for part in (part.strip(" '") for cell in cells for part in cell.split("...")):
        assert len(part) < 15 or part in code, part


def test_variables_are_those_of_the_code():
    files = [ROOT / "setup.py", *(ROOT / "t2t_fast").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    code = "".join(path.read_text() for path in files)
    for variable in {found for text in TEXT.values() for found in re.findall(r"T2T_FAST_\w+", text)}:
        assert variable in code, variable


def test_names_of_the_package_exist():
    for found in {each for text in TEXT.values() for each in re.findall(r"t2t_fast\.(\w+)", text)} - {"_C"}:
        assert hasattr(t2t_fast, found) or importlib.util.find_spec(f"t2t_fast.{found}"), found
