"""Models quantised by torchao: what stays fused, what runs child by child, and their errors."""

import copy
import warnings

import pytest
import torch
from torch import nn

import t2t_fast
from interop.test_export import TINY
from t2t_fast import reference
from t2t_fast.interop import backbone_filter, quantization_report
from t2t_fast.interop.swap import swap
from t2t_fast.models import T2TViT


def quantized(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        copied = copy.deepcopy(model)
        torchao.quantize_(copied, torchao.Int8WeightOnlyConfig(), **options)
    return copied


def swapped():
    model = reference.T2T_ViT(**TINY)
    swap(model)
    return model


@pytest.mark.parametrize("build", [lambda: T2TViT(**TINY), swapped], ids=["new", "swapped"])
def test_the_backbone_in_int8(build):
    torch.manual_seed(0)
    model = build().eval()
    small = quantized(model, filter_fn=backbone_filter(model))
    changed = {name for name, module in small.named_modules() if "Int8" in type(getattr(module, "weight", 0)).__name__}
    assert changed == {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} | {"head"}
    lines = str(t2t_fast.explain(small)).splitlines()
    assert any("blocks.0" in line and "unfused" in line for line in lines)
    assert not any("attention1" in line and "unfused" in line for line in lines)
    report = quantization_report(model, small, torch.randn(12, 3, 32, 32), batch=5)
    assert 0 < report.max_rel_error < 0.02 and report.max_abs_error > 0 and report.images == 12
    assert report.quantized_bytes < report.original_bytes and report.classes >= 1
    assert "top-1 agreement" in str(report) and f"{report.max_rel_error:.1e}" in str(report)


def test_all_layers_in_int8_run_child_by_child():
    torch.manual_seed(0)
    model = T2TViT(**TINY).eval()
    small = quantized(model)
    assert "Int8" in type(small.tokens_to_token.attention1.kqv.weight).__name__
    report = quantization_report(model, small, torch.randn(4, 3, 32, 32))
    assert 0 < report.max_rel_error < 0.05


def test_the_report_sees_a_difference():
    torch.manual_seed(0)
    model = T2TViT(**TINY).train()
    other = copy.deepcopy(model)
    same = quantization_report(model, other, torch.randn(4, 3, 32, 32))
    assert same.max_abs_error == 0 and same.agreement == 1 and same.original_bytes == same.quantized_bytes
    with torch.no_grad():
        other.head.weight.neg_()
    worse = quantization_report(model, other, torch.randn(4, 3, 32, 32))
    assert worse.max_rel_error > 1 and worse.agreement < 1 and model.training and other.training


def test_bad_arguments():
    model, images = nn.Flatten(), torch.randn(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"quantization_report: quantized must be a torch\.nn\.Module, got str"):
        quantization_report(model, "int8", images)
    with pytest.raises(ValueError, match="quantization_report: images must be 4-D, got 2-D"):
        quantization_report(model, model, torch.ones(2, 3))
    with pytest.raises(ValueError, match="quantization_report: batch must be at least 1, got 0"):
        quantization_report(model, model, images, batch=0)
    with pytest.raises(RuntimeError, match="the quantised model returns other shapes than the model"):
        quantization_report(model, nn.Identity(), images)
