#!/usr/bin/env python
"""Teacher caches: what they cost and lose, how fast they are written and read, what students learn from them.

The parts, each also by itself with --part: `signal`, bytes and errors with the quickstart's teacher and held-out files;
`speed`, with a random teacher of more than 100M parameters and a vocabulary of 32,000; `training`, students trained
for 200 steps from the teacher itself and from caches.

    python tools/benchmarks/cache.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
from cache_signal import measure_signals
from cache_speed import measure_speed
from cache_training import measure_training

PARTS = {"signal": measure_signals, "speed": measure_speed, "training": measure_training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--dir", type=Path, help="folder for data, caches and runs (default: a temporary one)")
    arguments = parser.parse_args()
    print(measure.machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dir or Path(temporary)
        for name, part in PARTS.items():
            if arguments.part in (None, name):
                print(f"\n== {name}", flush=True)
                part(folder)


if __name__ == "__main__":
    main()
