"""`python -m slicer` is `slicer`."""

from slicer.cli import main

if __name__ == "__main__":
    main()
