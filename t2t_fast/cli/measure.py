"""Time and memory of two forms of the same thing, measured so that both meet the same machine."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

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


def saved_bytes(module, x):
    """Bytes that a training forward keeps for backward, each storage once; parameters and input, which live on
    anyway, not counted."""
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers(), x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x)  # holds the graph, and so every storage, until all are counted
    total = sum(kept.values())
    del result
    return total


def step_peak_cuda(module, x):
    """Bytes that a training step allocates at most beyond what was allocated before it."""
    step = training_step(module, x)
    step()
    module.zero_grad(set_to_none=True)
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    step()
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


def step_peaks_cpu(cases):
    """Growth of the resident set at its peak in a training step, each case in a process of its own.

    Args:
        cases: name -> dict of :func:`step_memory.measure`'s arguments.

    Returns:
        name -> a dict of part -> bytes, or the reason in words why it could not be measured.
    """
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from t2t_fast.cli.step_memory import main; main(sys.argv[1])"
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(case)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, case in cases.items()
    }
    peaks = {}
    for name, process in processes.items():
        output, errors = process.communicate()
        if process.returncode == 0:
            peaks[name] = json.loads(output)
        else:
            lines = errors.strip().splitlines()
            peaks[name] = f"not measured: {lines[-1] if lines else f'exit code {process.returncode}'}"
    return peaks
