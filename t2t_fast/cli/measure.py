"""Time and memory of two forms of the same thing, measured so that both meet the same machine."""

import statistics
import time
from dataclasses import dataclass

import torch

from ..memory import peak_bytes, saved_bytes

MIN_ROUNDS = 5
MAX_ROUNDS = 60


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of ``rounds`` runs, in milliseconds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples):
        """From samples in milliseconds."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), low, high, len(samples))


def timed(function, device):
    """Milliseconds of one call; on CUDA by events, so that the host's launches do not count twice."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def interleaved(contenders, device, seconds, tick=None):
    """Time several functions in turns, so that a drift of the machine meets all of them.

    Args:
        contenders: name -> function; each runs once before anything counts, on CUDA twice.
        seconds: how long to go on, within :data:`MIN_ROUNDS` and :data:`MAX_ROUNDS` rounds.
        tick: called with the number of finished rounds.

    Returns:
        name -> :class:`Timing`.
    """
    for _ in range(2 if device.type == "cuda" else 1):
        for function in contenders.values():
            timed(function, device)
    samples = {name: [] for name in contenders}
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds):
        order = list(contenders.items())
        for name, function in order if rounds % 2 else reversed(order):
            samples[name].append(timed(function, device))
        rounds += 1
        if tick is not None:
            tick(rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def inference(module, x):
    """Put ``module`` into eval mode; a function that runs it without autograd."""
    module.eval()

    def run():
        with torch.no_grad():
            module(x)

    return run


def training_step(module, x):
    """Put ``module`` into training mode (dropout on, as upstream trains); a function that makes an SGD step."""
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # The smallest of steps: the weights stay, for all that matters, what they were, and the work is that of any step.
    optimizer = torch.optim.SGD(trained, lr=1e-9)

    def run():
        optimizer.zero_grad(set_to_none=True)
        module(x).float().square().mean().backward()
        optimizer.step()

    return run


def kept_bytes(module, x):
    """Bytes that a training forward keeps for backward; parameters, buffers and input are not counted."""
    module.train()
    return saved_bytes(lambda: module(x), (*module.parameters(), *module.buffers(), x))


def step_peak(module, x):
    """Most bytes that a training step allocates at a time beyond what was there before it, its gradients included."""
    step = training_step(module, x)
    step()
    module.zero_grad(set_to_none=True)
    return peak_bytes(step, x.device.type)
