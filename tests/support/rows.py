"""Made-up rows of a benchmark run."""

from benchmarks.measure.statistics import ratios, summary
from benchmarks.suites.groups import Group
from benchmarks.suites.providers import BY_NAME


def made_row(provider, times, *, group="module-performer-224px-b8-fp32-inference", saved=None, peak=8e6, **more):
    row = {
        "suite": {"op": "ops", "module": "module", "model": "models"}[more.get("level", "module")],
        "group": group,
        "level": "module",
        "subject": "performer",
        "size": 224,
        "batch": 8,
        "dtype": "fp32",
        "mode": "inference",
        "provider": provider,
        "label": BY_NAME[provider].label,
        "another_function": False,
        "times": times,
        "visits": [len(times)],
        "seconds": summary(times),
        "speedup": ratios([0.1] * len(times), times),
        "images_per_s": 80.0,
        "gb_per_s": 1.0,
        "tflop_per_s": 0.05,
        "floor_share": 1 / 3,
        "saved_bytes": saved,
        "peak_bytes": peak,
        "first_call_s": 0.1,
        "warm_up_s": 0.2,
        "calls_per_round": 1,
        "error": 1e-6,
        "gradient_error": None,
        "unfused": None,
    }
    return {**row, **more}


ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "device": "a processor, 2 threads",
    "t2t_fast": "0.1.0 (commit abc)",
    "torch": "2.11",
    "Python": "3.12",
    "compile_mode": "default",
    "limits": {"bytes_per_s": 2e10, "flop_per_s": {"fp32": 2e11}},
}


def made_run():
    training = "module-performer-224px-b8-fp32-training"
    model = dict(level="model", subject="t2t_vit_7", group="model-t2t_vit_7-224px-b8-fp32-inference")
    return [
        made_row("upstream", [0.1, 0.1, 0.1]),
        made_row("t2t_fast", [0.025, 0.025, 0.025]),
        made_row("t2t_fast-compiled", [0.2, 0.2, 0.2]),
        made_row("upstream", [0.1, 0.1, 0.1], group=training, mode="training", saved=160e6, gradient_error=1e-5),
        made_row("t2t_fast", [0.1, 0.1, 0.1], group=training, mode="training", saved=16e6, gradient_error=1e-5),
        made_row("upstream", [0.1, 0.1, 0.1], **model, unfused="norm, head"),
        made_row("t2t_fast", [0.09, 0.09, 0.09], **model, unfused="norm, head"),
    ]


SCALED = {"batch": (1, 4, 16, 64, 256, 1024), "size": (224, 384, 512, 768, 1024, 1536, 2048)}
"""Batch sizes at 224 px, and image sizes at batch 1."""

OPERATORS = ("soft_split-stage1", "soft_split_linear-stage1", "performer_attention-stage2", "token_mlp-stage1")


FLOPS = {"soft_split": 0.0, "soft_split_linear": 3e9, "performer_attention": 1e9, "token_mlp": 5e9}
"""FLOPs of a call of each operator; other operators have 2e9."""


def timed(provider, group, seconds, upstream=0.1, **more):
    """A row of a group: three rounds of about ``seconds``, while upstream's take ``upstream``."""
    times = [0.95 * seconds, seconds, 1.1 * seconds]
    floor = 0.1 * upstream
    flops = FLOPS.get(group.subject.partition("-")[0], 2e9) * upstream / 0.1
    found = {
        "suite": group.suite,
        "level": group.level,
        "subject": group.subject,
        "size": group.size,
        "batch": group.batch,
        "dtype": group.dtype,
        "mode": group.mode,
        "another_function": BY_NAME[provider].another,
        "backends": {"performer_layer": "native"} if provider.startswith("t2t_fast") else None,
        "images_per_s": group.batch / seconds,
        "gb_per_s": 3 * upstream / seconds,
        "tflop_per_s": flops / 1e12 / seconds,
        "copy_share": 0.02 / seconds,
        "saved_share": None,
        "floor_s": floor,
        "floor_share": floor / seconds,
        "saved_bytes": None if group.mode == "inference" else 4e8 * seconds,
        "peak_bytes": 8e8 * seconds,
        "p95_s": 1.2 * seconds if group.suite == "latency" else None,
    }
    row = {**made_row(provider, times, group=group.id), **found, **more}
    return {**row, "speedup": ratios([upstream] * 3, times)}


def _competition(group, upstream=0.1, **speeds):
    names = {"upstream": upstream, **{name.replace("__", "-"): seconds for name, seconds in speeds.items()}}
    return [timed(name, group, seconds, upstream) for name, seconds in names.items()]


