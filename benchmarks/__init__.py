"""Benchmarks against rivals, each in the same run (installed as `slicer.benchmarks`, started by `make bench`)."""
