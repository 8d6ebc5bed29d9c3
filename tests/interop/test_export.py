"""Exported files: their contents, their agreement with the model, and that a failure leaves none."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from support import ROOT
from t2t_fast import reference
from t2t_fast.interop.export import FORBIDDEN_NODES, TOLERANCES, export_model, onnx_files
from t2t_fast.interop.swap import swap
from t2t_fast.models import T2TViT, lanl
from t2t_fast.modules import TokenPerformer
from t2t_fast.ops._common.spec import T2T_WINDOWS

TINY = dict(img_size=32, embed_dim=24, depth=1, num_heads=3, mlp_ratio=3, token_dim=16, num_classes=5)


def _swapped():
    model = reference.T2T_ViT(**TINY)
    swap(model)
    return model


class Stage(nn.Module):
    """One stage of the T2T module, which takes a third of a model's time to export."""

    img_size = (16, 20)

    def __init__(self):
        super().__init__()
        self.layer = TokenPerformer(27, 8)

    def forward(self, x):
        return self.layer(x, T2T_WINDOWS[1])


def _articles():
    return lanl.T2TViT((1, 32, 48), (7, 3, 3), preds=5, token_len=24, token_chan=16, num_heads=2, depth=1)


class Convolution(nn.Module):
    """A model that takes little time to export."""

    img_size = (8, 12)

    def __init__(self, outputs=1):
        super().__init__()
        self.outputs = outputs
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.GELU())

    def forward(self, x):
        x = self.layer(x).flatten(2).mean(2)
        return x if self.outputs == 1 else (x, x * 2)


class Watched(Convolution):
    """Contains an operation that many runtimes lack."""

    def forward(self, x):
        return torch.einsum("bchw,cd->bd", x, torch.ones(3, 2))


def onnx_packages():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def run_onnx(path, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["image"]
    return [torch.from_numpy(y) for y in session.run(None, {"image": x.numpy()})]


def agree(got, model, x):
    with torch.no_grad():
        torch.testing.assert_close(got, model.eval()(x), rtol=1e-4, atol=1e-5)


# The quick tests run "stage", with a free batch size.
CASES = {
    "stage": (Stage, dict(dynamic_batch=True)),
    "performer": (lambda: T2TViT(**TINY), dict(dynamic_batch=True)),
    "transformer": (lambda: T2TViT(**TINY, tokens_type="transformer"), dict(dynamic_batch=True)),
    "convolution": (lambda: T2TViT(**TINY, tokens_type="convolution"), dict(dynamic_batch=True)),
    "patch": (lambda: T2TViT(**TINY, tokens_type="patch", block="ghost"), dict(dynamic_batch=True)),
    "other size": (lambda: T2TViT(**TINY), dict(img_size=(32, 48), batch=2)),
    "swapped": (_swapped, dict(dynamic_batch=True)),
    "articles": (_articles, dict(img_size=(32, 48), in_chans=1)),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "stage" else pytest.mark.slow) for name in CASES],
    ids=str,
)
def exported(request, tmp_path_factory):
    """Each model, exported once in both formats."""
    onnx_packages()
    build, options = CASES[request.param]
    torch.manual_seed(0)
    model = build()
    folder = tmp_path_factory.mktemp("export") / "new"
    return model, options, folder, export_model(model, folder, name="model", **options)


def test_the_report(exported):
    model, options, folder, report = exported
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.pt2"]
    free = options.get("dynamic_batch", False)
    assert report.dynamic_batch == free and report.dtype == torch.float32
    for file in report.files:
        assert file.path.parent == folder and file.size == file.path.stat().st_size
        assert file.size > 4 * sum(p.numel() for p in model.parameters())
        assert file.batches == ((1, 2, 3) if free else (report.input_shape[0],))
        assert file.max_abs_error < 1e-5 and file.max_rel_error < 1e-5
        assert f"{file.max_rel_error:.1e}" in str(report) and str(file.path) in str(report)
    assert ("input (batch, " in str(report)) == free