def made_scaling():
    """Batch sizes and image sizes of the Performer's module; upstream has no row at the largest size."""
    found = []
    for mode in ("inference", "training"):
        cells = [(224, batch) for batch in SCALED["batch"]] + [(size, 1) for size in SCALED["size"][1:]]
        for size, batch in cells:
            group = Group("module", "performer", size, batch, "fp32", mode, suite="scaling")
            work = batch * (size / 224) ** 2
            upstream = 4e-3 * (1 + work) * (size / 224)
            found.append(timed("t2t_fast", group, 1e-3 * (1 + work), upstream))
            if size < SCALED["size"][-1]:
                found.append(timed("upstream", group, upstream, upstream))
    return found


def made_crossover():
    """Attention by length: t2t_fast is linear, softmax attention is quadratic, and both are equal at 1000 tokens."""
    found = []
    for length in (196, 784, 3136, 12544, 50176):
        for mode in ("inference", "training"):
            group = Group("op", f"performer_attention-L{length}", None, 2, "fp32", mode, suite="ops")
            found += _competition(group, 8e-6 * length, t2t_fast=1e-6 * length, sdpa=1e-9 * length**2)
    return found


def made_fits():
    """The largest batches of two models; upstream cannot train one image of the second."""
    found = []
    for subject, batches in (("t2t_vit_7", (37, 142)), ("t2t_vit_t_14", (0, 12))):
        for provider, batch in zip(("upstream", "t2t_fast"), batches, strict=True):
            found.append(
                {
                    "suite": "memory",
                    "group": f"memory-{subject}-224px-fp32-training",
                    "level": "model",
                    "subject": subject,
                    "size": 224,
                    "dtype": "fp32",
                    "mode": "training",
                    "provider": provider,
                    "label": BY_NAME[provider].label,
                    "another_function": False,
                    "batch": batch,
                    "limit_bytes": 2e9,
                    "used_bytes": 1.97e9 if batch else None,
                    "over_bytes": 2.02e9,
                }
            )
    return found


def made_processes():
    """One, two and four processes, with less than proportional throughput."""
    found = []
    for provider, seconds in (("upstream", 0.2), ("t2t_fast", 0.1)):
        for count in (1, 2, 4):
            times = [seconds * (1 + 0.1 * count)] * 3
            found.append(
                {
                    "suite": "processes",
                    "group": f"processes-t2t_vit_7-224px-b2-fp32-training-n{count}",
                    "level": "model",
                    "subject": "t2t_vit_7",
                    "size": 224,
                    "batch": 2,
                    "dtype": "fp32",
                    "mode": "training",
                    "provider": provider,
                    "label": BY_NAME[provider].label,
                    "another_function": False,
                    "processes": count,
                    "threads": 1,
                    "seconds": summary(times),
                    "times": times,
                    "images_per_s": 2 * count / times[0],
                }
            )
    return found


def made_of_everything():
    """The content of a run file with entries of every kind, including slower rows, gaps and unknown values."""
    found = []
    for subject in ("t2t_vit_14", "t2t_vit_7"):
        for suite, mode in (("models", "inference"), ("training", "training")):
            group = Group("model", subject, 224, 8, "fp32", mode, suite=suite)
            rows = _competition(group, upstream__compiled=0.09, t2t_fast=0.04, t2t_fast__compiled=0.12)
            found += [{**row, "unfused": "norm, head"} for row in rows]
    unknown = dict.fromkeys(("gb_per_s", "tflop_per_s", "copy_share", "floor_s", "floor_share"))
    found.append(
        timed("timm-resnet50", Group("model", "t2t_vit_14", 224, 8, "fp32", "inference", suite="models"), 0.05)
    )
    found[-1] |= {**unknown, "error": None}
    for mode in ("inference", "training"):
        group = Group("module", "performer", 224, 8, "fp32", mode, suite="module")
        found += _competition(group, upstream__compiled=0.08, aten=0.05, t2t_fast=0.02, t2t_fast__compiled=0.018)
        alone = Group("module", "transformer", 224, 8, "fp32", mode, suite="module")
        found.append({**timed("t2t_fast", alone, 0.3), "speedup": None})
        for operator in OPERATORS:
            found += _competition(Group("op", operator, 224, 8, "fp32", mode, suite="ops"), t2t_fast=0.03, aten=0.12)
    found += _competition(Group("model", "t2t_vit_7", 224, 1, "fp32", "inference", suite="latency"), t2t_fast=0.05)
    environment = {
        **ENVIRONMENT,
        "command": "python -m benchmarks --filter '<everything>'",
        "quick": False,
        "packages": {"torch": "2.11.0", "timm": None},
    }
    left_out = [
        {"group": "scaling-performer-2048px-b1-fp32-inference", "provider": "upstream", "reason": "needs 99 GB"}
    ]
    return {
        "environment": environment,
        "planned": 500,
        "rows": found + made_scaling() + made_crossover() + made_fits() + made_processes(),
        "left_out": left_out,
    }
