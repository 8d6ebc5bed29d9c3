"""Deprecated names warn, name their replacement, and behave like it."""

import inspect

import pytest

from t2t_fast import T2TModule, functional
from t2t_fast._deprecated import deprecated_alias, renamed_arguments, warn_deprecated


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


def test_a_renamed_argument_is_passed_under_its_new_name():
    @renamed_arguments(memory=("recompute", lambda memory: memory == "low"))
    def layer(x, recompute=False):
        return x, recompute

    with pytest.warns(DeprecationWarning, match="the argument memory is deprecated.*use recompute instead") as caught:
        assert layer(1, memory="low") == (1, True)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="got both recompute and its old name memory"):
        layer(1, memory="low", recompute=True)


def test_the_old_names_of_the_package():
    with pytest.warns(DeprecationWarning, match=r"functional\.clear_weight_cache instead"):
        functional.refold()
    with pytest.warns(DeprecationWarning, match="use recompute instead"):
        module = T2TModule(32, embed_dim=24, token_dim=16, memory="low")
    assert module.recompute
    with pytest.warns(DeprecationWarning, match=r"use T2TModule\.recompute instead"):
        module.memory = "fast"
    with pytest.warns(DeprecationWarning, match=r"use TokenPerformer\.recompute instead"):
        assert module.attention1.memory == "fast" and not module.recompute
    wrong = "T2TModule: memory must be one of fast, low, got 'tiny'"
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match=wrong):
        module.memory = "tiny"
