"""What a group measures, made once for all its providers: inputs, upstream gradient, truth in float64, competitors.

Rotating inputs: every call gets the same checked values in another place in memory, so that caches do not flatter.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

import t2t_fast
from t2t_fast import reference
from t2t_fast.reference.layers import init_weights
from t2t_fast.testing import DTYPES, ROW_FACTOR, errors, natural_images, tolerance

from . import context, costs, operators
from .providers import BACKENDS, OURS

COPIES = 3
"""Places in memory that the inputs rotate through."""

UNCACHED = 2**28
"""Bytes of inputs that no cache holds, so that they need not rotate."""

MODELS = {
    "t2t_vit_7": ("performer", 256, 7, 2),
    "t2t_vit_10": ("performer", 256, 10, 2),
    "t2t_vit_12": ("performer", 256, 12, 2),
    "t2t_vit_14": ("performer", 384, 14, 3),
    "t2t_vit_t_14": ("transformer", 384, 14, 3),
}
"""Tokens-type, width, depth and MLP ratio of the measured models, for their cost."""

CHUNK = 4
"""Samples whose truth is computed at a time."""

SLACK = 10
"""The tolerance table's cases are small, and it binds this package only. Here sums are over a hundred times as many
tokens, flat windows among them, and upstream's half-precision gradients must pass too, or there is no baseline."""

FLAT_ROW = 1e-3
"""A row of a flat, saturated window may be this wrong: LayerNorm magnifies its rounding up to 316 times."""

MODEL_TOLERANCES = {
    "fp32": {"forward": 2e-5, "backward": 1e-3},
    "fp16": {"forward": 2e-2, "backward": 2e-1},
    "bf16": {"forward": 1e-1, "backward": 5e-1},
}
"""Logits and worst parameter gradient of a whole model; wide, since errors grow through the blocks for everyone."""

NOISE = {"forward": 0.2, "backward": 0.8}
"""How far dropout may carry output and gradients away; upstream's is 0.05 and 0.4 for a T2T module's first images."""

MODULE_WIDTH = 384
"""Outgoing width of the T2T modules: T2T-ViT-14's."""


def _same(x):
    return x


@dataclass
class Implementation:
    """One way to compute a subject.

    Attributes:
        function: called with the tensors of an input set.
        inputs: the rotating sets; leaves: by name, the tensors of each set and the parameters that get a gradient.
        module: switched between eval and train mode, or ``None``.
        layout: brings the output to the subject's layout and back.
        truth: what this implementation must return if it is not what the others return: output and gradients.
        optimizer: for a model's training step.
        front_end: the part of a model that the package replaces, or ``None``.
        batch_norm: whether train mode computes another function even without dropout, so that only its finiteness is
            checked there.
    """

    function: Callable
    inputs: list[dict[str, torch.Tensor]]
    leaves: dict[str, torch.Tensor]
    module: torch.nn.Module | None = None
    layout: Callable = _same
    truth: tuple | None = None
    optimizer: torch.optim.Optimizer | None = None
    front_end: torch.nn.Module | None = None
    batch_norm: bool = False

    def gradients(self, index):
        """Gradients by name after a backward pass on input set ``index``."""
        tensors = {**self.leaves, **{name: t for name, t in self.inputs[index].items() if t.requires_grad}}
        return {name: tensor.grad for name, tensor in tensors.items()}

    def clear(self):
        """Forget every gradient."""
        for tensor in self.all_leaves():
            tensor.grad = None

    def all_leaves(self):
        """Every tensor that may hold a gradient."""
        return [*self.leaves.values(), *(t for inputs in self.inputs for t in inputs.values() if t.requires_grad)]


