"""``verify``: the fast path against the float64 reference on this machine, for every backend and dtype that runs here.

The package is not called ``verify``, because ``t2t_fast.verify`` is the function: importing a submodule of that name
would replace the function by the module.
"""

from .report import VerifyReport, VerifyRow
from .run import verify
from .subjects import MODEL

__all__ = ["MODEL", "VerifyReport", "VerifyRow", "verify"]
