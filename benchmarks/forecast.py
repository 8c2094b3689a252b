"""The error of a forecast: runs a command of slicer, and prints what it was expected to take beside what it took.

    python -m slicer.benchmarks.forecast convert qwen2.5-coder-0.5b --drop 4 --calibration text.jsonl -o out

The command is one with `--json` (convert or heal); it runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Row = tuple[str, float, float]  # what, forecast, took


def rows(forecast: Mapping[str, Any], took: Mapping[str, Any]) -> Iterator[Row]:
    """Seconds of each stage that was forecast and of the whole, then memory and disk in GB."""
    expected, real = forecast["seconds"], took["seconds"]
    for stage in expected:
        yield f"{stage}, s", expected[stage], real.get(stage, 0.0)
    yield "all stages, s", sum(expected.values()), sum(real.values())
    for name in ("host_bytes", "device_bytes"):
        if forecast[name]:
            yield f"{name.partition('_')[0]} memory, GB", forecast[name] / 1e9, took[name] / 1e9
    for place in took["disk"]:
        yield f"disk of {place}, GB", forecast["disk"].get(place, 0) / 1e9, took["disk"][place] / 1e9


def table(found: Iterator[Row]) -> str:
    """As markdown; the error is forecast / took."""
    lines = ["| | forecast | took | forecast / took |", "|---|---|---|---|"]
    for what, expected, real in found:
        lines.append(f"| {what} | {expected:.3g} | {real:.3g} | {f'{expected / real:.2f}' if real else '-'} |")
    return "\n".join(lines)


def main() -> None:
    command = [sys.executable, "-m", "slicer", *sys.argv[1:], "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found = json.loads(done.stdout)
    print(table(rows(found["forecast"], found["took"])))


if __name__ == "__main__":
    main()
