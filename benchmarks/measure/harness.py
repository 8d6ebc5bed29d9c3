"""Check, then time the providers of a group interleaved.

Everything is made before the clock runs: inputs, upstream gradient, truth in float64. Each provider is then called
once (compilation, autotuning), checked against the truth (:func:`prepare`) and warmed up, apart from its timings. The
timed part goes round by round: in each round every provider has one turn, and the order rotates. A machine whose
speed drifts thus slows down everyone alike, and a ratio is taken inside a round: it is the median of the rounds'
ratios, with its 20th and 80th percentile.

pytest-benchmark can only run one function after the other, so its rows replay the rounds' seconds through its own
``timer=`` option (:class:`Replay`): its JSON holds, row by row and in the order of the rounds, what was measured here.
"""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import ceil

import torch

import t2t_fast
from build_support.compiling import available_memory
from t2t_fast import memory

from ..suites import operators, subjects
from ..suites.groups import ContextLost, LeftOut
from ..suites.providers import BACKENDS, BASELINE, BY_NAME, compiled
from ..suites.subjects import Implementation
from . import clocks

FRONT_END = "front end"
MIN_ROUNDS, MAX_ROUNDS = 7, 60
ROUNDS = {"latency": (30, 300), "scaling": (5, 60)}
"""Least and most rounds where a suite wants others: a distribution, or a curve of which each point takes long."""

WARM_UP_CALLS = 2
LONG = 2.0
"""Seconds after which a first call has warmed up enough."""


@dataclass
class Participant:
    """A provider in a group: how to call it, and what is known about it."""

    name: str
    implementation: Implementation
    forward: Callable
    step: Callable
    calls: int = 1
    call_seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


def _lost(name, failure, device):
    """A :class:`ContextLost` if a provider's failure is one, else ``None``."""
    return ContextLost(name, failure) if clocks.context_lost(device) else None


def interleave(participants, clock, rounds, device="cpu"):
    """Time all participants: one turn each in every round, the order rotating by one from round to round."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(participants)
            for participant in participants[first:] + participants[:first]:
                participant.times.append(clock.turn(participant.step, participant.implementation, participant.calls))
    except Exception as failure:
        if (lost := _lost(participant.name, failure, device)) is not None:
            raise lost from failure
        raise
    finally:
        if enabled:
            gc.enable()


def rounds_for(seconds_per_round, budget, suite=None, visits=1):
    """Rounds of a visit. All visits together have what the budget allows, within the suite's least and most."""
    least, most = ROUNDS.get(suite, (MIN_ROUNDS, MAX_ROUNDS))
    rounds = max(least, min(most, int(budget / seconds_per_round))) if seconds_per_round > 0 else most
    return ceil(rounds / visits)


class Replay:
    """A ``timer=`` for pytest-benchmark that hands out measured durations: called twice a round, start and end."""

    def __init__(self):
        self._readings = iter(())

    def load(self, times):
        """Durations for the next ``len(times)`` rounds."""
        readings, now = [], 0.0
        for seconds in times:
            # starting at 0 each time keeps the difference exact
            readings += [now, now + seconds]
        self._readings = iter(readings)

    def __call__(self):
        return next(self._readings)


REPLAY = Replay()
"""The timer of every row's test."""


def _forward(subject, provider, implementation, device):
    """A function of an input set's index that computes the output."""
    function = compiled(implementation.function, device) if provider.compiled else implementation.function
    if provider.memory == "low":
        implementation.module.memory = "low"
    if provider.captured:
        with subject.autocast:
            function = t2t_fast.capture(implementation.module, implementation.inputs[0]["x"])
    cudagraphs = provider.compiled and device == "cuda"
    backend = partial(t2t_fast.backend, provider.source) if provider.source in BACKENDS else nullcontext

    def forward(index):
        if cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(subject.training), subject.autocast, backend():
            return function(**implementation.inputs[index])

    return forward


def _step(subject, implementation, forward, backward):
    """The timed call, without arguments; it takes the next input set each time."""
    turn = 0

    def step():
        nonlocal turn
        turn += 1
        out = forward(turn % len(implementation.inputs))
        if subject.training:
            backward(out)
            if implementation.optimizer is not None:
                implementation.optimizer.step()

    return step


def _first_call(subject, implementation, forward, device):
    """Output, gradients and seconds of a first call, and the backward function made for such outputs."""
    start = time.perf_counter()
    out = forward(0)
    backward = None
    if subject.training:
        backward = subject.backward(out, implementation)
        backward(out)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gradients = implementation.gradients(0) if subject.training else {}
    return out.detach(), gradients, seconds, backward


def prepare(subject, provider, device, clock, thorough=True, check=True):
    """Build, check, compile and warm up one provider; raises ``AssertionError`` where a check fails.

    With dropout active nothing can be compared exactly, so a module's or model's training is checked twice: in eval
    mode exactly, then in train mode, as it is timed, within dropout's noise. Not ``thorough``: compiled code only the
    second way, because for it the first means to compile once more. Without ``check`` nothing is compared.
    """
    implementation = subject.make(provider.source)
    forward = _forward(subject, provider, implementation, device)
    dropout = subject.training and implementation.module is not None
    error = gradient_error = backward = None
    if check and (thorough or not (dropout and provider.compiled)):
        out, gradients, first, backward = _first_call(subject, implementation, forward, device)
        error, gradient_error = subject.check(out, gradients, implementation)
        implementation.clear()
    if dropout or not check:
        if dropout:
            implementation.module.train()
        out, gradients, first, backward = _first_call(subject, implementation, forward, device)
        if check:
            subject.check(out, gradients, implementation, noisy=True)
        implementation.clear()
    del out, gradients
    step = _step(subject, implementation, forward, backward)
    warm = [clock.once(step, implementation) for _ in range(1 if first > LONG else WARM_UP_CALLS)]
    facts = {
        "error": error,
        "gradient_error": gradient_error,
        "first_call_s": first,
        "warm_up_s": sum(warm),
        "calls_per_round": clock.calls(warm[-1]),
    }
    return Participant(provider.name, implementation, forward, step, facts["calls_per_round"], warm[-1], facts=facts)


