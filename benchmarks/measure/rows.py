"""A measured row as plain data: what the JSON files hold and the report reads."""

from ..suites import packages
from ..suites.providers import BASELINE, BY_NAME, backends, named
from .statistics import ratios, summary


def _against_cost(group, median, cost, limits):
    """A row's time relative to a fused implementation's bytes and FLOPs, and to its floor on this machine."""
    moved, computed = group.batch * cost.bytes(group.mode), group.batch * cost.flops(group.mode)
    floor = group.batch * cost.floor(group.mode, limits["bytes_per_s"], limits["flop_per_s"][group.dtype])
    return {
        "copy_share": moved / median / limits["bytes_per_s"],
        "gb_per_s": moved / median / 1e9,
        "tflop_per_s": computed / median / 1e12,
        "floor_s": floor,
        "floor_share": floor / median,
    }


# Measurements of :func:`harness.measure` besides times, at a first visit only
FACTS = (
    *("error", "gradient_error", "first_call_s", "warm_up_s", "calls_per_round", "unfused", "saved_bytes"),
    "peak_bytes",
)


def rows(group, results, limits, device, earlier):
    """The rows of a measured group, provider -> row, with the rounds of all its visits so far.

    Args:
        results: of :func:`harness.measure`, without its failures; limits: of :func:`machine.limits`; earlier: the rows
            after the visit before this one, none at the first visit.
    """
    times = {name: earlier.get(name, {}).get("times", []) + each.times for name, each in results.items()}
    found = {}
    for name, participant in results.items():
        before = earlier.get(name, {"visits": [], **participant.facts})
        visits = [*before["visits"], len(participant.times)]
        facts = {key: before[key] for key in FACTS}
        found[name] = _row(group, name, times, visits, facts, participant.facts["cost"], limits, device)
    return found


def _row(group, name, times, visits, facts, cost, limits, device):
    """The row of a provider. Args: times: of all providers; visits: number of its rounds in each visit."""
    seconds, baseline, provider = summary(times[name]), times.get(BASELINE), BY_NAME[name]
    dtype = "fp32" if provider.float32 else group.dtype
    saved = facts["saved_bytes"]
    return {
        **named(group, name),
        "backends": backends(device, dtype) if provider.source == "t2t_fast" else None,
        "seconds": seconds,
        "times": times[name],
        "visits": visits,
        **facts,
        "images_per_s": group.batch / seconds["median"],
        "p95_s": summary(times[name], p95=0.95)["p95"] if group.suite == "latency" else None,
        # a model of another package has other costs
        **({} if name in packages.MODELS else _against_cost(group, seconds["median"], cost, limits)),
        # the bytes that must be kept for backward, over those that were kept
        "saved_share": group.batch * cost.saved / saved if saved and cost.saved else None,
        "speedup": None if baseline is None else ratios(baseline, times[name]),
    }
