"""Replacing upstream's modules by fast ones (:func:`swap`), undoing it (:func:`unswap`), and :func:`explain`.

``rules.py`` has one record for each kind of module, ``match.py`` applies them, ``proof.py`` proves each match on a
twin, ``template.py`` describes what a T2T module returns, ``classes.py`` makes the new classes, ``apply.py`` has the
public functions, ``explain.py`` and ``report.py`` the tables.
"""

from .apply import swap, swapped, unswap
from .explain import ModelExplanation, explain
from .proof import copied
from .report import Row, SwapReport
from .rules import FAST

__all__ = ["FAST", "ModelExplanation", "Row", "SwapReport", "copied", "explain", "swap", "swapped", "unswap"]
