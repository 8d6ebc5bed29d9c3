"""The error of a quantised model, and which layers of a model to quantise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import check_sizes, check_tensor
from .export.compare import compare
from .export.source import backbone_linears
from .export.trace import for_inference, outputs


@dataclass(frozen=True)
class QuantizationReport:
    """The result of :func:`quantization_report`; ``str()`` is one line.

    Attributes:
        max_abs_error: largest difference of an output; max_rel_error: that divided by the largest output.
        agreement: share of images whose largest logit is that of the original; images: their number.
        classes: number of different classes that the original gives them; with one the agreement says nothing.
        original_bytes, quantized_bytes: of parameters and buffers.
    """

    max_abs_error: float
    max_rel_error: float
    agreement: float | None
    images: int
    classes: int
    original_bytes: int
    quantized_bytes: int

    def __str__(self) -> str:
        agreement = "-" if self.agreement is None else f"{self.agreement:.1%}"
        return (
            f"{self.original_bytes / 1e6:.1f} MB -> {self.quantized_bytes / 1e6:.1f} MB, max abs error "
            f"{self.max_abs_error:.1e}, relative to the largest output {self.max_rel_error:.1e}, top-1 agreement "
            f"{agreement} on {self.images} images of {self.classes} classes"
        )


def backbone_filter(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """A ``filter_fn`` for ``torchao.quantization.quantize_`` of a model or a copy: the Linear layers outside the T2T
    module, which stays fused in float32."""
    names = backbone_linears(model).keys()
    return lambda _, name: name in names


def quantization_report(
    model: nn.Module, quantized: nn.Module, images: torch.Tensor, *, batch: int = 8
) -> QuantizationReport:
    """Compare a quantised model with the original, in eval mode; the training flags of both are restored.

    Args:
        model, quantized: (B, C, H, W) -> (B, classes), both on the CPU.
        images: (N, C, H, W) float, normalised as in training. Take images that the model was trained for: on noise all
            logits are alike.
        batch: images of one call.

    Returns:
        a :class:`QuantizationReport`.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: the outputs differ in shape.
    """
    for name, value in (("model", model), ("quantized", quantized)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"quantization_report: {name} must be a torch.nn.Module, got {type(value).__name__}")
    check_tensor("quantization_report", "images", images, ndim=4)
    check_sizes("quantization_report", batch=batch)
    with for_inference(model) as original, for_inference(quantized) as other:
        cases = [(x, outputs(original(x))) for x in images.split(batch)]
        found = compare(lambda x: outputs(other(x)), cases, "quantization_report: the quantised model")
    classes = len(torch.cat([logits[0].flatten(1).argmax(1) for _, logits in cases]).unique())
    return QuantizationReport(*found, len(images), classes, tensor_bytes(model), tensor_bytes(quantized))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; those of a tensor subclass are its parts'."""

    def size(tensor: Any) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return int(tensor.numel() * tensor.element_size())

    return sum(map(size, (*model.parameters(), *model.buffers())))