def test_plain_onnx_nodes_only(exported):
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(exported[-1].files[0].path)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", 20)]
    nodes = Counter(node.op_type for node in proto.graph.node)
    assert dict(nodes) == exported[-1].files[0].nodes and not set(FORBIDDEN_NODES) & set(nodes)
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert first.dim_param == ("batch" if exported[-1].dynamic_batch else "")


def test_aten_operators_only(exported):
    program = torch.export.load(exported[-1].files[1].path)
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert targets and {target.namespace for target in targets} == {"aten"}
    assert not {"im2col", "col2im", "einsum"} & {target._schema.name.removeprefix("aten::") for target in targets}


def test_the_models_numbers(exported):
    model, _, _, report = exported
    batch, *image = report.input_shape
    for size in (1, batch + 3) if report.dynamic_batch else (batch,):
        x = torch.randn(size, *image)
        agree(run_onnx(report.files[0].path, x)[0], model, x)
        agree(torch.export.load(report.files[1].path).module()(x), model, x)


def test_no_path_of_this_machine_is_in_a_file(exported):
    for file in exported[-1].files:
        assert str(ROOT).encode() not in file.path.read_bytes()


@pytest.mark.parametrize("exported", ["stage", pytest.param("swapped", marks=pytest.mark.slow)], indirect=True)
def test_a_program_runs_without_the_package(exported, tmp_path):
    model, _, _, report = exported
    x = torch.randn(3, *report.input_shape[1:])
    torch.save(x, tmp_path / "x.pt")
    script = f"""
        import sys, torch
        sys.modules["t2t_fast"] = None
        x = torch.load("x.pt")
        torch.save(torch.export.load({str(report.files[1].path)!r}).module()(x).detach(), "y.pt")
    """
    script = "\n".join(line.strip() for line in script.splitlines())
    subprocess.run([sys.executable, "-W", "ignore", "-I", "-c", script], cwd=tmp_path, check=True, timeout=300)
    agree(torch.load(tmp_path / "y.pt"), model, x)


def test_bfloat16(tmp_path):
    report = export_model(T2TViT(**TINY).bfloat16(), tmp_path, formats="program")
    assert report.dtype == torch.bfloat16 and report.files[0].max_rel_error <= TOLERANCES[torch.bfloat16]
    assert report.name == "t2tvit" and (tmp_path / "t2tvit.pt2").exists()


@pytest.mark.slow
def test_half_onnx(tmp_path):
    onnx_packages()
    report = export_model(T2TViT(**TINY).half(), tmp_path, formats="onnx")
    assert report.files[0].max_rel_error <= TOLERANCES[torch.float16]


def test_opset_18(tmp_path):
    onnx_packages()
    onnx = pytest.importorskip("onnx")
    report = export_model(Convolution(), tmp_path, formats="onnx", opset=18)
    assert onnx.load(report.files[0].path).opset_import[0].version == 18 and "Gelu" not in report.files[0].nodes


def test_several_outputs(tmp_path):
    onnx_packages()
    model = Convolution(outputs=2)
    report = export_model(model, tmp_path, dynamic_batch=True)
    x = torch.randn(5, 3, 8, 12)
    for got in (run_onnx(report.files[0].path, x), torch.export.load(report.files[1].path).module()(x)):
        agree(tuple(got), model, x)


def test_the_model_is_as_before(tmp_path):
    model = T2TViT(**TINY)
    model.blocks[0].eval()
    before = [(module, module.training) for module in model.modules()]
    parameters = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = export_model(model, tmp_path, formats="program", check=False)
    assert before == [(module, module.training) for module in model.modules()]
    assert parameters == {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    assert report.files[0].batches == () and report.files[0].max_abs_error is None and "not checked" in str(report)
    x = torch.randn(1, 3, 32, 32)
    agree(torch.export.load(report.files[0].path).module()(x), model, x)


def test_weights_in_a_second_file(tmp_path, monkeypatch):
    onnx_packages()
    monkeypatch.setattr(onnx_files, "SINGLE_FILE_LIMIT", 0)
    model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.Flatten(2))
    report = export_model(model, tmp_path, name="model", formats="onnx", img_size=8)
    parts = [tmp_path / "model.onnx", tmp_path / "model.onnx.data"]
    assert sorted(tmp_path.iterdir()) == parts
    assert report.files[0].size == sum(part.stat().st_size for part in parts) and parts[1].stat().st_size >= 64 * 75 * 4
    agree(run_onnx(parts[0], torch.ones(1, 3, 8, 8))[0], model, torch.ones(1, 3, 8, 8))


