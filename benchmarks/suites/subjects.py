"""The subject of a group, shared by its providers: inputs, upstream gradient, float64 result, implementations.

Inputs rotate: successive calls get the same values in different places in memory, so that no cache holds them.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import t2t_fast
from t2t_fast import reference
from t2t_fast.reference.layers import init_weights
from t2t_fast.testing import DTYPES, ROW_FACTOR, errors, natural_images, tolerance

from . import costs, operators, packages
from .providers import BACKENDS, OURS

COPIES = 3  # places in memory between which the inputs rotate
UNCACHED = 2**28  # bytes; inputs of this size fit into no cache and need not rotate
CHUNK = 4  # samples whose float64 result is computed at a time
# Factor on the tolerance table, whose cases are small and whose limits apply to this package only. Here sums have a
# hundred times as many tokens, some windows are flat, and upstream's half-precision gradients must pass too.
SLACK = 10
FLAT_ROW = 1e-3  # allowed error of the row of a flat window, where LayerNorm magnifies rounding up to 316 times
# (logits, worst parameter gradient) of a whole model; wide, because errors grow from block to block
MODEL_TOLERANCES = {"fp32": (2e-5, 1e-3), "fp16": (2e-2, 2e-1), "bf16": (1e-1, 5e-1)}
# allowed effect of dropout on (output, gradients); upstream's is 0.05 and 0.4 for a T2T module's first images
NOISE = (0.2, 0.8)
MODULE_WIDTH = 384  # output width of the T2T modules, as in T2T-ViT-14


@dataclass
class Implementation:
    """One way to compute a subject.

    ``function``: takes the tensors of an input set; ``inputs``: the rotating sets; ``leaves``: name -> parameter with a
    gradient; ``module``: is switched between eval and train mode; ``truth``: float64 output and gradients, if they
    differ from the subject's; ``optimizer``: for a model's training step.
    """

    function: Callable
    inputs: list[dict[str, torch.Tensor]]
    leaves: dict[str, torch.Tensor]
    module: torch.nn.Module | None = None
    truth: tuple | None = None
    optimizer: torch.optim.Optimizer | None = None

    def gradients(self, index):
        """Name -> gradient, after a backward pass on input set ``index``."""
        tensors = {**self.leaves, **{name: t for name, t in self.inputs[index].items() if t.requires_grad}}
        return {name: tensor.grad for name, tensor in tensors.items()}

    def clear(self):
        """Delete every gradient."""
        for tensor in self.all_leaves():
            tensor.grad = None

    def all_leaves(self):
        """Every tensor that may hold a gradient."""
        return [*self.leaves.values(), *(t for inputs in self.inputs for t in inputs.values() if t.requires_grad)]


@dataclass
class Subject:
    """Everything about a group except its providers.

    ``make_truth``: computes :attr:`truth` at its first use, since later visits need none; ``tolerance``: line of the
    tolerance table, ``None`` for a model; ``make``: source -> :class:`Implementation`; ``cost``: per image;
    ``gradient``: the upstream gradient, ``None`` for a model, whose step computes a loss from ``labels``.
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
        """Output and name -> gradient, in float64 on the CPU; gradients only in training."""
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

    def backward(self, out):
        """The backward pass of a training call, as a function of an output like ``out``."""
        if self.gradient is None:
            return lambda out: F.cross_entropy(out.float(), self.labels).backward()
        gradient = torch.empty_like(out.detach()).copy_(self.gradient)  # in the output's own layout
        return lambda out: out.backward(gradient)

    def check(self, out, gradients, implementation, noisy=False):
        """The relative errors of the output and of the worst gradient (``None`` without a backward pass).

        Raises ``AssertionError`` if they exceed the tolerances; ``noisy``: dropout is active.
        """
        expected, expected_gradients = implementation.truth or self.truth
        limits = MODEL_TOLERANCES[self.group.dtype] if self.tolerance is None else None
        if noisy:
            # batch norm computes another function in train mode, so the results only have to be finite
            normed = any(isinstance(each, _BatchNorm) for each in implementation.module.modules())
            limits = 2 * (torch.finfo(torch.float64).max,) if normed else NOISE
        error = self._within("output", out, expected, limits)
        found = [self._within(name, each, expected_gradients[name], limits) for name, each in gradients.items()]
        return error, max(found, default=None)

    def _within(self, name, value, expected, limits):
        """The relative error of the output or of a named gradient; both it and that of the worst row are checked."""
        whole, row = errors(value.cpu(), expected)
        if limits is not None:
            allowed, allowed_row = limits[name != "output"], float("inf")
        else:
            direction = "forward" if name == "output" else "backward"
            allowed = SLACK * tolerance(self.tolerance, direction, DTYPES[self.group.dtype])
            allowed_row = max(ROW_FACTOR * allowed, FLAT_ROW)
        if not (whole <= allowed and row <= allowed_row):
            said = f"{whole:.2e} (worst row {row:.2e}), allowed {allowed:.1e} (row {allowed_row:.1e})"
            raise AssertionError(f"{self.group.id}: {name} is wrong by {said}")
        return whole


def build(group, device):
    """The subject of a group, on a device."""
    torch.manual_seed(0)
    return (_operator if group.level == "op" else _network)(group, device)


