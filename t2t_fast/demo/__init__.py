"""The report behind ``t2t-fast demo``: a photograph through a T2T-ViT before and after ``t2t_fast.swap``.

Needs the extra ``demo`` (jinja2, matplotlib, pillow); :mod:`t2t_fast.demo.run` makes the report.
"""
