"""The import layers of docs/development.md, checked by parsing every import."""

import ast
from fnmatch import fnmatchcase

import pytest

from support import ROOT

OPS, COMMON = "t2t_fast.ops.*", "t2t_fast.ops._common"
# Lowest layer first; a module may import modules of its own layer and anything below.
LAYERS = [
    ["t2t_fast.errors", "t2t_fast.config", "t2t_fast._deprecated", "t2t_fast._extension"],
    ["t2t_fast.backends", "t2t_fast.memory"],
    [
        COMMON,
        *(
            f"{COMMON}.{name}"
            for name in (
                "spec",
                "transforms",
                "guards",
                "replay",
                "costs",
                "flops",
                "windows",
                "causal",
                "philox",
                "pixels",
                "attention",
            )
        ),
    ],
    [f"{COMMON}.{name}" for name in ("library", "launch_table", "cached")],
    [f"{COMMON}.{name}" for name in ("native_library", "triton_runtime", "tiles", "elementwise")],
    [f"{OPS}.{name}" for name in ("reference", "autograd", "aten", "graph")],
    [f"{OPS}.triton.*", f"{OPS}.native"],
    [f"{OPS}.op"],
    ["t2t_fast.functional*"],
    ["t2t_fast.modules*"],
    ["t2t_fast.models*"],
    ["t2t_fast.reference*"],
    ["t2t_fast.interop*"],
    ["t2t_fast.timm"],
    ["t2t_fast.cuda_graphs", "t2t_fast.testing", "t2t_fast.environment", "t2t_fast.verification*"],
    ["t2t_fast"],
    ["t2t_fast.demo*"],
    ["t2t_fast.cli*", "t2t_fast.__main__"],
    ["benchmarks.suites*"],
    ["benchmarks.measure*"],
    ["benchmarks.report*"],
    ["benchmarks.kernels*", "benchmarks.questions*"],
    ["benchmarks.gpu*"],
    ["benchmarks*"],
]
# Operators do not import each other, except those that are composed of others.
COMPOSITES = {
    "performer_layer": {"soft_split_linear", "performer_attention", "token_mlp"},
    "layer_norm_linear": {"add_layer_norm"},
    "layer_norm_mlp": {"add_layer_norm", "layer_norm_linear"},
    "transformer_block": {"layer_norm_linear", "layer_norm_mlp"},
}
# Modules that import optional packages at the top: the command imports them after checking that the extra is installed.
DRAWING = {f"t2t_fast.demo.{name}" for name in ("charts", "page", "pictures", "run", "style")}
# A plug-in of an optional package, imported by its users only.
PLUGINS = {"t2t_fast.timm"}
# Heavy or optional packages, which other modules import only inside the functions that use them.
LAZY = {
    "timm",
    "torchvision",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "matplotlib",
    "jinja2",
    "PIL",
    "triton",
    "accelerate",
    "huggingface_hub",
    "openvino",
    "torchao",
}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = {**dict(modules("t2t_fast")), **dict(modules("benchmarks"))}
PACKAGE = [name for name in MODULES if name.startswith("t2t_fast")]


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


# Kernels and their launchers are imported at the first launch.
TRITON = {
    f"{COMMON}.tiles",
    f"{COMMON}.elementwise",
    *(n for n in PACKAGE if ".triton." in n and "triton" in imports(n, top_level_only=True)),
}


def layer(name):
    """The rank of the most specific pattern that names a module, or ``None``."""
    found = [(len(p), rank) for rank, patterns in enumerate(LAYERS) for p in patterns if fnmatchcase(name, p)]
    return max(found)[1] if found else None


# The reference T2T module defines what the fused operators must compute. It imports none of the package's other code:
# an error in shared code would go unnoticed. Whole reference models may use `models`, whose backbones are checked by
# golden numbers of upstream's code.
ORACLE = [
    *(f"t2t_fast.reference.{name}" for name in ("layers", "t2t_module", "token_performer", "token_transformer")),
    "t2t_fast.reference.lanl.tokens",
]
EMPTY = {name for name, path in MODULES.items() if not path.read_text()}


@pytest.mark.parametrize("name", [n for n in MODULES if n not in EMPTY and n not in ORACLE])
def test_imports_go_down(name):
    rank = layer(name)
    assert rank is not None, f"{name} has no layer; give it one in this test and in docs/development.md"
    for target in imports(name):
        if target.split(".")[0] not in ("t2t_fast", "benchmarks") or target == "t2t_fast.__version__":
            continue
        if target.startswith("t2t_fast.reference") and not name.startswith("t2t_fast.reference"):
            assert rank >= layer("t2t_fast.testing"), f"{name} must not use the oracle"
            continue
        if target in EMPTY:
            continue
        below = layer(target)
        assert below is not None and below <= rank, f"{name} imports {target}, which lies above it"


@pytest.mark.parametrize("name", [n for n in PACKAGE if n.startswith("t2t_fast.ops.")])
def test_operators_do_not_import_each_other(name):
    op = name.split(".")[2]
    operators = {entry.name for entry in (ROOT / "t2t_fast" / "ops").iterdir() if entry.is_dir()} - {"_common"}
    allowed = COMPOSITES.get(op, set()) | {op}
    for target in imports(name):
        parts = target.split(".")
        if target.startswith("t2t_fast.ops.") and parts[2] in operators:
            assert parts[2] in allowed, f"{name} imports {target}"


@pytest.mark.parametrize("name", ORACLE)
def test_the_oracle_imports_only_itself_and_torch(name):
    for target in imports(name):
        assert target in ORACLE or target.split(".")[0] in ("torch", "math"), f"{name} imports {target}"


def test_only_its_own_package_imports_lanl():
    """A model family registers what other modules need; they do not import it by name."""
    for name in PACKAGE:
        if ".lanl" not in name and name not in ("t2t_fast.models", "t2t_fast.reference"):
            text = MODULES[name].read_text()
            assert ".lanl" not in text and "import lanl" not in text, name


@pytest.mark.parametrize("name", [n for n in PACKAGE if n not in DRAWING | PLUGINS | TRITON])
def test_optional_packages_are_imported_where_they_are_used(name):
    for target in imports(name, top_level_only=True):
        assert target.split(".")[0] not in LAZY, f"{name} imports {target} at the top"
        assert target not in TRITON, f"{name} imports kernels at the top: {target}"


def test_every_operator_has_the_same_files():
    implementations = {"reference.py", "aten.py", "graph.py", "native.py", "autograd.py"}
    kernels = {"operators.py", "support.py", "launch.py", "forward.py"}
    for folder in (ROOT / "t2t_fast" / "ops").iterdir():
        if not folder.is_dir() or folder.name in ("_common", "__pycache__"):
            continue
        files = {path.name for path in folder.glob("*.py")}
        assert {"__init__.py", "op.py", "reference.py", "aten.py"} <= files, folder.name
        assert files <= {"__init__.py", "op.py", *implementations}, folder.name
        if (folder / "triton").is_dir():
            assert kernels <= {path.name for path in (folder / "triton").glob("*.py")}, folder.name


def test_only_config_reads_the_environment():
    for name in PACKAGE:
        if name != "t2t_fast.config":
            assert "os.environ" not in MODULES[name].read_text(), name
