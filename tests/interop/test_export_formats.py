"""AOTInductor, OpenVINO, ONNX with int8 weights, and Triton's model repository."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from interop.test_export import TINY, Convolution, Stage, onnx_packages
from t2t_fast.interop.export import FORMATS, INT8_TOLERANCE, export_model, write_triton_repository
from t2t_fast.models import T2TViT
from t2t_fast.modules import TokenTransformer
from t2t_fast.ops._common.spec import T2T_WINDOWS


class Perceptron(nn.Module):
    """A model with two matrix products to quantise."""

    img_size = (8, 8)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.layers(x)


# ---- AOTInductor


@pytest.mark.slow
def test_an_aoti_package(tmp_path):
    model = Convolution()
    texts = []
    report = export_model(model, tmp_path, formats="aoti", dynamic_batch=True, dynamic_size=True, progress=texts.append)
    assert texts == [
        "trace the model",
        "write a package compiled by AOTInductor",
        "compare convolution.aoti.pt2 with the model",
    ]
    assert report.files[0].path.name == "convolution.aoti.pt2" and report.files[0].batches == (1, 2, 3)
    assert report.files[0].max_rel_error < 1e-5 and report.files[0].nodes == {}
    x = torch.randn(7, 3, 8, 12)
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch; sys.modules['t2t_fast'] = None; from torch._inductor import aoti_load_package\n"
        "torch.save(aoti_load_package('convolution.aoti.pt2')(torch.load('x.pt')), 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-I", "-c", script], cwd=tmp_path, check=True, timeout=300)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(RuntimeError, match=r"format 'aoti' needs a C\+\+ compiler.* install g\+\+"):
        export_model(Convolution(), tmp_path / "new", formats="aoti")
    assert not (tmp_path / "new").exists()


# ---- OpenVINO


def in_openvino(path, x, folder):
    """The outputs of a file in a process of its own, so that OpenVINO's threads do not disturb those of PyTorch."""
    torch.save(x, folder / "x.pt")
    script = (
        "import openvino, torch; x = torch.load('x.pt').numpy()\n"
        f"model = openvino.Core().compile_model({str(path)!r}, 'CPU', {{'INFERENCE_PRECISION_HINT': 'f32'}})\n"
        "torch.save(torch.from_numpy(model({'image': x})['output'].copy()), 'y.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-I", "-c", script], cwd=folder, check=True, timeout=300)
    return torch.load(folder / "y.pt")


@pytest.mark.slow
def test_openvino_reads_the_onnx_file(tmp_path):
    pytest.importorskip("openvino")
    onnx_packages()
    model = Stage()
    report = export_model(model, tmp_path, formats="onnx", dynamic_batch=True)
    x = torch.randn(5, 3, 16, 20)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(in_openvino(report.files[0].path, x, tmp_path), expected, rtol=1e-4, atol=1e-5)


def test_an_openvino_file(tmp_path):
    pytest.importorskip("openvino")
    model = Convolution()
    report = export_model(model, tmp_path, formats="openvino", dynamic_batch=True, dynamic_size=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convolution.bin", "convolution.xml"]
    assert report.files[0].max_rel_error < 1e-5 and report.files[0].batches == (1, 2, 3)
    x = torch.randn(5, 3, 9, 14)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(in_openvino(report.files[0].path, x, tmp_path), expected, rtol=1e-4, atol=1e-5)


class Transformer(nn.Module):
    """A layer whose attention has another scale than the default one, with weights that make it matter."""

    img_size = (16, 20)

    def __init__(self):
        super().__init__()
        self.layer = TokenTransformer(27, 64, 1)
        with torch.no_grad():
            self.layer.attn.qkv.weight.mul_(3)

    def forward(self, x):
        return self.layer(x, T2T_WINDOWS[1])


@pytest.mark.slow
def test_openvino_keeps_the_scale_of_attention(tmp_path):
    pytest.importorskip("openvino")
    report = export_model(Transformer(), tmp_path, formats="openvino", dynamic_batch=True)
    assert report.files[0].max_rel_error < 1e-5


def test_openvino_is_named_if_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"format 'openvino' needs openvino: pip install 't2t_fast\[openvino\]'"):
        export_model(Convolution(), tmp_path / "new", formats="openvino")
    assert not (tmp_path / "new").exists()


# ---- int8


