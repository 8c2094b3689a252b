"""`python -m slicer` is `slicer`."""

from __future__ import annotations

from slicer.cli.main import main

if __name__ == "__main__":
    main()
