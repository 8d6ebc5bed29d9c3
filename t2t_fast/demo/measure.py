"""Time and memory of two forms of the same module, measured in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

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
    def of(cls, samples: list[float]) -> "Timing":
        """From at least two samples in milliseconds."""
        low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), low, high, len(samples))

    @property
    def scatter(self) -> float:
        """Distance of the percentiles relative to the median."""
        return (self.high - self.low) / self.median


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on CUDA measured with events."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    tick: Callable[[int], object] = lambda rounds: None,
) -> dict[str, Timing]:
    """Time several functions in turns, so that a drift of the machine's speed affects all of them alike.

    Args:
        contenders: name -> function; each has one warm-up call, on CUDA two.
        device: the device the functions run on.
        seconds: the duration, within :data:`MIN_ROUNDS` and :data:`MAX_ROUNDS` rounds.
        tick: called with the number of finished rounds.
    """
    for _ in range(2 if device.type == "cuda" else 1):
        for function in contenders.values():
            timed(function, device)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < seconds):
        order = list(contenders.items())
        for name, function in order if rounds % 2 else reversed(order):
            samples[name].append(timed(function, device))
        rounds += 1
        tick(rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def inference(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Put ``module`` into eval mode; returns a function that runs it without autograd."""
    module.eval()

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def training_step(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Put ``module`` into training mode (with dropout, as upstream); returns a function that makes an SGD step."""
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-9)  # so small that the weights practically stay the same

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(x).float().square().mean().backward()
        optimizer.step()

    return run


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a training forward saves for backward, without parameters, buffers and input."""
    module.train()
    return saved_bytes(lambda: module(x), (*module.parameters(), *module.buffers(), x))


def step_peak(module: nn.Module, x: torch.Tensor) -> int:
    """Most bytes that a training step allocates at a time, gradients included, beyond what was allocated before."""
    step = training_step(module, x)
    step()
    module.zero_grad(set_to_none=True)
    return peak_bytes(step, x.device.type)
