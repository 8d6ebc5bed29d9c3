"""A measured row as plain data: what the JSON files hold and the report reads."""

from ..suites import context
from ..suites.providers import BASELINE, BY_NAME, backends
from .harness import FRONT_END, Participant
from .statistics import percentile, ratios, summary


def _saved_share(group, saved, cost):
    """The bytes that must be kept for backward over those that were, or ``None`` where that says nothing."""
    return group.batch * cost.saved / saved if saved and cost.saved else None


AGAINST_COST = ("copy_share", "gb_per_s", "tflop_per_s", "floor_s", "times_floor", "floor_share")


def _against_cost(group, seconds, cost, limits):
    """A row's time against what a fused implementation moves and computes, and against its floor here."""
    moved, computed = group.batch * cost.bytes(group.mode), group.batch * cost.flops(group.mode)
    floor = group.batch * cost.floor(group.mode, limits["bytes_per_s"], limits["flop_per_s"][group.dtype])
    median = seconds["median"]
    found = (moved / median / limits["bytes_per_s"], moved / median / 1e9, computed / median / 1e12)
    return dict(zip(AGAINST_COST, (*found, floor, median / floor, floor / median), strict=True))


FACTS = (
    "error",
    "gradient_error",
    "first_call_s",
    "warm_up_s",
    "calls_per_round",
    "saved_bytes",
    "peak_bytes",
)
"""What :func:`harness.measure` finds out besides the times, at a first visit only."""


def join(results, earlier):
    """Put the rounds of a group's earlier visits before those of ``results``; other facts are the first visit's.

    Args:
        results: of :func:`harness.measure`, changed in place; earlier: the rows so far, by provider; none at the first
            visit.
    """
    for name, before in earlier.items():
        participant = results[name]
        if isinstance(participant, Participant):
            participant.times[:0] = before["times"]
            participant.facts = {"cost": participant.facts["cost"], **{key: before[key] for key in FACTS}}
            if name == BASELINE and FRONT_END in results:
                results[FRONT_END].times[:0] = before["front_end_times"]


def _visits(participant, earlier):
    """How many of the rounds are of each visit, in their order."""
    before = [] if earlier is None else earlier["visits"]
    return [*before, len(participant.times) - sum(before)]


def row(group, name, results, limits, device, earlier=None):
    """The row of one provider of a measured group.

    Args:
        results: of :func:`harness.measure`, joined with what came before; limits: of :func:`machine.limits`; earlier:
            the provider's row after the visit before this one, if there was any.
    """
    participant, provider = results[name], BY_NAME[name]
    facts = dict(participant.facts)
    cost = facts.pop("cost")
    seconds = summary(participant.times)
    found = {
        "group": group.id,
        **group._asdict(),
        "provider": name,
        "label": provider.label,
        "another_function": provider.another,
        "backends": backends(device, group.dtype) if provider.source == "t2t_fast" else None,
        "seconds": seconds,
        "times": participant.times,
        "visits": _visits(participant, earlier),
        **facts,
        "images_per_s": group.batch / seconds["median"],
        "p95_s": percentile(participant.times, 0.95) if group.suite == "latency" else None,
        # a model of another package has other costs
        **(dict.fromkeys(AGAINST_COST) if name in context.MODELS else _against_cost(group, seconds, cost, limits)),
        "saved_share": _saved_share(group, facts["saved_bytes"], cost),
        "speedup": None,
        "front_end_times": None,
        "front_end_share": None,
        "amdahl_limit": None,
    }
    baseline, part = results.get(BASELINE), results.get(FRONT_END)
    if isinstance(baseline, Participant):
        found["speedup"] = ratios(baseline.times, participant.times)
        if part is not None:
            found["front_end_times"] = part.times if name == BASELINE else None
            share = ratios(part.times, baseline.times)["median"]
            found["front_end_share"] = share
            found["amdahl_limit"] = 1 / (1 - share) if share < 1 else None
    return found
