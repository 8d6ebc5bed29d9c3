"""Check the providers of a group, then time them interleaved.

Inputs, upstream gradient and the float64 result are made before timing. Each provider is called once (compilation,
autotuning), checked against the float64 result (:func:`prepare`) and warmed up; none of this is in its times. Timing
runs in rounds: in each round every provider is timed once, and the order rotates, so that a drift of the machine's
speed affects all providers equally. Ratios are taken within a round; their median is reported, with the 20th and 80th
percentile.
"""

import gc
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import ceil

import torch

import t2t_fast
from t2t_fast import memory

from ..suites import operators, subjects
from ..suites.groups import ContextLost, LeftOut
from ..suites.providers import BACKENDS, BY_NAME, COMPILE_MODES
from ..suites.subjects import Implementation
from . import clocks

MIN_ROUNDS, MAX_ROUNDS = 7, 60
# minimum and maximum of rounds of other suites: a distribution needs more, a curve of slow points fewer
ROUNDS = {"latency": (30, 300), "scaling": (5, 60)}
WARM_UP_CALLS = 2
LONG = 2.0  # seconds; after a first call of this length one more warm-up call is enough
# OpenMP's threads wait actively for some milliseconds after a loop, which slows down another process: seconds of sleep
# between two looks, the share of a processor from which on they are at work, and the number of looks
QUIET, IDLE_SHARE, LOOKS = 0.01, 0.1, 50


@dataclass
class Participant:
    """A provider in a group: its timed call, times and further measurements."""

    name: str
    implementation: Implementation
    forward: Callable
    step: Callable
    calls: int = 1
    times: list[float] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


@contextmanager
def blaming(name, device):
    """Turn a failure that has ended the CUDA context into a :class:`ContextLost` of this provider."""
    try:
        yield
    except Exception as failure:
        if clocks.context_lost(device):
            raise ContextLost(name, failure) from failure
        raise


def settle():
    """Wait until the threads of this process sleep, so that they disturb no call in another process."""
    for _ in range(LOOKS):
        before = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - before < IDLE_SHARE * QUIET:
            return


def interleave(participants, clock, least, most=None, seconds=0.0, device="cpu", before=lambda: None):
    """Time all participants: one turn each in every round, the order rotating by one from round to round.

    After the ``least`` rounds there are more, up to ``most``, until the seconds have passed. ``before`` is called
    before every turn. A participant that raises has no further turn.

    Returns:
        name -> the exception, of each participant that raised one.
    """
    gc.collect()
    gc.disable()
    started, failures = time.perf_counter(), {}
    try:
        for index in range(most or least):
            if index >= least and time.perf_counter() - started >= seconds:
                break
            first = index % len(participants)
            for each in participants[first:] + participants[:first]:
                if each.name in failures:
                    continue
                before()
                found = _attempt(partial(clock.turn, each.step, each.implementation, each.calls), each.name, device)
                if isinstance(found, Exception):
                    failures[each.name] = found
                else:
                    each.times.append(found)
    finally:
        gc.enable()
    return failures


def _forward(subject, provider, implementation, device):
    """A function of an input set's index that computes the output."""
    function = implementation.function
    if provider.compiled:
        function = torch.compile(function, mode=COMPILE_MODES[device], dynamic=False)
    if provider.recompute:
        implementation.module.recompute = True
    if provider.captured:
        with subject.autocast:
            function = t2t_fast.cuda_graph(implementation.module, implementation.inputs[0]["x"])
    cudagraphs = provider.compiled and device == "cuda"
    backend = partial(t2t_fast.backend, provider.source) if provider.source in BACKENDS else nullcontext
    autocast = nullcontext() if provider.float32 else subject.autocast

    def forward(index):
        if cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(subject.training), autocast, backend():
            return function(**implementation.inputs[index])

    return forward


def _step(subject, implementation, forward, backward):
    """The timed call, without arguments; it takes the next input set each time.

    It returns the seconds if it is a call in another process, which measures them, and nothing otherwise.
    """
    if implementation.worker is not None:
        return implementation.worker.turn
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


def prepare(subject, provider, device, clock, thorough=True, check=True):
    """Build, check, compile and warm up one provider.

    Dropout prevents an exact comparison, so the training of a module or model is checked twice: exactly in eval mode,
    then in train mode, as it is timed, within dropout's noise. Unless ``thorough``, compiled code is checked only the
    second way, which saves one compilation. Without ``check`` nothing is compared.
    """
    needed = estimated_bytes(subject.group, provider)
    if needed and needed > 0.8 * (free := available_bytes(device)):
        raise LeftOut(f"needs about {needed / 1e9:.0f} GB, free are {free / 1e9:.0f}")
    implementation = subject.make(provider.source)
    forward = _forward(subject, provider, implementation, device)
    dropout = subject.training and implementation.module is not None
    errors, backward = (None, None), None

    def first_call(noisy):
        """Duration and errors of a first call."""
        nonlocal backward
        start = time.perf_counter()
        out = forward(0)
        if subject.training:
            backward = subject.backward(out)
            backward(out)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gradients = implementation.gradients(0) if subject.training else {}
        found = subject.check(out.detach(), gradients, implementation, noisy) if check else errors
        implementation.clear()
        return seconds, found

    if check and (thorough or not (dropout and provider.compiled)):
        first, errors = first_call(noisy=False)
    if dropout:
        implementation.module.train()
    if dropout or not check:
        first, _ = first_call(noisy=True)
    step = _step(subject, implementation, forward, backward)
    warm = [clock.once(step, implementation) for _ in range(1 if first > LONG else WARM_UP_CALLS)]
    calls = clock.calls(warm[-1])
    facts = {"error": errors[0], "gradient_error": errors[1], "first_call_s": first, "warm_up_s": sum(warm)}
    facts |= {"calls_per_round": calls, "unfused": implementation.unfused}
    return Participant(provider.name, implementation, forward, step, calls, [], facts)


