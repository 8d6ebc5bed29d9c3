"""``python -m benchmarks.questions.amp``: half precision, with small images."""

import math

from benchmarks.questions import amp


def test_the_command(monkeypatch, capsys):
    """At gain 1 both modules are finite, and the swapped one is more exact in the half types."""
    monkeypatch.setattr(amp, "SIZE", 32)
    rows = amp.measure("cpu", gains=(1.0,))
    modules = [(dtype, module) for dtype in ("fp32", "bf16", "fp16") for module in ("upstream", "t2t_fast")]
    assert [row[1:3] for row in rows] == modules
    assert all(math.isfinite(error) for row in rows for error in row[3:])
    by = {row[1:3]: row[3] for row in rows}
    assert by["fp32", "t2t_fast"] < 1e-5
    assert all(by[dtype, "t2t_fast"] < by[dtype, "upstream"] for dtype in ("bf16", "fp16"))
    lost = (1.0, "fp32", "upstream", math.nan, math.nan)
    monkeypatch.setattr(amp, "measure", lambda device: [lost, *rows[1:]])
    assert amp.main(["--device", "cpu"]) == 0
    assert "| 1.0 | fp32 | upstream | nan | nan |" in capsys.readouterr().out
    monkeypatch.setattr(amp, "measure", lambda device: [(1.0, "fp32", "t2t_fast", math.nan, math.nan)])
    assert amp.main(["--device", "cpu"]) == 1
