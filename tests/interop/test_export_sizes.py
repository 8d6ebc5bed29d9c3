"""Exported files whose image size is free: their numbers at many sizes, and models that cannot have one."""

import pytest
import torch
from torch import nn

from interop.test_export import TINY, Convolution, Stage, onnx_packages, run_onnx
from t2t_fast import reference
from t2t_fast.interop.export import FORBIDDEN_NODES, FORMATS, export_model
from t2t_fast.interop.swap import swap
from t2t_fast.models import T2TViT

SIZES = [(19, 19), (32, 32), (33, 32), (37, 50), (64, 19), (48, 112)]
"""The smallest; that of the position table; not multiples of 16; not square."""


def agree(file, model, sizes, batches=(1, 3)):
    """The file gives the model's numbers at all sizes."""
    run = FORMATS[file.format].runner(file.path)
    for height, width in sizes:
        for batch in batches:
            x = torch.randn(batch, 3, height, width)
            with torch.no_grad():
                torch.testing.assert_close(run(x)[0], model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    onnx_packages()
    torch.manual_seed(0)
    model = T2TViT(**TINY)
    folder = tmp_path_factory.mktemp("export")
    return model, export_model(model, folder, dynamic_batch=True, dynamic_size=True)


@pytest.mark.slow
def test_files_of_any_batch_and_size(exported):
    model, report = exported
    assert report.dynamic_size and report.smallest == (19, 19) and report.outputs == ((-1, 5),)
    assert report.free_shape == ("batch", "3", "height", "width")
    assert "input (batch, 3, height, width) float32, height and width from 19 and 19 on" in str(report)
    for file in report.files:
        assert {shape[2:] for shape in file.shapes} == {(32, 32), (19, 19), (53, 37), (28, 48)}
        assert file.batches == (1, 2, 3) and file.max_rel_error < 1e-5
        agree(file, model, SIZES)
    nodes = report.files[0].nodes
    assert nodes["Resize"] == 1 and nodes["Conv"] == 12 and not set(FORBIDDEN_NODES) & set(nodes)


@pytest.mark.slow
def test_a_smaller_image_is_refused_by_the_program(exported):
    loaded = torch.export.load(exported[1].files[1].path).module()
    with pytest.raises((RuntimeError, AssertionError), match="19"):
        loaded(torch.randn(1, 3, 16, 32))


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("onnx", "openvino"), ("aoti",)], ids="+".join)
def test_a_stage_in_other_formats(tmp_path, formats):
    onnx_packages()
    pytest.importorskip("openvino")
    model = Stage()
    report = export_model(model, tmp_path, formats=formats, dynamic_batch=True, dynamic_size=True)
    for file in report.files:
        assert not set(FORBIDDEN_NODES) & set(file.nodes)
        agree(file, model, [report.smallest, (16, 20), (33, 7), (12, 40)])


@pytest.mark.slow
def test_convolutions_of_any_size(tmp_path):
    onnx_packages()
    model = T2TViT(**TINY, tokens_type="convolution")
    report = export_model(model, tmp_path, formats="onnx", dynamic_batch=True, dynamic_size=True)
    agree(report.files[0], model, SIZES)


def test_patches_need_multiples(tmp_path):
    with pytest.raises(RuntimeError, match=r"T2TViT fails for 37x37 .*patch_size 16 must divide the image"):
        export_model(T2TViT(**TINY, tokens_type="patch"), tmp_path / "new", formats="program", dynamic_size=True)
    assert not (tmp_path / "new").exists()


def test_free_axes_have_names(tmp_path):
    onnx_packages()
    onnx = pytest.importorskip("onnx")
    model = Convolution()
    report = export_model(model, tmp_path, formats="onnx", dynamic_size=True)
    dims = onnx.load(report.files[0].path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [1, 3, "height", "width"]
    x = torch.randn(1, 3, 21, 9)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(report.files[0].path, x)[0], model.eval()(x))


@pytest.mark.parametrize("swapped", [False, True], ids=["upstream", "swapped"])
def test_upstreams_fixed_positions_are_refused(tmp_path, swapped):
    model = reference.T2T_ViT(**TINY)
    if swapped:
        swap(model)
    with pytest.raises(RuntimeError, match=r"T2T_ViT fails for 37x37 .*t2t_fast\.create_model.*load_checkpoint"):
        export_model(model, tmp_path / "new", img_size=32, formats="program", dynamic_size=True)
    assert not (tmp_path / "new").exists()


def test_a_model_that_branches_on_the_size_is_refused(tmp_path):
    class Branches(Convolution):
        def forward(self, x):
            return super().forward(x) * (2 if x.shape[2] == 24 else 3)

    with pytest.raises(RuntimeError, match=r"Branches fixes one \(.*create_model"):
        export_model(Branches(), tmp_path / "new", formats="program", dynamic_size=True)
    assert not (tmp_path / "new").exists()


def test_a_wrong_file_fails_the_check(tmp_path):
    class Different(nn.Module):
        img_size = (8, 12)

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
            return x.mean((2, 3)) * self.scale * (2 if traced else 1)

    with pytest.raises(RuntimeError, match="the program file differs from the model by"):
        export_model(Different(), tmp_path / "new", formats="program", dynamic_size=True)
    assert not (tmp_path / "new").exists()