def copies(tensors):
    """The number of places in memory between which such inputs rotate."""
    return COPIES if sum(t.numel() * t.element_size() for t in tensors) < UNCACHED else 1


def _operator(group, device):
    op = operators.build(group.subject, group.size, group.batch)
    dtype, training = DTYPES[group.dtype], group.mode == "training"
    activation = torch.float32 if op.image else dtype
    # parameters have values of the half type, so that errors do not include their rounding
    parameters = {name: t.to(dtype).float() for name, t in op.parameters.items()}
    moving = {name: t.to(activation) for name, t in op.moving.items()}
    wants = [name for name in parameters if name != "w"] + ([] if op.image else list(moving))
    one = op.sources["upstream"](**{name: t[:1] for name, t in op.moving.items()}, **op.parameters)
    shape = (group.batch, *one.shape[1:])
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def truth(function):
        """Output and gradients in float64, a few samples at a time, since samples are independent."""
        fixed = {name: t.to(device).double().requires_grad_(name in wants) for name, t in parameters.items()}
        outs, found = [], {name: [] for name in moving}
        for start in range(0, group.batch, CHUNK):
            chunk = slice(start, start + CHUNK)
            free = {n: t[chunk].to(device).double().requires_grad_(n in wants) for n, t in moving.items()}
            with torch.set_grad_enabled(training):
                out = function(**free, **fixed)
            if training:
                out.backward(gradient[chunk].double())
            outs.append(out.detach().cpu())
            for name, tensor in free.items():
                found[name].append(tensor.grad)
        gradients = {name: torch.cat(parts).cpu() for name, parts in found.items() if parts[0] is not None}
        gradients |= {name: t.grad.cpu() for name, t in fixed.items() if t.grad is not None}
        return torch.cat(outs), gradients

    def placed(tensors):
        return {n: t.to(device, copy=True).requires_grad_(training and n in wants) for n, t in tensors.items()}

    def make(source):
        known = OURS if source in BACKENDS else source  # the harness chooses the backend
        function = op.load(known, group.mode, device) if op.load else op.sources[known]
        leaves, own_truth = placed(parameters), truth(op.truths[source]) if source in op.truths else None
        used = wants if own_truth is None else own_truth[1]
        return Implementation(
            lambda **tensors: function(**tensors, **leaves),
            [placed(moving) for _ in range(copies(moving.values()))],
            {name: leaf for name, leaf in leaves.items() if name in used},
            truth=own_truth,
        )

    cost, make_truth = op.cost(_element_size(group.dtype)), lambda: truth(op.sources["upstream"])
    return Subject(group, device, make_truth, group.subject.partition("-")[0], make, cost, gradient)


def _element_size(dtype):
    return torch.empty(0, dtype=DTYPES[dtype]).element_size()


def _trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _network(group, device):
    """A T2T module or a whole model. All sources have the same weights, except those of other packages."""
    training, whole = group.mode == "training", group.level == "model"
    gradient = labels = None
    if whole:
        original = getattr(reference, group.subject)(img_size=group.size)
        cost = costs.t2t_vit(group.subject, group.size, _element_size(group.dtype))
        labels = torch.randint(1000, (group.batch,), device=device)
    else:
        original = reference.T2T_module(group.size, group.subject, embed_dim=MODULE_WIDTH).apply(init_weights)
        cost = costs.t2t_module(group.subject, group.size, MODULE_WIDTH, _element_size(group.dtype))
        gradient = torch.randn(group.batch, (group.size // 16) ** 2, MODULE_WIDTH).to(device, DTYPES[group.dtype])
    with torch.no_grad():
        for parameter in _trained(original).values():
            if parameter.ndim == 1:
                # biases of 0 and gains of 1, as upstream initialises them, would hide errors
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    images = natural_images(group.batch, 3, group.size, group.size)
    inputs = [{"x": images.to(device, copy=True)} for _ in range(copies([images]))]

    def truth(module):
        """Output and parameter gradients of a float64 copy in eval mode, one image at a time."""
        module, outs = deepcopy(module).to(device).double().eval(), []
        for index, image in enumerate(images.to(device).double().split(1)):
            with torch.set_grad_enabled(training):
                out = module(image)
            if training and whole:
                (F.cross_entropy(out, labels[index : index + 1]) / group.batch).backward()
            elif training:
                out.backward(gradient[index : index + 1].to(out))
            outs.append(out.detach().cpu())
        return torch.cat(outs), {name: p.grad.cpu() for name, p in _trained(module).items() if p.grad is not None}

    def make(source):
        foreign = source in packages.MODELS
        if foreign:
            torch.manual_seed(0)
            module = packages.MODELS[source].build(group.subject, group.size)
        else:
            module = deepcopy(original)
            if source != "upstream":
                t2t_fast.swap(module)
        module = module.to(device).eval()
        leaves = _trained(module) if training else {}
        return Implementation(
            (lambda x: module(x)) if foreign else module,  # other packages may name this argument differently
            inputs,
            leaves,
            module=module,
            truth=truth(module) if foreign else None,
            # with a learning rate of 0 the optimizer does all its work and the parameters stay as checked
            optimizer=torch.optim.AdamW(list(leaves.values()), lr=0.0) if training and whole else None,
        )

    line = None if whole else "t2t_module"
    return Subject(group, device, lambda: truth(original), line, make, cost, gradient, labels)