@dataclass
class Subject:
    """Everything about a group but the providers.

    Attributes:
        gradient: the upstream gradient, or ``None`` for a model, whose step makes a loss from ``labels``.
        make_truth: computes :attr:`truth` when it is first asked for: what was checked before needs none.
        tolerance: line of the tolerance table, or ``None`` for a model.
        make: source -> :class:`Implementation`.
        cost: :class:`costs.Cost` per image.
    """

    group: object
    device: str
    make_truth: Callable
    tolerance: str | None
    make: Callable
    cost: costs.Cost
    gradient: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @cached_property
    def truth(self):
        """Output and gradients by name, float64 on the CPU; gradients only in training."""
        return self.make_truth()

    @property
    def training(self):
        """Whether the group's mode has a backward pass."""
        return self.group.mode == "training"

    @property
    def autocast(self):
        """The context of every forward pass: autocast for a half type."""
        dtype = DTYPES[self.group.dtype]
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def backward(self, out, implementation):
        """What a training call does with an output like ``out``: a function of it, the upstream gradient made ahead."""
        if self.gradient is None:
            return lambda out: F.cross_entropy(out.float(), self.labels).backward()
        gradient = implementation.layout(self.gradient.to(out.dtype)).contiguous()
        return lambda out: out.backward(gradient)

    def check(self, out, gradients, implementation, noisy=False):
        """Raise ``AssertionError`` unless they are right; ``noisy``: but for dropout.

        Returns:
            the relative errors of the output and of the worst gradient (``None`` without a backward pass).
        """
        expected, expected_gradients = implementation.truth or self.truth
        noise = None
        if noisy:
            noise = dict.fromkeys(NOISE, torch.finfo(torch.float64).max) if implementation.batch_norm else NOISE
        error = self._within("output", implementation.layout(out), expected, noise)
        found = [self._within(name, gradient, expected_gradients[name], noise) for name, gradient in gradients.items()]
        return error, max(found, default=None)

    def _within(self, name, value, expected, noise):
        """The relative error of the output or of a named gradient, after the check of it and of its worst row."""
        whole, row = errors(value.cpu(), expected)
        direction = "forward" if name == "output" else "backward"
        if noise is not None:
            allowed, allowed_row = noise[direction], float("inf")
        elif self.tolerance is None:
            allowed, allowed_row = MODEL_TOLERANCES[self.group.dtype][direction], float("inf")
        else:
            allowed = SLACK * tolerance(self.tolerance, direction, DTYPES[self.group.dtype])
            allowed_row = max(ROW_FACTOR * allowed, FLAT_ROW)
        if not (whole <= allowed and row <= allowed_row):
            raise AssertionError(
                f"{self.group.id}: {name} is wrong by {whole:.2e} (worst row {row:.2e}), "
                f"allowed {allowed:.1e} (row {allowed_row:.1e})"
            )
        return whole


def build(group, device):
    """The subject of a group, on a device."""
    torch.manual_seed(0)
    return {"op": _operator, "module": _module, "model": _model}[group.level](group, device)


def copies(tensors):
    """How many places in memory inputs like these rotate through."""
    return COPIES if sum(t.numel() * t.element_size() for t in tensors) < UNCACHED else 1


def element_size(dtype):
    """Bytes of an activation."""
    return torch.empty(0, dtype=DTYPES[dtype]).element_size()


def _operator(group, device):
    op = operators.build(group.subject, group.size, group.batch)
    dtype, training = DTYPES[group.dtype], group.mode == "training"
    activation = torch.float32 if op.image else dtype
    # the parameters hold values of the half type, so that rounding them is nobody's error
    parameters = {name: t.to(dtype).float() for name, t in op.parameters.items()}
    moving = {name: t.to(activation) for name, t in op.moving.items()}
    wants = [name for name in parameters if name != "w"] + ([] if op.image else list(moving))
    one = op.sources["upstream"](**{name: t[:1] for name, t in op.moving.items()}, **op.parameters)
    shape = (group.batch, *one.shape[1:])
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def truth(function, layout=_same):
        """Output and gradients in float64, a few samples at a time: nothing mixes samples."""
        fixed = {name: t.to(device).double().requires_grad_(name in wants) for name, t in parameters.items()}
        outs, found = [], {name: [] for name in moving}
        for start in range(0, group.batch, CHUNK):
            chunk = slice(start, start + CHUNK)
            free = {n: t[chunk].to(device).double().requires_grad_(n in wants) for n, t in moving.items()}
            with torch.set_grad_enabled(training):
                out = layout(function(**free, **fixed))
            if training:
                out.backward(gradient[chunk].double())
            outs.append(out.detach().cpu())
            for name, tensor in free.items():
                found[name].append(tensor.grad)
        gradients = {name: torch.cat(parts).cpu() for name, parts in found.items() if parts[0] is not None}
        gradients |= {name: t.grad.cpu() for name, t in fixed.items() if t.grad is not None}
        return torch.cat(outs), gradients

    def make(source):
        # the harness chooses the backend
        function = op.function(OURS if source in BACKENDS else source, group.mode, device)
        layout = op.layouts.get(source, _same)
        leaves = {
            name: t.to(device, copy=True).requires_grad_(training and name in wants) for name, t in parameters.items()
        }
        inputs = [
            {name: t.to(device, copy=True).requires_grad_(training and name in wants) for name, t in moving.items()}
            for _ in range(copies(moving.values()))
        ]
        own_truth = truth(op.truths[source], layout) if source in op.truths else None
        used = set(wants) if own_truth is None else set(own_truth[1])
        return Implementation(
            lambda **tensors: function(**tensors, **leaves),
            inputs,
            {name: leaf for name, leaf in leaves.items() if name in used},
            layout=layout,
            truth=own_truth,
        )

    return Subject(
        group,
        device,
        lambda: truth(op.sources["upstream"]),
        op.name,
        make,
        op.cost(element_size(group.dtype)),
        gradient=gradient,
    )


