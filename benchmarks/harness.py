"""What all benchmarks share: children, paired rounds, statistics, files, and the printed table."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from liteerresult import ResultStore, __version__
from liteerresult.filesystem import file_system_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from multiprocessing.connection import Connection

# Children come from a clean server process: they inherit no locks, threads or open stores, and start fast.
# The bare executors that we compare with get the same.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.harness"])

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})

RESULT = {"rows": 3, "image": "frame.png"}
"""What a finished task returned."""

RESULT_TEXT = '{"rows": 3, "image": "frame.png"}'


class WrongResultError(Exception):
    """What came back is not what was stored: this run proves nothing."""


def check(right: bool, what: str) -> None:
    """Fail the benchmark unless *right*."""
    if not right:
        raise WrongResultError(what)


@dataclass
class Settings:
    """How this run is made: *quick* checks results only, on small sizes."""

    quick: bool
    folder: Path
    _shared: dict[tuple[str, int], str] = field(default_factory=dict)

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """Yield an empty folder, removed at the end."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def half_finished(self, size: int) -> str:
        """Return the path of a store, made once a run: *size* tasks, every other one finished, in one group ``all``."""
        key = ("half", size)
        if key not in self._shared:
            path = str(self.folder / f"half-{size}.db")
            seed(path, range(size), groups={"all": range(size)}, finished=True)
            self._shared[key] = path
        return self._shared[key]


# Statistics


def quantile(values: list[float], share: float) -> float:
    """Return the value that *share* of the sorted *values* lie at or below."""
    return values[min(len(values) - 1, int(share * len(values)))]


@dataclass
class Arm:
    """One thing measured: samples in blocks, one block a round."""

    label: str
    unit: str = "us"
    blocks: list[list[float]] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return sorted(value for block in self.blocks for value in block)

    @property
    def p50(self) -> float:
        return statistics.median(self.samples)

    def summary(self) -> dict[str, Any]:
        values = self.samples
        return {
            "label": self.label,
            "unit": self.unit,
            "n": len(values),
            "p50": statistics.median(values),
            "p25": quantile(values, 0.25),
            "p75": quantile(values, 0.75),
            "p99": quantile(values, 0.99),
            "min": values[0],
            "max": values[-1],
            "block_p50": [statistics.median(block) for block in self.blocks],
            "percentiles": [quantile(values, step / 200) for step in range(200)] + [values[-1]],
        }


def constant(label: str, value: float, unit: str) -> Arm:
    """Return an arm of one number."""
    return Arm(label, unit, [[value]])


@dataclass
class Ratio:
    """Median of the ratios of each round, with their quartiles."""

    value: float
    low: float
    high: float


def ratio(one: Arm, other: Arm) -> Ratio:
    """Compare two arms round by round: what disturbed a round disturbed both."""
    pairs = zip(one.blocks, other.blocks, strict=True)
    ratios = sorted(statistics.median(block) / statistics.median(base) for block, base in pairs)
    return Ratio(statistics.median(ratios), quantile(ratios, 0.25), quantile(ratios, 0.75))


def in_turn(arms: Mapping[str, Callable[[int], Iterable[float]]], rounds: int, unit: str = "us") -> list[Arm]:
    """
    Run every arm once a round, each round beginning with the next one.

    Args:
        arms: Label to a function that gets the round's number and returns its samples.
        rounds: How many.
        unit: Of the samples.
    """
    measured = [Arm(label, unit) for label in arms]
    works = list(arms.values())
    for number in range(rounds):
        for turn in range(len(works)):
            index = (number + turn) % len(works)
            measured[index].blocks.append(list(works[index](number)))
    return measured


def timed(operation: Callable[[int], object], numbers: Iterable[int]) -> list[float]:
    """Return how long each ``operation(number)`` took, in microseconds."""
    clock = time.perf_counter_ns
    samples = []
    for number in numbers:
        start = clock()
        operation(number)
        samples.append((clock() - start) / 1000)
    return samples


def once(operation: Callable[[], object]) -> tuple[float, Any]:
    """Return how long ``operation()`` took, in microseconds, and what it returned."""
    start = time.perf_counter_ns()
    value = operation()
    return (time.perf_counter_ns() - start) / 1000, value


# Outcome


@dataclass
class Claim:
    """A goal: *value* at most (or at least) *limit*."""

    text: str
    value: float
    limit: float
    unit: str = "x"
    spread: Ratio | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @classmethod
    def of(cls, text: str, measured: Ratio, limit: float) -> Claim:
        return cls(text, measured.value, limit, "x", measured)

    def summary(self) -> dict[str, Any]:
        spread = None if self.spread is None else [self.spread.low, self.spread.high]
        return {
            "goal": self.text,
            "value": self.value,
            "at least" if self.at_least else "at most": self.limit,
            "unit": self.unit,
            "quartiles": spread,
            "met": self.met,
        }


