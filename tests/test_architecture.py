"""Who may import whom: the layers of CONTRIBUTING.md, held by parsing every import of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "t2t_fast"

KERNELS = tuple(f"kernels{part}" for part in ("", "_backward", "_chunked", "_image", "_statistics", "_weight"))
# Lowest layer first; a module may import its own layer's package and anything below.
LAYERS = [
    ["t2t_fast.errors", "t2t_fast.config", "t2t_fast._extension"],
    ["t2t_fast.backends", "t2t_fast.memory"],
    [f"t2t_fast.ops.{name}" for name in ("spec", "transforms", "costs", "flops", "windows", "philox", "pixels")],
    [f"t2t_fast.ops.{name}" for name in ("library", "launch", "kept")],
    ["t2t_fast.ops.native", "t2t_fast.ops.triton_runtime", "t2t_fast.ops.tiles"],
    [f"t2t_fast.ops.*.{name}" for name in (*KERNELS, "launch", "layout", "call", "gradient", "tail")],
    [f"t2t_fast.ops.*.{name}" for name in ("reference", "composed", "aten_impl", "native_impl", "triton_impl")],
    ["t2t_fast.ops.*.op"],
    ["t2t_fast.functional"],
    ["t2t_fast.modules"],
    ["t2t_fast.models"],
    ["t2t_fast.reference"],
    ["t2t_fast.interop"],
    ["t2t_fast.capture", "t2t_fast.testing", "t2t_fast.environment", "t2t_fast.verification"],
    ["t2t_fast"],
    ["t2t_fast.cli", "t2t_fast.__main__"],
]
# An operator never imports another one, but for the one that is made of three others.
COMPOSITES = {"performer_layer": {"soft_split_linear", "performer_attention", "token_mlp"}}
# Heavy or optional packages may only be imported where they are used, inside functions.
DRAWING = {"t2t_fast.cli.charts", "t2t_fast.cli.pictures"}  # themselves imported inside the demo's functions
LAZY = {"timm", "torchvision", "safetensors", "onnx", "onnxscript", "onnxruntime", "matplotlib", "PIL", "triton"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())
IDS = list(MODULES)
# Kernels are imported by what launches them.
TRITON = {"t2t_fast.ops.tiles", *(name for name in MODULES if name.rpartition(".")[2] in KERNELS)}


def imports(name, top_level_only=False):
    """Absolute names that a module imports."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}"
                yield full if full in MODULES or alias.name == "__version__" else target


def layer(name):
    best = None
    for rank, patterns in enumerate(LAYERS):
        for pattern in patterns:
            head, star, tail = pattern.partition(".*")
            if star:
                fits = name.startswith(head + ".") and name.endswith(tail) and name.count(".") == pattern.count(".")
            else:
                fits = name == pattern or name.startswith(pattern + ".")
            if fits and (best is None or len(pattern) > best[0]):
                best = (len(pattern), rank)
    return None if best is None else best[1]


# Upstream's T2T module defines what the fused operators must compute. It imports nothing of ours: a shared part could
# be wrong in both. Whole reference models may use `models`, since golden numbers of upstream's code hold the backbones.
ORACLE = [
    *(f"t2t_fast.reference.{name}" for name in ("layers", "t2t_module", "token_performer", "token_transformer")),
    "t2t_fast.reference.lanl.tokens",
]
EMPTY = {name for name, path in MODULES.items() if not path.read_text()}


@pytest.mark.parametrize("name", [n for n in IDS if n not in EMPTY and n not in ORACLE])
def test_imports_go_down(name):
    rank = layer(name)
    assert rank is not None, f"{name} has no layer; give it one in this test and in CONTRIBUTING.md"
    for target in imports(name):
        if not target.startswith("t2t_fast") or target in ("t2t_fast.ops", "t2t_fast.__version__"):
            continue
        if target.startswith("t2t_fast.reference") and not name.startswith("t2t_fast.reference"):
            assert rank >= layer("t2t_fast.testing"), f"{name} must not use the oracle"
            continue
        below = layer(target)
        assert below is not None and below <= rank, f"{name} imports {target}, which lies above it"


@pytest.mark.parametrize("name", [n for n in IDS if n.startswith("t2t_fast.ops.")])
def test_operators_do_not_import_each_other(name):
    op = name.split(".")[2]
    others = {entry.name for entry in (PACKAGE / "ops").iterdir() if entry.is_dir()} - {op}
    allowed = COMPOSITES.get(op, set())
    for target in imports(name):
        parts = target.split(".")
        if target.startswith("t2t_fast.ops.") and parts[2] in others:
            assert parts[2] in allowed, f"{name} imports {target}"


@pytest.mark.parametrize("name", ORACLE)
def test_the_oracle_stands_alone(name):
    for target in imports(name):
        assert target in ORACLE or target.split(".")[0] in ("torch", "math"), f"{name} imports {target}"


def test_only_its_own_package_knows_lanl():
    """A family of models declares what others need of it; the rest is general."""
    for name, path in MODULES.items():
        if ".lanl" not in name and name not in ("t2t_fast.models", "t2t_fast.reference"):
            assert ".lanl" not in path.read_text() and "import lanl" not in path.read_text(), name


@pytest.mark.parametrize("name", [n for n in IDS if n not in DRAWING | TRITON])
def test_optional_packages_are_imported_where_they_are_used(name):
    for target in imports(name, top_level_only=True):
        assert target.split(".")[0] not in LAZY, f"{name} imports {target} at the top"


def test_every_operator_has_the_same_files():
    expected = {"__init__.py", "op.py", "reference.py", "aten_impl.py"}
    kernels = {"native_impl.py", "triton_impl.py", "launch.py", *(f"{name}.py" for name in KERNELS)}
    own = {
        "performer_layer": {"composed.py"},
        "soft_split_linear": {"call.py", "gradient.py", "layout.py"},
        "token_mlp": {"tail.py"},
    }
    for folder in (PACKAGE / "ops").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert {path.name for path in folder.glob("*.py")} - kernels - own.get(folder.name, set()) == expected


def test_only_config_reads_the_environment():
    for name, path in MODULES.items():
        if name != "t2t_fast.config":
            assert "os.environ" not in path.read_text(), name
