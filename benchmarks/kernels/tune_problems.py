"""What the tuning of launch parameters measures: the operators that have a launch table, at T2T-ViT's sizes."""

from contextlib import contextmanager
from importlib import import_module
from unittest.mock import patch

import torch

import t2t_fast

from ..suites import subjects
from ..suites.groups import MODES, Group

STAGES = {
    "performer_attention": ("stage1",),
    "soft_split_linear": ("stage1", "stage2", "stage3"),
    "token_mlp": ("stage1",),
    "performer_layer": ("stage1", "stage2"),
}
"""The stages whose calls differ in more than their number of tokens, which no table asks for."""

DROPOUT = {op: {"proj_drop": 0.1, "mlp_drop": 0.1} for op in ("token_mlp", "performer_layer")}
"""As upstream trains; with it the kernels draw random numbers."""


def table(op):
    """An operator's launch table."""
    return import_module(f"t2t_fast.ops.{op}.launch").TABLE


@contextmanager
def asked(launch_table):
    """Inside, what is asked of a launch table is noted: pass -> (architecture, dtype, *sizes)."""
    found, chosen = {}, launch_table.chosen

    def note(name, *key):
        found[name] = key
        return chosen(name, *key)

    with patch.object(launch_table, "chosen", note):
        yield found


class Problem:
    """An operator at one stage: inputs in several places in memory, and what it must return.

    Args:
        op: its name; stage: such as "stage1"; size: pixels of the image's side; batch: images; dtype: a name such as
            "bf16" (half types run under autocast); device, backend: where and how it runs.
    """

    def __init__(self, op, stage, size, batch, dtype, device="cuda", backend="triton"):
        self.backend, self.name = backend, f"{op} {stage}, {dtype}, {size} px, batch {batch}"
        self._sides = []
        for mode in MODES:
            subject = subjects.build(Group("op", f"{op}-{stage}", size, batch, dtype, mode), device)
            self._sides.append((subject, subject.make("t2t_fast")))
        self._options = dict(DROPOUT.get(op, {}))
        if self._options:
            self._options["seed"] = torch.tensor(0, device=device)
        self._turn, self._graphs = 0, None

    def _forward(self, backward, index, options):
        subject, implementation = self._sides[backward]
        with t2t_fast.backend(self.backend), torch.set_grad_enabled(backward), subject.autocast:
            return implementation.function(**implementation.inputs[index], **options)

    def check(self, backward):
        """Raise unless the output, or it and the gradients, are right and what is timed runs; without dropout.

        Raises:
            AssertionError: they are not within what the suites allow; others: what a launch raises.
        """
        subject, implementation = self._sides[backward]
        out = self._forward(backward, 0, {})
        gradients = {}
        if backward:
            subject.backward(out)(out)
            gradients = implementation.gradients(0)
            implementation.clear()
        subject.check(out.detach(), gradients, implementation)
        self.call(backward)

    def call(self, backward):
        """What is timed: a forward pass without autograd, or a backward pass; the next copy each time."""
        subject, implementation = self._sides[backward]
        self._turn = (self._turn + 1) % len(implementation.inputs)
        if not backward:
            self._forward(False, self._turn, {})
            return
        if self._graphs is None:
            self._graphs = [self._forward(True, index, self._options) for index in range(len(implementation.inputs))]
        out, inputs = self._graphs[self._turn], implementation.inputs[self._turn]
        leaves = [*implementation.leaves.values(), *(t for t in inputs.values() if t.requires_grad)]
        torch.autograd.grad(out, leaves, subject.gradient.to(out.dtype), retain_graph=True)

    def passes(self, launch_table):
        """The passes of a table that the calls launch: name -> (whether in backward, architecture, dtype, *sizes)."""
        found = {}
        for backward in (True, False):
            self.call(backward)  # a first call tries the kernels out, with passes that this problem may not have
            with asked(launch_table) as keys:
                self.call(backward)
            found |= {name: (backward, *key) for name, key in keys.items()}
        return {name: found[name] for name in launch_table.passes if name in found}
