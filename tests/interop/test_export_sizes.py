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


def agree(report, model, sizes, batches=(1, 3)):
    """The first file gives the model's numbers at all sizes."""
    run = FORMATS[report.files[0].format].runner(report.files[0].path)
    for height, width in sizes:
        for batch in batches:
            x = torch.randn(batch, report.input_shape[1], height, width)
            with torch.no_grad():
                torch.testing.assert_close(run(x)[0], model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    model = T2TViT(**TINY)
    folder = tmp_path_factory.mktemp("program")
    return model, export_model(model, folder, formats="program", dynamic_batch=True, dynamic_size=True)


@pytest.mark.slow
def test_a_program_of_any_batch_and_size(program):
    model, report = program
    assert (
        report.dynamic_size and report.smallest == (19, 19) and report.free_shape == ("batch", "3", "height", "width")
    )
    assert report.outputs == ((-1, 5),)
    assert {shape[2:] for shape in report.files[0].shapes} == {(32, 32), (19, 19), (53, 37), (28, 48)}
    assert report.files[0].batches == (1, 2, 3) and report.files[0].max_rel_error < 1e-5
    assert "input (batch, 3, height, width) float32, height and width from 19 and 19 on" in str(report)
    agree(report, model, SIZES)


@pytest.mark.slow
def test_a_smaller_image_is_refused_by_the_program(program):
    loaded = torch.export.load(program[1].files[0].path).module()
    with pytest.raises((RuntimeError, AssertionError), match="19"):
        loaded(torch.randn(1, 3, 16, 32))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "aoti"])
def test_a_stage_in_each_format(tmp_path, format):
    onnx_packages()
    pytest.importorskip("openvino" if format == "openvino" else "torch")
    model = Stage()
    report = export_model(model, tmp_path, formats=format, dynamic_batch=True, dynamic_size=True)
    assert not set(FORBIDDEN_NODES) & set(report.files[0].nodes)
    agree(report, model, [report.smallest, (16, 20), (33, 7), (12, 40)])


@pytest.mark.slow
@pytest.mark.parametrize("tokens_type", ["performer", "transformer", "convolution", "patch"])
def test_an_onnx_file_of_any_batch_and_size(tmp_path, tokens_type):
    onnx_packages()
    torch.manual_seed(0)
    model = T2TViT(**TINY, tokens_type=tokens_type)
    report = export_model(model, tmp_path, formats="onnx", dynamic_batch=True, dynamic_size=True)
    assert report.files[0].nodes["Resize"] == 1 and not set(FORBIDDEN_NODES) & set(report.files[0].nodes)
    agree(report, model, [size for size in SIZES if min(size) >= max(report.smallest)])


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
    with pytest.raises(RuntimeError, match=r"T2T_ViT fails for 48x64 .*t2t_fast\.create_model.*load_checkpoint"):
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