def test_files_are_replaced_only_by_good_ones(tmp_path, monkeypatch):
    onnx_packages()
    for ending in (".onnx", ".pt2"):
        (tmp_path / f"convolution{ending}").write_bytes(b"old")
    monkeypatch.setitem(TOLERANCES, torch.float32, -1.0)
    with pytest.raises(RuntimeError, match="the onnx file differs from the model by"):
        export_model(Convolution(), tmp_path)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"old", b"old"]
    monkeypatch.undo()
    export_model(Convolution(), tmp_path)
    assert all(len(path.read_bytes()) > 100 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_forbidden_nodes_are_refused(tmp_path):
    onnx_packages()
    with pytest.raises(RuntimeError, match=r"plain operators only, got Einsum; .* swap the model first"):
        export_model(Watched(), tmp_path / "new", formats="onnx")
    assert not (tmp_path / "new").exists()


def test_foreign_operators_are_refused(tmp_path):
    @torch.library.custom_op("t2t_fast_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Foreign(Convolution):
        def forward(self, x):
            return twice(x)

    with pytest.raises(RuntimeError, match=r"only ATen operators can be exported, got t2t_fast_tests\.twice\.default"):
        export_model(Foreign(), tmp_path / "new", formats="program")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    onnx_packages()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 't2t_fast\[export\]'"):
        export_model(Convolution(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(model="t2t_vit_7"), TypeError, r"model must be a torch\.nn\.Module, got str"),
        (dict(batch=0), ValueError, "batch must be an int of at least 1, got 0"),
        (
            dict(formats=("onnx", "tflite")),
            ValueError,
            "formats must be of onnx, program, aoti, openvino, onnx-int8, got",
        ),
        (dict(formats=()), ValueError, "formats must be of onnx, program, aoti, openvino, onnx-int8, got"),
        (dict(dynamic_size=1), TypeError, "dynamic_size must be True or False, got 1"),
        (dict(opset=17), ValueError, "opset must be an int of at least 18, got 17"),
        (dict(name="a/b"), ValueError, "name must be a plain file name, got 'a/b'"),
        (dict(img_size="32"), TypeError, "img_size must be an int or a pair of ints, got '32'"),
        (dict(model=nn.Identity()), ValueError, "img_size is needed"),
        (dict(model=Convolution().double(), formats="onnx"), ValueError, r"float32 or float16, got .* torch\.float64"),
        (dict(model=nn.Upsample(scale_factor=2), img_size=0), ValueError, "img_size must be at least 1, got 0"),
    ],
    ids=["model", "batch", "format", "no format", "dynamic", "opset", "name", "size", "no size", "dtype", "zero"],
)
def test_bad_arguments(tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        export_model(**{"model": Convolution(), "folder": tmp_path / "new", **options})
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="folder must be a directory"):
        export_model(Convolution(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_optional_packages_are_imported_when_they_are_needed():
    names = ("onnx", "onnxscript", "onnxruntime", "openvino", "torchao", "safetensors", "timm")
    script = f"import sys, t2t_fast.interop; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
def test_a_model_on_a_gpu_becomes_portable_files(tmp_path):
    model = Convolution().cuda()
    report = export_model(model, tmp_path, formats="program")
    assert model.layer[0].weight.is_cuda
    x = torch.randn(1, 3, 8, 12)
    agree(torch.export.load(report.files[0].path).module()(x), model.cpu(), x)
