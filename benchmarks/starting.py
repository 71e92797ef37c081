"""Starting work: a batch of tasks, and the import itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import liteerresult
from liteerresult import ResultStore

from .harness import CONTEXT, Claim, Report, Settings, check, in_turn, keep_writeback_out, once, ratio

if TYPE_CHECKING:
    from collections.abc import Callable


def no_op(number: int) -> int:
    return number


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def batch(settings: Settings) -> Report:
    from liteerresult.runner import Runner

    size, rounds = settings.size(10_000, 300), settings.size(5, 1)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    works: dict[str, Callable[[int], list[float]]] = {}
    wanted = list(range(size))
    with settings.place() as folder, contextlib.ExitStack() as stack:

        def pool() -> ProcessPoolExecutor:
            executor = stack.enter_context(ProcessPoolExecutor(workers, mp_context=CONTEXT))
            list(executor.map(nap, [0.2] * workers))  # start all of them
            return executor

        def bare(executor: ProcessPoolExecutor, chunksize: int) -> Callable[[int], list[float]]:
            def work(_: int) -> list[float]:
                spent, values = once(lambda: list(executor.map(no_op, range(size), chunksize=chunksize)))
                check(values == wanted, "the executor lost values")
                return [spent / size]

            return work

        def ours(durability: Any) -> Callable[[int], list[float]]:
            store = stack.enter_context(ResultStore(folder / f"{durability}.db", durability=durability))
            runner = stack.enter_context(Runner(store, pool()))

            def work(number: int) -> list[float]:
                group_id = f"batch-{number}"
                spent, values = once(lambda: runner.map(no_op, range(size), group_id=group_id).join(timeout=600))
                check(values == wanted, "the runner lost values")
                group = store.restore_group(group_id)
                check(group is not None and group.completed_count() == size, "not every task is recorded")
                return [spent / size]

            return work

        works["Runner.map + join, power-loss"] = ours("power-loss")
        works["Runner.map + join, process-crash"] = ours("process-crash")
        works["bare ProcessPoolExecutor.map(chunksize=1)"] = bare(pool(), 1)
        works["bare ProcessPoolExecutor.map(chunksize=100) (floor)"] = bare(pool(), 100)
        for work in works.values():
            work(-1)  # each opens its files and imports once
        keep_writeback_out()
        arms = in_turn(works, rounds, "us a task")
    claims = [
        Claim.of(f"{durability}: Runner.map to the bare executor's, chunksize=1", ratio(arms[index], arms[2]), 1)
        for index, durability in enumerate(("power-loss", "process-crash"))
    ]
    return Report(f"a batch of {size:,} no-op tasks on {workers} processes", arms, claims)


# Import

BARE = "import sqlite3, concurrent.futures"
IMPORTS = {
    "import liteerresult": "import liteerresult",
    f"{BARE} (floor)": BARE,
    "the first, after the second": f"{BARE}; begin(); import liteerresult",
    "the same, our bytecode not kept": f"{BARE}; begin(); import liteerresult",
}
PROGRAM = """
import sys, time
def begin():
    global began, known
    began, known = time.perf_counter_ns(), set(sys.modules)
begin()
{statement}
print((time.perf_counter_ns() - began) / 1e6, *sorted(set(sys.modules) - known))
"""


def import_(settings: Settings) -> Report:
    rounds = settings.size(40, 2)
    loaded: dict[str, set[str]] = {}
    # Bytecode is kept as an installer leaves it, wherever this runs from and whatever the environment says of it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run(label: str, environment: dict[str, str]) -> list[float]:
        command = [sys.executable, "-c", PROGRAM.format(statement=IMPORTS[label])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        spent, *modules = done.stdout.split()
        check("liteerresult" in modules or label.startswith(BARE), "nothing was imported")
        loaded[label] = {name for name in modules if name in _HEAVY}
        return [float(spent)]

    with settings.place() as folder:
        ours = str(Path(liteerresult.__file__).parent).lstrip("/")
        environments = [{**kept, "PYTHONPYCACHEPREFIX": str(folder / label)} for label in ("kept", "not kept")]
        for environment in environments:
            run("import liteerresult", environment)  # compiles
        shutil.rmtree(folder / "not kept" / ours)
        environments[1]["PYTHONDONTWRITEBYTECODE"] = "1"
        works = {label: lambda _, label=label: run(label, environments["not kept" in label]) for label in IMPORTS}
        arms = in_turn(works, rounds, "ms")
    claims = [Claim(f"beyond {BARE}", arms[2].p50, 40, "ms")]
    notes = [
        f"difference of the medians of whole imports: {arms[0].p50 - arms[1].p50:.1f} ms",
        f"heavy modules loaded: {', '.join(sorted(loaded['import liteerresult'])) or 'none'}",
    ]
    return Report("import liteerresult", arms, claims, notes)


_HEAVY = frozenset({"asyncio", "click", "filelock", "inotify_simple", "multiprocessing", "rich", "sqlite_utils"})
