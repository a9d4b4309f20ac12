"""Draws the pictures of docs/ anew, with the library that is installed.

python scripts/draw_docs.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import plots  # noqa: E402 - it lies in examples/


def main():
    path = ROOT / "docs" / "ste_catalogue.png"
    with plots.plt.rc_context(plots.STYLE):
        plots.estimators(path, bits=2)
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
