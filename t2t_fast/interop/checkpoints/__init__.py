"""Checkpoints: loading them completely or not at all, and converting them to other projects' names and file types.

``load.py`` and ``convert.py`` are the two entry points. ``files.py`` reads (``torch_files.py``, ``paddle_files.py`` on
``pickles.py``) and ``writers.py`` writes files. ``entries.py`` finds the state dict, ``projects.py`` has the projects'
names, ``names.py`` matches them, ``fit.py`` converts the values (``scale.py``: queries of another attention scale), and
``commit.py`` writes them into the model.
"""

from .convert import ConvertReport, convert_checkpoint
from .load import load_checkpoint, read_state_dict, unwrap
from .report import LoadReport

__all__ = ["ConvertReport", "LoadReport", "convert_checkpoint", "load_checkpoint", "read_state_dict", "unwrap"]