def _images(group, device):
    images = natural_images(group.batch, 3, group.size, group.size)
    return images, [{"x": images.to(device, copy=True)} for _ in range(copies([images]))]


def _perturb(module):
    """Upstream initialises biases to 0 and gains to 1; other values make the check see them."""
    with torch.no_grad():
        for parameter in _trained(module).values():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _truth(module, images, backward):
    """Output and parameter gradients of a float64 copy in eval mode, image by image: nothing mixes images."""
    module = deepcopy(module).double().eval()
    outs = []
    for index, image in enumerate(images.double().split(1)):
        with torch.set_grad_enabled(backward is not None):
            out = module(image)
        if backward is not None:
            backward(out, index)
        outs.append(out.detach().cpu())
    return torch.cat(outs), {name: p.grad.cpu() for name, p in _trained(module).items() if p.grad is not None}


def _implementations(group, device, original, front_end=None, optimizer=None, truth=None):
    """The maker of all sources: upstream's module, the same instance swapped, and models of other packages, for which
    ``truth`` makes what they must return."""
    _, inputs = _images(group, device)
    training = group.mode == "training"

    def make(source):
        foreign = source in context.MODELS
        if foreign:
            torch.manual_seed(0)
            module = context.MODELS[source].build(group.subject, group.size)
        else:
            module = deepcopy(original)
            if source != "upstream":
                t2t_fast.swap(module)
        module = module.to(device).eval()
        leaves = _trained(module)
        return Implementation(
            (lambda x: module(x)) if foreign else module,  # a package may call its image otherwise
            inputs,
            leaves if training else {},
            module=module,
            truth=truth(module) if foreign else None,
            optimizer=optimizer(leaves.values()) if optimizer and training else None,
            front_end=front_end(module) if front_end and not foreign else None,
            batch_norm=any(isinstance(each, torch.nn.modules.batchnorm._BatchNorm) for each in module.modules()),
        )

    return make


def _module(group, device):
    original = reference.T2T_module(group.size, group.subject, embed_dim=MODULE_WIDTH).apply(init_weights)
    _perturb(original)
    gradient = torch.randn(group.batch, (group.size // 16) ** 2, MODULE_WIDTH).to(DTYPES[group.dtype])

    def backward(out, index):
        out.backward(gradient[index : index + 1].to(out))

    images, _ = _images(group, "cpu")
    original_there = deepcopy(original).to(device)
    return Subject(
        group,
        device,
        lambda: _truth(original_there, images.to(device), backward if group.mode == "training" else None),
        "t2t_module",
        _implementations(group, device, original),
        costs.t2t_module(group.subject, group.size, MODULE_WIDTH, element_size(group.dtype)),
        gradient=gradient.to(device),
    )


def _model(group, device):
    original = getattr(reference, group.subject)(img_size=group.size)
    _perturb(original)
    labels = torch.randint(1000, (group.batch,))

    def backward(out, index):
        (F.cross_entropy(out, labels[index : index + 1].to(out.device)) / group.batch).backward()

    images, _ = _images(group, "cpu")

    def truth(model):
        return _truth(model.to(device), images.to(device), backward if group.mode == "training" else None)

    tokens_type, width, depth, ratio = MODELS[group.subject]
    return Subject(
        group,
        device,
        lambda: truth(deepcopy(original)),
        None,
        # a learning rate of 0 does all the work and leaves the parameters what was checked
        _implementations(
            group,
            device,
            original,
            front_end=lambda module: module.tokens_to_token,
            optimizer=lambda leaves: torch.optim.AdamW(list(leaves), lr=0.0),
            truth=truth,
        ),
        costs.t2t_vit(tokens_type, group.size, width, depth, ratio, element_size(group.dtype)),
        labels=labels.to(device),
    )
