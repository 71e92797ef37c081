"""Run the benchmarks: ``python -m benchmarks [NAME ...] [--quick] [--json FILE] [--peers] [--plots DIR]``."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

BENCHMARKS = {
    "wake": "waking:wake",
    "finish": "finishing:finish",
    "join": "collecting:join",
    "iterate": "collecting:iterate",
    "counts": "collecting:counts",
    "writers": "finishing:writers",
    "growth": "finishing:growth",
    "herd": "waking:herd",
    "idle": "waking:idle",
    "batch": "starting:batch",
    "import": "starting:import_",
    "profile": "profiling:profile",
}
"""Name, as in the table of the README, to module and function."""

PEERS = {"peers-wake": "peers:wake", "peers-finish": "peers:finish", "peers-writers": "peers:writers"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of liteerresult.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, if none is given: {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small: checks results, not times")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there")
    parser.add_argument("--peers", action="store_true", help=f"also {', '.join(PEERS)}: each peer that is installed")
    parser.add_argument("--plots", metavar="DIR", help="draw wake latency and throughput there (matplotlib)")
    parser.add_argument("--dir", metavar="DIR", help="where the files of the run lie: a folder on a disk")
    options = parser.parse_args()
    unknown = set(options.names) - BENCHMARKS.keys() - PEERS.keys()
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join([*BENCHMARKS, *PEERS])}")
    return options


def main() -> int:
    options = arguments()
    if options.plots:
        importlib.import_module("benchmarks.plots").check_installed()
    from . import harness

    names = options.names or list(BENCHMARKS)
    if options.peers:
        names += [name for name in PEERS if name not in names]
    settings = harness.Settings(options.quick, harness.disk_folder(options.dir))
    try:
        document = run(names, settings)
    finally:
        shutil.rmtree(settings.folder, ignore_errors=True)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plots:
        importlib.import_module("benchmarks.plots").draw(document, Path(options.plots))
    return 1 if document["failed"] else 0


def run(names: list[str], settings: Any) -> dict[str, Any]:
    """Run benchmarks one after the other; return all that they found. One that fails does not stop the others."""
    from . import harness

    document: dict[str, Any] = {"machine": harness.machine(settings.folder), "quick": settings.quick}
    document |= {"benchmarks": {}, "failed": []}
    print(*(f"{key}: {value}" for key, value in document["machine"].items()), sep="\n")
    if settings.quick:
        print("\nquick: results are checked; sizes are too small for the times to mean anything")
    started = time.monotonic()
    for name in names:
        module, _, function = ({**BENCHMARKS, **PEERS})[name].partition(":")
        began = time.monotonic()
        try:
            report = getattr(importlib.import_module(f"benchmarks.{module}"), function)(settings).summary()
        except Exception:  # noqa: BLE001 - the others are run, and the exit status tells
            document["failed"].append(name)
            print(f"\n{name}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        report["seconds"] = round(time.monotonic() - began, 1)
        document["benchmarks"][name] = report
        harness.print_report(name, report, report["seconds"], quick=settings.quick)
    claims = [claim for report in document["benchmarks"].values() for claim in report["claims"]]
    met = sum(claim["met"] for claim in claims)
    goals = "" if settings.quick else f"; goals met: {met} of {len(claims)}"
    print(f"\n{time.monotonic() - started:.0f} s{goals}", end="")
    print(f"; FAILED: {', '.join(document['failed'])}" if document["failed"] else "; every result was right")
    return document


if __name__ == "__main__":
    sys.exit(main())
