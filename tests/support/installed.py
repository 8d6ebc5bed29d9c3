"""Check an installed package as its user sees it: ``python tests/support/installed.py native`` (or ``pure``).

It must run outside the sources, with the Python of the environment. The argument says what must be inside.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch

import t2t_fast
from t2t_fast import _extension, reference

SOURCES = Path(__file__).resolve().parents[2]


def main(kind):
    package = Path(t2t_fast.__file__).resolve().parent
    assert SOURCES not in package.parents, f"imported from the sources: {package}"
    assert (package / "py.typed").is_file()
    assert metadata.version("t2t_fast").partition("+")[0] == t2t_fast.__version__

    reasons = [_extension.load_error(), _extension.operators_error()]
    missing = [reason for reason in reasons if reason is not None]
    assert len(missing) == {"native": 0, "pure": 2}[kind], f"{kind}: {missing}"
    assert kind == "native" or not list(package.rglob("*.so"))

    torch.manual_seed(0)
    model, images = reference.t2t_vit_7().eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        report = t2t_fast.swap(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert len(report.swapped) > 0, report
    # on a processor without AVX2, `auto` selects aten
    if kind == "native" and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert "native" in str(t2t_fast.explain(model)), t2t_fast.explain(model)
    print(f"t2t_fast {metadata.version('t2t_fast')} in {package}: {kind}, swapped {len(report.swapped)} modules")


if __name__ == "__main__":
    main(*sys.argv[1:])
