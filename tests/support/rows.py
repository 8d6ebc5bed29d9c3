"""Made-up rows of a benchmark run."""

from benchmarks.providers import PROVIDERS
from benchmarks.statistics import ratios, summary


def made_row(provider, times, *, group="module-performer-224px-b8-fp32-inference", saved=None, peak=8e6, **more):
    label = next(p.label for p in PROVIDERS if p.name == provider)
    row = {
        "group": group,
        "level": "module",
        "subject": "performer",
        "size": 224,
        "batch": 8,
        "dtype": "fp32",
        "mode": "inference",
        "provider": provider,
        "label": label,
        "another_function": False,
        "times": times,
        "seconds": summary(times),
        "speedup": ratios([0.1] * len(times), times),
        "images_per_s": 80.0,
        "gb_per_s": 1.0,
        "tflop_per_s": 0.05,
        "times_floor": 3.0,
        "saved_bytes": saved,
        "peak_bytes": peak,
        "first_call_s": 0.1,
        "error": 1e-6,
        "gradient_error": None,
        "front_end_share": None,
        "amdahl_limit": None,
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
        made_row("upstream", [0.1, 0.1, 0.1], **model, front_end_share=0.25, amdahl_limit=4 / 3),
        made_row("t2t_fast", [0.09, 0.09, 0.09], **model, front_end_share=0.25, amdahl_limit=4 / 3),
    ]