@dataclass
class Report:
    """What one benchmark found."""

    work: str
    arms: list[Arm]
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Curves for the plots: label to points."""

    def summary(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "arms": [arm.summary() for arm in self.arms],
            "claims": [claim.summary() for claim in self.claims],
            "notes": self.notes,
            "series": self.series,
        }


def show(number: float) -> str:
    """Write a number with three digits that matter."""
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) < 100 else f"{number:.0f}"


def print_report(name: str, report: dict[str, Any], seconds: float, *, quick: bool) -> None:
    print(f"\n{name}: {report['work']}  ({seconds:.0f} s)")
    width = max(len(arm["label"]) for arm in report["arms"])
    print(f"  {'':{width}}  {'p50':>9} {'p25 - p75':>17} {'p99':>9} {'n':>8}")
    for arm in report["arms"]:
        middle = f"{show(arm['p25'])} - {show(arm['p75'])}"
        print(
            f"  {arm['label']:{width}}  {show(arm['p50']):>9} {middle:>17} {show(arm['p99']):>9} "
            f"{arm['n']:>8,} {arm['unit']}"
        )
    for claim in report["claims"]:
        bound = "at least" if "at least" in claim else "at most"
        spread = ""
        if claim["quartiles"]:
            spread = f" ({show(claim['quartiles'][0])} - {show(claim['quartiles'][1])})"
        verdict = "quick" if quick else "met" if claim["met"] else "MISSED"
        print(
            f"  {verdict:6}  {claim['goal']}: {show(claim['value'])} {claim['unit']}{spread}, "
            f"goal {bound} {show(claim[bound])} {claim['unit']}"
        )
    for note in report["notes"]:
        print(f"  note: {note}")
    sys.stdout.flush()


def machine(folder: Path) -> dict[str, Any]:
    """Describe where this run was made."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = next(line for line in info.splitlines() if line.startswith("model name")).split(":")[1].strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": file_system_of(str(folder)),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "liteerresult": __version__,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def disk_folder(wanted: str | None) -> Path:
    """Return a folder for the files of this run, on a disk: a sync must cost what it costs."""
    for candidate in [wanted] if wanted else [tempfile.gettempdir(), "/var/tmp", "."]:
        if Path(candidate).is_dir() and file_system_of(candidate) not in MEMORY_FILE_SYSTEMS:
            return Path(tempfile.mkdtemp(prefix="liteerresult-bench-", dir=candidate)).resolve()
    msg = f"{wanted or tempfile.gettempdir()} is in memory; give --dir a folder on a disk"
    raise SystemExit(msg)


# Children


@dataclass
class _Failed:
    text: str


def _child(work: Callable[..., None], connection: Connection, args: tuple[Any, ...]) -> None:
    try:
        work(connection, *args)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass  # the benchmark has ended
    except BaseException:  # noqa: BLE001 - the parent raises it
        with contextlib.suppress(OSError):
            connection.send(_Failed(traceback.format_exc()))


class Child:
    """
    A process that runs ``work(connection, *args)``, reaped at the end of the ``with`` block.

    The work sends something once it is ready, then serves what it receives until that is None.
    """

    def __init__(self, work: Callable[..., None], *args: Any) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_child, args=(work, theirs, args), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, command: Any) -> None:
        self.connection.send(command)

    def receive(self, timeout: float = 120.0) -> Any:
        """Return what the child sends next; raise what it failed with."""
        if not self.connection.poll(timeout):
            msg = f"child {self.process.pid} said nothing for {timeout} s"
            raise WrongResultError(msg)
        try:
            answer = self.connection.recv()
        except EOFError:
            msg = f"child {self.process.pid} ended"
            raise WrongResultError(msg) from None
        if isinstance(answer, _Failed):
            msg = f"a child failed:\n{answer.text}"
            raise WrongResultError(msg)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


@contextlib.contextmanager
def crowd(size: int, work: Callable[..., None], *args: Any) -> Iterator[list[Child]]:
    """Start *size* children that get their number after *args*; yield them once all are ready."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(work, *args, number)) for number in range(size)]
        for child in children:
            child.receive()
        yield children
        for child in children:
            with contextlib.suppress(OSError):
                child.send(None)  # all at once, before each is waited for


# Files


def task_id(number: int) -> str:
    """Return the id of a task: as long as the store's own, and growing like them."""
    return f"0198c0de-{number >> 32:04x}-7000-8000-{number & 0xFFFFFFFF:012x}"


def seed(
    path: str,
    tasks: Iterable[int],
    *,
    groups: Mapping[str, Iterable[int]] | None = None,
    finished: bool = False,
) -> None:
    """
    Fill a store in plain SQL, past the measured code.

    Args:
        path: The store; made if it is not there.
        tasks: Numbers of tasks to create, as the store's `create_task` would.
        groups: Id to the numbers of its tasks.
        finished: Every other task is DONE.
    """
    ResultStore(path, durability="process-crash").close()
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -200000")
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            """INSERT INTO tasks (id, name, args, kwargs, status, result, encoding, done_at, done_number)
               VALUES (?, 'work', '[]', '{}', ?, ?, ?, ?, ?)""",
            _rows(tasks, finished),
        )
        for group, members in (groups or {}).items():
            connection.execute("INSERT INTO groups (id) VALUES (?)", (group,))
            connection.executemany(
                "INSERT INTO group_members (group_id, position, task_id) VALUES (?, ?, ?)",
                ((group, position, task_id(number)) for position, number in enumerate(members)),
            )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()


def _rows(tasks: Iterable[int], finished: bool) -> Iterator[tuple[Any, ...]]:
    now = time.time()
    for number in tasks:
        if finished and number % 2 == 0:
            yield task_id(number), "DONE", RESULT_TEXT, "json", now, number // 2 + 1
        else:
            yield task_id(number), "PENDING", None, None, None, None


def count_done(path: str) -> int:
    """Count what is DONE in a store, past the measured code."""
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM tasks WHERE status = 'DONE'").fetchone()[0])
    finally:
        connection.close()


def keep_writeback_out() -> None:
    """Have the system write what earlier work left in memory, so that it is not billed to the next."""
    os.sync()
