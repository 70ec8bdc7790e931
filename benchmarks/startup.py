"""How long `keye` takes to say something that needs no model: median and fastest of several starts."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND_LINES = (
    ["--version"],
    ["--help"],
    ["ask", "--help"],
    ["nothing"],
    ["ask"],
    ["ask", "clip.mp4", "q", "--fps", "x"],
)


def measure(command: list[str], runs: int) -> list[float]:
    """Wall seconds of each run; the first one, which fills the file cache, is left out."""
    seconds = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    keye = str(Path(sys.executable).with_name("keye"))
    print(f"{'command':<34} median ms   fastest ms")
    print(f"{'(an empty Python)':<34} ", end="")
    _print(measure([sys.executable, "-c", "pass"], runs))
    for arguments in COMMAND_LINES:
        print(f"{' '.join(['keye', *arguments]):<34} ", end="")
        _print(measure([keye, *arguments], runs))


def _print(seconds: list[float]) -> None:
    print(f"{statistics.median(seconds) * 1000:9.0f} {min(seconds) * 1000:12.0f}")


if __name__ == "__main__":
    main()