def test_int8_products(tmp_path):
    onnx_packages()
    torch.manual_seed(0)
    model = Perceptron()
    report = export_model(model, tmp_path, formats=("onnx", "onnx-int8"), dynamic_batch=True)
    plain, small = report.files
    assert small.path.name == "perceptron.int8.onnx" and small.nodes["MatMulInteger"] == 2
    assert small.size < plain.size / 3
    assert 1e-5 < small.max_rel_error < INT8_TOLERANCE and small.agreement is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["perceptron.int8.onnx", "perceptron.onnx"]


def test_an_int8_file_with_a_large_error_is_refused(tmp_path):
    """One activation that is much larger than all others takes the whole range of the integers."""
    onnx_packages()

    class Outlier(Perceptron):
        def forward(self, x):
            x = x.flatten(1)
            return self.layers[1:](torch.cat([x[:, :1] + 1e5, x[:, 1:]], dim=1)) * 1e-3

    model = Outlier()
    with torch.no_grad():
        model.layers[1].weight[:, 0] = 0
    with pytest.raises(RuntimeError, match=r"the onnx-int8 file differs from the model by .*, allowed"):
        export_model(model, tmp_path / "new", formats="onnx-int8")
    assert not (tmp_path / "new").exists()


def test_int8_without_a_product(tmp_path):
    onnx_packages()
    with pytest.raises(RuntimeError, match="found no matrix product of the backbone to quantise"):
        export_model(Convolution(), tmp_path / "new", formats="onnx-int8")
    with pytest.raises(ValueError, match=r"format 'onnx-int8' are float32, got a model of torch\.float16"):
        export_model(Perceptron().half(), tmp_path / "new", formats="onnx-int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_int8_leaves_the_t2t_module(tmp_path):
    onnx_packages()
    torch.manual_seed(0)
    model = T2TViT(**TINY)
    file = export_model(model, tmp_path, formats="onnx-int8", dynamic_batch=True).files[0]
    assert file.nodes["MatMulInteger"] == 5  # qkv, proj, fc1, fc2 and the head
    assert file.nodes["Conv"] == 12 and file.max_rel_error < INT8_TOLERANCE


# ---- Triton


def model_config():
    """The class of the fields of Triton's ``ModelConfig`` that are written, with their types."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="test", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(("TYPE_INVALID", "TYPE_FP32", "TYPE_FP16", "TYPE_BF16")):
        types.value.add(name=name, number=number)
    tensor, config = file.message_type.add(name="Tensor"), file.message_type.add(name="ModelConfig")
    string, integer, enum, message = 9, 3, 14, 11
    tensor.field.add(name="name", number=1, type=string, label=1)
    tensor.field.add(name="data_type", number=2, type=enum, label=1, type_name=".test.DataType")
    tensor.field.add(name="dims", number=3, type=integer, label=3)
    for number, name in enumerate(("name", "backend", "platform"), 1):
        config.field.add(name=name, number=number, type=string, label=1)
    config.field.add(name="max_batch_size", number=4, type=integer, label=1)
    for number, name in enumerate(("input", "output"), 5):
        config.field.add(name=name, number=number, type=message, label=3, type_name=".test.Tensor")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.ModelConfig"))()


def read_config(folder):
    config = model_config()
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), config)


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_a_triton_repository(tmp_path, free):
    onnx_packages()
    report = export_model(Convolution(), tmp_path, formats="onnx", dynamic_batch=free, dynamic_size=free)
    target = write_triton_repository(report, tmp_path / "models")
    assert target == tmp_path / "models" / "convolution"
    assert (target / "1" / "model.onnx").read_bytes() == report.files[0].path.read_bytes()
    config = read_config(target)
    assert (config.name, config.backend, config.platform) == ("convolution", "onnxruntime", "")
    assert config.max_batch_size == (64 if free else 0)
    assert [(each.name, each.data_type, list(each.dims)) for each in (*config.input, *config.output)] == (
        [("image", 1, [3, -1, -1]), ("output", 1, [4])]
        if free
        else [("image", 1, [1, 3, 8, 12]), ("output", 1, [1, 4])]
    )
    run = FORMATS["onnx"].runner(target / "1" / "model.onnx")
    assert run(torch.randn(1, 3, 8, 12))[0].shape == (1, 4)


def test_triton_refuses_other_files(tmp_path):
    report = export_model(Convolution(), tmp_path, formats="program")
    with pytest.raises(ValueError, match=r"report must hold a file of onnx, onnx-int8, aoti in .*, got program"):
        write_triton_repository(report, tmp_path / "models")
    assert not (tmp_path / "models").exists()
