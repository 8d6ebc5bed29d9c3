"""``python -m benchmarks host``: the host path runs with launches that do nothing."""

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.questions import host
from t2t_fast.ops._common import triton_runtime

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not triton_runtime.INTERPRETED, reason="not under TRITON_INTERPRET=1"),
]


def test_the_command_prints_both_passes(capsys):
    threads = torch.get_num_threads()
    try:
        assert command.main(["host", "--seconds", "0", "--subject", "performer module, narrow"]) == 0
    finally:
        torch.set_num_threads(threads)
    _, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [["performer module, narrow", each] for each in ("inference", "training")]
    assert all(float(cell) > 0 for row in cells for cell in row[2:] if cell)
    assert [row.index("") for row in cells if "" in row] == [4] and cells[1][4] == "", "programs of an inference only"


def test_launches_do_nothing_only_inside():
    from triton.runtime.interpreter import InterpretedFunction

    before = InterpretedFunction.run
    with host.stubbed():
        assert InterpretedFunction.run is not before
    assert InterpretedFunction.run is before
