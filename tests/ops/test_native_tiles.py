"""The kernels for AMX on any CPU: the same source, with its tiles in memory."""

import shutil

import pytest

from support import native_tiles
from support.building import NO_OPERATORS, ROOT


@pytest.mark.slow
@pytest.mark.skipif(NO_OPERATORS is not None, reason=f"operators cannot be built: {NO_OPERATORS}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not found")
def test_every_case_of_every_layer(tmp_path):
    result = native_tiles.run(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 200
