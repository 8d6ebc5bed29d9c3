"""Deprecated names: they warn, name their successor, and do what it does."""

import inspect

import pytest

from t2t_fast._deprecated import deprecated_alias, warn_deprecated


def add(a, b=1):
    """Sum."""
    return a + b


def test_an_alias_warns_at_the_callers_line_and_calls_the_function():
    old = deprecated_alias("t2t_fast.plus", "t2t_fast.add", add)
    with pytest.warns(DeprecationWarning, match=r"t2t_fast\.plus is deprecated.*use t2t_fast\.add instead") as caught:
        assert old(2, b=3) == 5
    assert [warning.filename for warning in caught] == [__file__]
    assert old.__name__ == "plus"
    assert "t2t_fast.add" in old.__doc__
    assert inspect.signature(old) == inspect.signature(add)


def test_a_deprecated_option_warns_at_the_callers_line():
    def layer(memory=None):
        warn_deprecated("memory='low'", "recompute=True")

    with pytest.warns(DeprecationWarning, match="recompute=True") as caught:
        layer(memory="low")
    assert [warning.filename for warning in caught] == [__file__]