def front_end(subject, implementation, clock):
    """The part of upstream's model that the package replaces, timed along with the model for Amdahl's limit."""
    module = implementation.front_end
    part = Implementation(module, implementation.inputs, implementation.leaves, module=module)
    forward = _forward(subject, BY_NAME[BASELINE], part, subject.device)
    backward = None
    if subject.training:
        gradient = torch.randn_like(forward(0))

        def backward(out):
            out.backward(gradient)

    step = _step(subject, part, forward, backward)
    warm = [clock.once(step, part) for _ in range(1 + WARM_UP_CALLS)]
    return Participant(FRONT_END, part, forward, step, clock.calls(warm[-1]), warm[-1])


def measure_memory(subject, provider, participant, device):
    """Saved and peak bytes of one call; ``None`` where there is nothing or no honest number."""
    implementation = participant.implementation
    implementation.clear()
    saved = None
    if subject.training:
        parameters = list(implementation.leaves.values())
        if implementation.module is not None:
            parameters = list(implementation.module.parameters())
        saved = memory.saved_bytes(lambda: participant.forward(0), parameters)
    peak = None
    # under CUDA graphs a call allocates nothing: its pool was filled when the graph was captured
    if not (provider.captured or (provider.compiled and device == "cuda")):
        implementation.clear()
        peak = memory.peak_bytes(participant.step, device)
    implementation.clear()
    return {"saved_bytes": saved, "peak_bytes": peak}


UPSTREAM_BYTES = {"inference": 9.4e6, "training": 23.2e6}
"""Peak of upstream's T2T module (Performer) an image of 224 px in float32, measured."""


def estimated_bytes(group, provider):
    """Memory that a call of an unfused module or model takes in its first stages; 0 where it is no matter."""
    if group.level == "op" or provider.source not in ("upstream", "vit-pytorch"):
        return 0
    if group.subject == "transformer" or "_t_" in group.subject or provider.source == "vit-pytorch":
        length = operators.length(1, group.size)
        # 3.2 times the attention weights are alive at the peak of forward and backward (counted from the eager graph)
        return 3.5 * 4 * length * length * group.batch
    return UPSTREAM_BYTES[group.mode] * (group.size / 224) ** 2 * group.batch


def available_bytes(device):
    """Bytes that a device can still give: "cuda" those that are free, "cpu" also those that hold files."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return available_memory()


def measure(group, names, device, budget, say, thorough=True, visits=1, rounds=None):
    """Measure some providers of a group.

    Args:
        names: of the providers; budget: seconds for the interleaved rounds of all ``visits``, of which this is one;
            say: called with a line of progress; thorough: see :func:`prepare`; rounds: of the first visit, if this is a
            later one: it has as many, and what was checked and the memory that was measured then are not again.

    Returns:
        name -> :class:`Participant` (and :data:`FRONT_END` for a model), or the exception that its row must raise.

    Raises:
        ContextLost: a provider's call ended the CUDA context, so that nothing else can be measured in this process.
    """
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    clock = clocks.clock(device, group.suite)
    results, first = {}, rounds is None
    say("inputs and float64 truth" if first else "inputs")
    subject = subjects.build(group, device)
    if first:
        _ = subject.truth  # if it cannot be had, no row of the group can be measured
    for name in names:
        provider = BY_NAME[name]
        needed = estimated_bytes(group, provider)
        if needed > 0.8 * available_bytes(device):
            results[name] = LeftOut(f"needs about {needed / 1e9:.0f} GB, free are {available_bytes(device) / 1e9:.0f}")
            continue
        say(f"{provider.label}: {'check, ' if first else ''}{'compile, ' if provider.compiled else ''}warm up")
        try:
            results[name] = prepare(subject, provider, device, clock, thorough, check=first)
        except Exception as failure:  # raised again by this provider's row; its peers are still measured
            if (lost := _lost(name, failure, device)) is not None:
                raise lost from failure
            foreign = provider.package and not isinstance(failure, LeftOut)
            results[name] = LeftOut(f"failed: {type(failure).__name__}: {failure}") if foreign else failure
    timed = [result for result in results.values() if isinstance(result, Participant)]
    if group.level == "model" and isinstance(results.get(BASELINE), Participant):
        results[FRONT_END] = front_end(subject, results[BASELINE].implementation, clock)
        timed.append(results[FRONT_END])
    if first:
        seconds = sum(clock.turn_seconds(p.call_seconds, p.calls) for p in timed)
        rounds = rounds_for(seconds, budget, group.suite, visits)
    if timed:
        say(f"{rounds} interleaved rounds of {len(timed)}")
        interleave(timed, clock, rounds, device)
    for participant in timed:
        if participant.name == FRONT_END:
            continue
        participant.facts["cost"] = subject.cost
        if not first:
            continue
        try:
            participant.facts |= measure_memory(subject, BY_NAME[participant.name], participant, device)
        except Exception as failure:  # as above
            if (lost := _lost(participant.name, failure, device)) is not None:
                raise lost from failure
            results[participant.name] = failure
    return results
