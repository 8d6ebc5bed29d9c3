"""``python -m benchmarks.questions.amp``: half precision, with small images."""

import json

from benchmarks.questions import amp


def test_the_command(monkeypatch, capsys):
    """Without a gain both modules are finite; the swapped one is at least as exact in the half types."""
    monkeypatch.setattr(amp, "SIZE", 32)
    rows = amp.measure("cpu", gains=(1.0,))
    assert [(row["dtype"], row["module"]) for row in rows] == [
        (dtype, module) for dtype in ("fp32", "bf16", "fp16") for module in ("upstream", "t2t_fast")
    ]
    assert all(row["finite"] for row in rows)
    by = {(row["dtype"], row["module"]): row["output_error"] for row in rows}
    assert by["fp32", "t2t_fast"] < 1e-5
    assert all(by[dtype, "t2t_fast"] < by[dtype, "upstream"] for dtype in ("bf16", "fp16"))
    lost = rows[0] | {"finite": False, "output_error": None, "gradient_error": None}
    monkeypatch.setattr(amp, "measure", lambda device: [lost, *rows[1:]])
    assert amp.main(["--device", "cpu"]) == 0
    assert "| 1.0 | fp32 | upstream | not finite | not finite |" in capsys.readouterr().out
    monkeypatch.setattr(amp, "measure", lambda device: [lost | {"module": "t2t_fast"}])
    assert amp.main(["--device", "cpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["output_error"] is None