def measure_memory(subject, provider, participant, device):
    """Saved and peak bytes of one call; ``None`` if they do not apply or cannot be measured."""
    implementation = participant.implementation
    if implementation.worker is not None:
        return {"saved_bytes": None, "peak_bytes": None}
    implementation.clear()
    saved = peak = None
    if subject.training:
        module = implementation.module
        parameters = list(implementation.leaves.values() if module is None else module.parameters())
        saved = memory.saved_bytes(lambda: participant.forward(0), parameters)
    # under CUDA graphs a call allocates nothing: its pool was filled when the graph was captured
    if not (provider.captured or (provider.compiled and device == "cuda")):
        implementation.clear()
        peak = memory.peak_bytes(participant.step, device)
    implementation.clear()
    return {"saved_bytes": saved, "peak_bytes": peak}


# Measured peak of upstream's T2T module (Performer) for an image of 224 px in float32
UPSTREAM_BYTES = {"inference": 9.4e6, "training": 23.2e6}


def estimated_bytes(group, provider):
    """Memory that the first stages of an unfused module or model need in a call; 0 if it is small."""
    if group.level == "op" or provider.source not in ("upstream", "vit-pytorch"):
        return 0
    if group.subject == "transformer" or "_t_" in group.subject or provider.source == "vit-pytorch":
        length = operators.length(1, group.size)
        # at the peak of forward and backward 3.2 times the attention weights are alive (counted from the eager graph)
        return 3.5 * 4 * length * length * group.batch
    return UPSTREAM_BYTES[group.mode] * (group.size / 224) ** 2 * group.batch


def available_bytes(device):
    """Bytes that can be allocated: on "cuda" the free ones, on "cpu" also those of the file cache."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil  # the only package of the extra "bench" that measurements on a CPU need

    return psutil.virtual_memory().available


def _attempt(call, name, device):
    """The result of a call, or the exception that it raised; the other providers of the group are still measured."""
    try:
        with blaming(name, device):
            return call()
    except ContextLost:
        raise
    except Exception as failure:  # noqa: BLE001 - becomes the row's reason
        foreign = BY_NAME[name].package and not isinstance(failure, LeftOut)
        return LeftOut(f"failed: {type(failure).__name__}: {failure}") if foreign else failure


def measure(group, names, device, budget, say, thorough=True, visits=1, rounds=None):
    """Measure some providers of a group.

    Args:
        budget: seconds for the interleaved rounds of all ``visits`` together; say: called with a line of progress;
            thorough: see :func:`prepare`; rounds: at a later visit the number of rounds of the first one; results are
            then not checked and memory is not measured again.

    Returns:
        name -> :class:`Participant`, or the exception that it raised.

    Raises:
        ContextLost: nothing else can be measured in this process.
    """
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    say("inputs and float64 truth" if rounds is None else "inputs")
    with closing(subjects.build(group, device)) as subject:
        return _measure(subject, names, budget, say, thorough, visits, rounds)


def _measure(subject, names, budget, say, thorough, visits, rounds):
    """:func:`measure` of a subject."""
    group, device, first, results = subject.group, subject.device, rounds is None, {}
    clock = clocks.clock(device, group.suite)
    if first:
        _ = subject.truth  # without it no row of the group can be measured
    for name in names:
        provider = BY_NAME[name]
        say(f"{provider.label}: {'check, ' if first else ''}{'compile, ' if provider.compiled else ''}warm up")
        call = partial(prepare, subject, provider, device, clock, thorough, check=first)
        results[name] = _attempt(call, name, device)
    timed = [result for result in results.values() if isinstance(result, Participant)]
    least, most = (ceil(limit / visits) for limit in ROUNDS.get(group.suite, (MIN_ROUNDS, MAX_ROUNDS)))
    if timed:
        say(f"{rounds or 'interleaved'} rounds of {len(timed)}")
        before = settle if any(each.implementation.worker for each in timed) else lambda: None
        results |= interleave(timed, clock, rounds or least, rounds or most, budget / visits, device, before)
    for each in [result for result in results.values() if isinstance(result, Participant)]:
        each.facts["cost"] = subject.cost
        if first:
            found = _attempt(partial(measure_memory, subject, BY_NAME[each.name], each, device), each.name, device)
            if isinstance(found, Exception):
                results[each.name] = found
            else:
                each.facts |= found
    return results
