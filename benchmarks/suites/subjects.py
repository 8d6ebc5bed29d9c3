"""The subject of a group, shared by its providers: inputs, upstream gradient, float64 result, implementations.

Inputs rotate: successive calls get the same values in different places in memory, so that no cache holds them.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import t2t_fast
from t2t_fast import reference
from t2t_fast.interop.swap import FAST
from t2t_fast.reference.layers import init_weights
from t2t_fast.reference.token_performer import at_least_float32
from t2t_fast.testing import DTYPES, ROW_FACTOR, errors, natural_images, tolerance

from . import costs, operators, packages, remote, runtimes
from .providers import BACKENDS, OURS

COPIES = 3  # places in memory between which the inputs rotate
UNCACHED = 2**28  # bytes; inputs of this size exceed every cache and need not rotate
# Factor on the tolerance table, whose cases are small and whose limits apply to this package only. Here sums have a
# hundred times as many tokens, some windows are flat, and upstream's half-precision gradients must pass too.
SLACK = 10
FLAT_ROW = 1e-3  # allowed error of the row of a flat window, where LayerNorm magnifies rounding up to 316 times
# (logits, worst parameter gradient) of a whole model; wide, because errors grow from block to block. On a CPU PyTorch
# sums the gradients of LayerNorm's bias over all tokens in bfloat16, where a sum stops growing: upstream's are too
# small by up to their own size. A gradient that is missing has an error of 1.
MODEL_TOLERANCES = {"fp32": (2e-5, 1e-3), "fp16": (2e-2, 2e-1), "bf16": (1e-1, 9e-1)}
# allowed effect of dropout on (output, gradients); upstream's is 0.05 and 0.4 for a T2T module's first images
NOISE = (0.2, 0.8)
MODULE_WIDTH = 384  # output width of the T2T modules, as in T2T-ViT-14


@dataclass
class Implementation:
    """One way to compute a subject.

    ``function``: takes the tensors of an input set; ``inputs``: the rotating sets; ``leaves``: name -> parameter with a
    gradient; ``module``: to switch between eval and train mode; ``truth``: float64 output and gradients, if they
    differ from the subject's; ``optimizer``: for a model's training step; ``unfused``: what ``swap`` left; ``worker``:
    the process that runs and times the calls, if it is not this one.
    """

    function: Callable
    inputs: list[dict[str, torch.Tensor]]
    leaves: dict[str, torch.Tensor]
    module: torch.nn.Module | None = None
    truth: tuple | None = None
    optimizer: torch.optim.Optimizer | None = None
    unfused: str | None = None
    worker: remote.Worker | None = None

    def gradients(self, index):
        """Name -> gradient, after a backward pass on input set ``index``."""
        return {name: t.grad for name, t in (self.leaves | self.inputs[index]).items() if t.requires_grad}

    def clear(self):
        """Delete every gradient."""
        for tensor in self.all_leaves():
            tensor.grad = None

    def all_leaves(self):
        """Every tensor that may hold a gradient."""
        return [*self.leaves.values(), *(t for inputs in self.inputs for t in inputs.values() if t.requires_grad)]


class Subject:
    """Everything about a group except its providers.

    ``cost``: per image; ``tolerance``: line of the tolerance table, ``None`` for a model; ``gradient``: the upstream
    gradient, ``None`` for a model, whose step computes a loss from ``labels``; ``original``: upstream's function or
    module. Subclasses define ``make``: source -> :class:`Implementation`, and ``truth_of``: the output and the
    gradients (name -> tensor, only in training) of a function or module, in float64 on the CPU. :meth:`close` ends the
    processes of its implementations and removes their files.
    """

    cost = tolerance = gradient = labels = original = None

    def __init__(self, group, device):
        self.group, self.device, self.dtype = group, device, DTYPES[group.dtype]
        self.training = group.mode == "training"
        self._resources = ExitStack()

    def close(self):
        """End the processes of its implementations and remove their files; nothing can be called afterwards."""
        self._resources.close()

    @cached_property
    def truth(self):
        """Upstream's :meth:`truth_of`, computed at its first use, since later visits need none."""
        return self.truth_of(self.original)

    @property
    def autocast(self):
        """The context of every forward pass: autocast for a half type."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, out):
        """The backward pass of a training call, as a function of an output like ``out``."""
        if self.gradient is None:
            return lambda out: F.cross_entropy(at_least_float32(out), self.labels).backward()
        gradient = torch.empty_like(out.detach()).copy_(self.gradient)  # in the output's own layout
        return lambda out: out.backward(gradient)

    def check(self, out, gradients, implementation, noisy=False):
        """The relative errors of the output and of the worst gradient (``None`` without a backward pass).

        Raises ``AssertionError`` if they exceed the tolerances; ``noisy``: dropout is active.
        """
        expected, expected_gradients = implementation.truth or self.truth
        forward, backward = self._limits(noisy, implementation.module)
        error = self._within("output", out, expected, *forward)
        found = [self._within(name, each, expected_gradients[name], *backward) for name, each in gradients.items()]
        return error, max(found, default=None)

    def _limits(self, noisy, module):
        """The allowed errors of the output and of each gradient: of the whole tensor, and of its worst row."""
        if noisy or self.tolerance is None:
            limits = NOISE if noisy else MODEL_TOLERANCES[self.group.dtype]
            if noisy and any(isinstance(each, _BatchNorm) for each in module.modules()):
                # batch norm computes another function in train mode, so the results only have to be finite
                limits = 2 * (torch.finfo(torch.float64).max,)
            return [(limit, float("inf")) for limit in limits]
        limits = [SLACK * tolerance(self.tolerance, direction, self.dtype) for direction in ("forward", "backward")]
        return [(limit, max(ROW_FACTOR * limit, FLAT_ROW)) for limit in limits]

    def _within(self, name, value, expected, allowed, allowed_row):
        """The relative error of the output or of a named gradient; that of the worst row is checked too."""
        whole, row = errors(value.cpu(), expected)
        if not (whole <= allowed and row <= allowed_row):
            said = f"{whole:.2e} (worst row {row:.2e}), allowed {allowed:.1e} (row {allowed_row:.1e})"
            raise AssertionError(f"{self.group.id}: {name} is wrong by {said}")
        return whole

    def _float64(self, function, inputs, leaves):
        """Output and name -> gradient of a float64 function.

        Samples are independent: they run one at a time, and again for the backward pass, which saves memory.
        """
        with torch.set_grad_enabled(self.training):
            samples = zip(*(t.split(1) for t in inputs.values()), strict=True)
            named = (dict(zip(inputs, sample, strict=True)) for sample in samples)
            out = torch.cat([checkpoint(function, use_reentrant=False, **sample) for sample in named])
        if self.training:
            self.backward(out)(out)
        gradients = {name: t.grad.cpu() for name, t in (inputs | leaves).items() if t.grad is not None}
        return out.detach().cpu(), gradients


def build(group, device):
    """The subject of a group, on a device."""
    torch.manual_seed(0)
    return (_Operator if group.level == "op" else _Network)(group, device)


def copies(tensors):
    """The number of places in memory between which such inputs rotate."""
    return COPIES if sum(t.nbytes for t in tensors) < UNCACHED else 1


class _Operator(Subject):
    """An operator of :mod:`operators`."""

    def __init__(self, group, device):
        super().__init__(group, device)
        op = self.operator = operators.build(group.subject, group.size, group.batch)
        self.original = op.sources["upstream"]
        self.tolerance, self.cost = group.subject.partition("-")[0], op.cost(self.dtype.itemsize)
        # parameters have values of the half type, so that errors do not include their rounding
        self.parameters = {name: t.to(self.dtype).float() for name, t in op.parameters.items()}
        self.moving = {n: t if op.image or n == op.stream else t.to(self.dtype) for n, t in op.moving.items()}
        self.wants = [name for name in self.parameters if name != "w"] + ([] if op.image else list(self.moving))
        one = self.original(**{name: t[:1] for name, t in op.moving.items()}, **op.parameters)
        gradient = torch.randn(group.batch, *one.shape[1:], generator=torch.Generator().manual_seed(1))
        self.gradient = gradient.to(device, self.dtype)

    def _placed(self, tensors, dtype=None):
        """Copies on the device, with gradients if wanted."""
        return {
            name: t.to(self.device, dtype, copy=True).requires_grad_(self.training and name in self.wants)
            for name, t in tensors.items()
        }

    def truth_of(self, function):
        parameters = self._placed(self.parameters, torch.float64)
        return self._float64(partial(function, **parameters), self._placed(self.moving, torch.float64), parameters)

    def make(self, source):
        op, known = self.operator, OURS if source in BACKENDS else source  # the harness chooses the backend
        function = op.load(known, self.group.mode, self.device) if op.load else op.sources[known]
        leaves = self._placed(self.parameters)
        truth = self.truth_of(op.truths[source]) if source in op.truths else None
        used = self.wants if truth is None else truth[1]
        return Implementation(
            lambda **tensors: function(**tensors, **leaves),
            [self._placed(self.moving) for _ in range(copies(self.moving.values()))],
            {name: leaf for name, leaf in leaves.items() if name in used},
            truth=truth,
        )


class _Network(Subject):
    """A T2T module or a whole model. All sources have the same weights, except those of other packages."""

    def __init__(self, group, device):
        super().__init__(group, device)
        name, size, element = group.subject, group.size, self.dtype.itemsize
        if group.level == "model":
            self.original = getattr(reference, name)(img_size=size)
            self.cost = costs.t2t_vit(name, size, element)
            self.labels = torch.randint(1000, (group.batch,), device=device)
        else:
            self.tolerance = "t2t_module"
            self.original = reference.T2T_module(size, name, embed_dim=MODULE_WIDTH).apply(init_weights)
            self.cost = costs.t2t_module(name, size, MODULE_WIDTH, element)
            self.gradient = torch.randn(group.batch, (size // 16) ** 2, MODULE_WIDTH).to(device, self.dtype)
        with torch.no_grad():
            for parameter in _trained(self.original).values():
                if parameter.ndim == 1:
                    # biases of 0 and gains of 1, as upstream initialises them, would hide errors
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        self.images = natural_images(group.batch, 3, size, size)
        self.inputs = [{"x": self.images.to(device, copy=True)} for _ in range(copies([self.images]))]

    def truth_of(self, module):
        module = deepcopy(module).to(self.device).double().eval()
        return self._float64(lambda x: module(x), {"x": self.images.to(self.device).double()}, _trained(module))

    @cached_property
    def graph(self):
        """The path of upstream's graph for these images, an ONNX file that :meth:`close` removes."""
        folder = self._resources.enter_context(TemporaryDirectory(prefix="t2t-fast-graph-"))
        return runtimes.export(deepcopy(self.original).eval(), self.images, Path(folder) / "graph.onnx")

    def _in_runtime(self, name):
        """Upstream's graph in another runtime, in a process of its own."""
        runtimes.require(name)
        arguments = self.graph, self.group.dtype, torch.get_num_threads()
        images, load = self.images.numpy(), runtimes.RUNTIMES[name].load
        worker = remote.Worker(name, load, arguments, images, len(self.inputs))
        self._resources.enter_context(closing(worker))
        return Implementation(lambda: torch.from_numpy(worker.output()), [{}], {}, worker=worker)

    def make(self, source):
        if source in runtimes.RUNTIMES:
            return self._in_runtime(source)
        torch.manual_seed(0)
        foreign = packages.MODELS.get(source)
        module = foreign.build(self.group.subject, self.group.size) if foreign else deepcopy(self.original)
        if not foreign and source != "upstream":
            t2t_fast.swap(module)
        module = module.to(self.device).eval()
        leaves = _trained(module) if self.training else {}
        return Implementation(
            (lambda x: module(x)) if foreign else module,  # other packages may name this argument differently
            self.inputs,
            leaves,
            module=module,
            truth=self.truth_of(module) if foreign else None,
            # with a learning rate of 0 the optimizer does all its work and the parameters stay as checked
            optimizer=torch.optim.AdamW(leaves.values(), lr=0.0) if leaves and self.gradient is None else None,
            unfused=None if foreign or source == "upstream" else _unfused(module),
        )


def _unfused(module):
    """The parameters' modules, or the model's own parameters, that no fast module reads; ``None`` if there are none."""
    fused = {id(each) for fast in module.modules() if isinstance(fast, FAST) for each in fast.modules()}
    left = [
        path or ", ".join(each._parameters)
        for path, each in module.named_modules()
        if id(each) not in fused and each._parameters
    ]
    return ", ".join(left) or None


def _trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
