"""Plots of a run: ``--plots DIR``, or ``python -m benchmarks.plots FILE.json DIR`` of one that was kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

OURS = ("liteerresult, process-crash", "liteerresult, power-loss")
COLOURS = {OURS[0]: "#0b6e4f", OURS[1]: "#08415c"}
FLOORS = ("pipe (floor)", "bare WAL sync (floor)")


def check_installed() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plots needs matplotlib: pip install 'liteerresult[bench]'")


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what *document* has the numbers for; return the files."""
    check_installed()
    import matplotlib as mpl

    mpl.use("svg")
    # The same numbers give the same file.
    mpl.rcParams.update({"svg.hashsalt": "liteerresult", "font.size": 9})
    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    benchmarks, files = document["benchmarks"], []
    waking = [benchmarks[name] for name in ("wake", "peers-wake") if name in benchmarks]
    if waking:
        files.append(_wake(waking, document, folder / "wake.svg"))
    if benchmarks.get("writers", {}).get("series"):
        files.append(_writers(benchmarks["writers"], document, folder / "writers.svg"))
    for path in files:
        print(f"drawn: {path}")
    return files


def _wake(reports: list[dict[str, Any]], document: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    arms: dict[str, list[float]] = {}
    for report in reports:
        for arm in report["arms"]:
            arms.setdefault(arm["label"], arm["percentiles"])
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for label, values in sorted(arms.items(), key=lambda item: item[1][len(item[1]) // 2]):
        shares = [100 * index / (len(values) - 1) for index in range(len(values))]
        style = "--" if label in FLOORS else "-"
        axes.plot(values, shares, style, label=label, color=COLOURS.get(label), linewidth=2.5 if label in OURS else 1.2)
    axes.set(xscale="log", xlabel="microseconds from store in one process to value in another")
    axes.set(ylabel="% of the waits ended", ylim=(0, 100))
    axes.grid(alpha=0.3, which="major")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set_title(f"Wake latency ({_where(document)})", fontsize=9)
    return _save(figure, path)


def _writers(report: dict[str, Any], document: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in report["series"].items():
        style = "-" if label in OURS else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label, color=COLOURS.get(label))
    counts = [point[0] for point in next(iter(report["series"].values()))]
    axes.set(xscale="log", yscale="log", xlabel="processes that write", ylabel="commits a second, one task each")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"Throughput ({_where(document)})", fontsize=9)
    return _save(figure, path)


def _where(document: dict[str, Any]) -> str:
    machine = document["machine"]
    quick = "; quick run: meaningless" if document["quick"] else ""
    return (
        f"{machine['cores']} cores, {machine['file_system']}, Python {machine['python']}, "
        f"SQLite {machine['sqlite']}, {machine['utc'][:10]}{quick}"
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
