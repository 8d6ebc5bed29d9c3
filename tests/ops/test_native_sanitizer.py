"""A short run of ``make sanitize``: the native operators under AddressSanitizer and UndefinedBehaviorSanitizer."""

import re
import shutil

import pytest

from support import native_sanitizer
from support.building import NO_OPERATORS, ROOT


def missing():
    """Why the sanitizers cannot run here, or ``None``."""
    if NO_OPERATORS is not None:
        return f"operators cannot be built: {NO_OPERATORS}"
    if shutil.which("g++") is None:
        return "g++ is not found"
    found = [native_sanitizer.runtime(name) for name in native_sanitizer.RUNTIMES]
    return None if all(found) else "g++ has no sanitizers"


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_short_run(tmp_path, capfd):
    """No report; with a buffer one element too short there is one, so the run can detect errors."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    status = native_sanitizer.check(cases=1100, root=tmp_path)
    printed = capfd.readouterr().out
    assert status == 0, printed
    assert "no report" in printed
    source = tmp_path / "csrc" / "cpu" / "split" / "soft_split.cpp"
    text, buffer = source.read_text(), "scratch.reserve(rows.kernel * slot_size"
    assert buffer in text
    source.write_text(text.replace(buffer, f"{buffer} - 1"))
    status = native_sanitizer.check(cases=220, root=tmp_path)
    printed = capfd.readouterr().out
    assert status != 0
    assert "heap-buffer-overflow" in printed
    assert re.search(r"FAILED with status \d+ in case \d+ \(soft_split\)", printed)
