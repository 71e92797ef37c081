"""
Where the time goes: ladders from a bare statement up to the whole call, each rung with one mechanism more.

All rungs of a ladder are measured in turn in the same rounds, and what a rung adds is the median, over rounds, of what
it takes longer than the rung below. The medians leave out what few commits pay for: the checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from liteerresult import AsyncResult, ResultStore
from liteerresult.connection import CHECKPOINT_PAGES, WAL_LIMIT
from liteerresult.grouprows import _VALUES
from liteerresult.manyrows import execute_for_rows
from liteerresult.tasks import _FINISH, _FINISH_MANY, _READ

from .floors import BareTable, WalSync, frames_of
from .harness import (
    RESULT,
    RESULT_TEXT,
    Arm,
    Report,
    Settings,
    check,
    in_turn,
    keep_writeback_out,
    once,
    quantile,
    seed,
    show,
    task_id,
    timed,
)
from .timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Work = Callable[[int], Iterable[float]]
    Commit = tuple[str, Callable[[int], object]]  # the file, and what finishes the task of a number


class Ladder:
    """
    Rungs, each the one before with one mechanism more.

    Attributes:
        name: What all of them do.
        arms: What was measured, by label.
        notes: What each rung adds, and what else is worth knowing.
        remarks: What to say of a rung beside its time, by label.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.arms: dict[str, Arm] = {}
        self.notes: list[str] = []
        self.remarks: dict[str, str] = {}
        self._works: dict[str, Work] = {}
        self._beside: set[str] = set()

    def rung(self, label: str, work: Work, *, beside: bool = False) -> None:
        """Add a rung; or, *beside* the ladder, something to compare with that the next rung does not stand on."""
        self._works[label] = work
        if beside:
            self._beside.add(label)

    def climb(self, rounds: int) -> None:
        keep_writeback_out()
        self.arms = dict(zip(self._works, in_turn(self._works, rounds), strict=True))
        rungs = [label for label in self.arms if label not in self._beside]
        bottom, top = rungs[0], rungs[-1]
        self.notes.append(f"{bottom}: {show(self.arms[bottom].p50)} us{self.remarks.get(bottom, '')}")
        self.notes += map(self.added, rungs[1:], rungs)
        self.notes.append(f"all of them: {show(self.arms[top].p50)} us")

    def added(self, label: str, below: str) -> str:
        """Write how much longer than *below* it takes: the median of the rounds' differences, and their quartiles."""
        pairs = zip(self.arms[label].blocks, self.arms[below].blocks, strict=True)
        gains = sorted(statistics.median(block) - statistics.median(base) for block, base in pairs)
        spread = f"{show(quantile(gains, 0.25))} - {show(quantile(gains, 0.75))}"
        return f"{label}: {show(statistics.median(gains))} us ({spread}){self.remarks.get(label, '')}"


def profile(settings: Settings) -> Report:
    ladders = [ladder(settings) for ladder in (finish, mark_many, get, join)]
    arms, notes = [], []
    for ladder in ladders:
        notes += [f"{ladder.name}: {note}" for note in ladder.notes]
        for label, arm in ladder.arms.items():
            arm.label = f"{ladder.name}: {label}"
            arms.append(arm)
    waking, about_waking = timeline(settings)
    what = "where each microsecond goes: every rung has one mechanism more than the one before"
    return Report(what, arms + waking, [], notes + about_waking)


# Finishing: the same tasks in files that have more and more of schema.sql

COUNTED = "+ counting trigger and its page"
WHOLE = "+ encoding, checks, clock: mark_as_done"
SYNCED = "+ sync: mark_as_done, power-loss"

_NUMBER_GIVEN = _FINISH.replace("(SELECT done_number FROM next_completion)", "?")


class Statements(NamedTuple):
    """What finishes the tasks of a file by SQL alone: ``rows[n]`` are the statement's parameters for task n."""

    path: str
    connection: sqlite3.Connection
    sql: str
    rows: Sequence[tuple[Any, ...]]

    def one(self, number: int) -> None:
        self.connection.execute(self.sql, self.rows[number])

    def many(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        if "VALUES" in self.sql:
            execute_for_rows(self.connection, self.sql, rows)
        else:
            self.connection.executemany(self.sql, rows)
        self.connection.execute("COMMIT")

    def as_many(self) -> Statements:
        """Return the same by the store's statement for many rows, if it is the store's."""
        if self.sql == BareTable.UPDATE:
            return self
        rows = [(number, *row[1:3], row[4], number) for number, row in enumerate(self.rows, 1)]
        return self._replace(sql=_FINISH_MANY, rows=rows)


def statements(folder: Path, total: int, stack: contextlib.ExitStack) -> dict[str, Statements]:
    """Return the rungs below the store: label to a file of *total* tasks and how to finish them."""
    alone, grouped = str(folder / "alone.db"), str(folder / "grouped.db")
    seed(alone, range(total))
    seed(grouped, range(total), groups={"all": range(total)})
    now, ids = time.time(), [task_id(number) for number in range(total)]
    short = [(RESULT_TEXT, task) for task in ids]
    wide = [("DONE", RESULT_TEXT, "json", None, now, task, None) for task in ids]
    numbered = [(*row[:5], number, *row[5:]) for number, row in enumerate(wide, 1)]
    check(len(numbered[0]) == _NUMBER_GIVEN.count("?"), "the store's statement has changed: see to this benchmark")
    bare = stack.enter_context(BareTable(str(folder / "bare.db"), range(total)))

    def made_from(source: str, name: str, *without: str) -> tuple[str, sqlite3.Connection]:
        path = str(folder / f"{name}.db")
        shutil.copy(source, path)  # closed, and its log is empty
        _strip(path, without)
        return path, stack.enter_context(contextlib.closing(_connect(path)))

    row, index = made_from(alone, "row", "trigger", "index"), made_from(alone, "index", "trigger")
    return {
        "bare UPDATE by id": Statements(str(folder / "bare.db"), bare.connection, BareTable.UPDATE, short),
        "+ the whole row, its checks": Statements(*row, _NUMBER_GIVEN, numbered),
        "+ completion index and number": Statements(*index, _FINISH, wide),
        "+ triggers, in no group": Statements(*made_from(alone, "triggers"), _FINISH, wide),
        COUNTED: Statements(*made_from(grouped, "group"), _FINISH, wide),
    }


def _strip(path: str, without: Sequence[str]) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if "trigger" in without:
            triggers = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
            check(len(triggers) > 0, "the file has no triggers")
            for (name,) in triggers:
                connection.execute(f"DROP TRIGGER {name}")
        if "index" in without:
            connection.execute("DROP INDEX tasks_by_completion")


def _connect(path: str) -> sqlite3.Connection:
    """Return a connection as the store's own are, with nothing around it."""
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def _check_file(path: str, done: int) -> None:
    """See that so many tasks of a file are DONE, all with the right value, and that its group has counted them."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute(
            "SELECT result, count(*) FROM tasks WHERE status = 'DONE' GROUP BY result"
        ).fetchall()
        check([(json.loads(value), count) for value, count in found] == [(RESULT, done)], f"{path}: {found}")
        if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'groups'").fetchone():
            counts = connection.execute("SELECT done FROM groups WHERE size > 0").fetchall()
            check(counts in ([], [(done,)]), f"{path}: its group counts {counts}, not {done}")


def finish(settings: Settings) -> Ladder:
    """One commit each."""
    rounds, block, spare = settings.size(40, 2), settings.size(250, 20), 20
    total = rounds * block + spare
    ladder = Ladder("finish")
    with settings.place() as folder, contextlib.ExitStack() as stack:
        rungs = statements(folder, total, stack)
        commits: dict[str, Commit] = {label: (rung.path, rung.one) for label, rung in rungs.items()}
        commits |= _through_the_store(folder, rungs[COUNTED].rows, stack)
        frames = 0.0
        for label, (path, commit) in commits.items():
            frames = frames_of(path, commit, range(total - spare, total))
            ladder.remarks[label] = f", {frames:.1f} WAL frames a commit"
            ladder.rung(label, _blocks(commit, block), beside=label == SYNCED)
        log = stack.enter_context(WalSync(str(folder / "log"), max(1, round(frames))))
        floor = f"bare WAL sync of {max(1, round(frames))} frames (floor)"
        ladder.rung(floor, lambda _: timed(log.commit, range(block)), beside=True)
        ladder.climb(rounds)
        for path, _ in commits.values():
            _check_file(path, total)
    ladder.notes.append(f"beside that, {ladder.added(SYNCED, WHOLE)}")
    ladder.notes.append(f"{floor}: {show(ladder.arms[floor].p50)} us")
    return ladder


def _through_the_store(folder: Path, rows: Sequence[tuple[Any, ...]], stack: contextlib.ExitStack) -> dict[str, Commit]:
    """Return the rungs from the writers' queue up; *rows* are the parameters of the store's statement."""
    ids = [row[5] for row in rows]

    def store(name: str, durability: Any = "process-crash") -> ResultStore:
        path = shutil.copy(folder / "grouped.db", folder / f"{name}.db")
        opened = stack.enter_context(ResultStore(path, durability=durability))
        for task in ids:
            opened._bell.ring((task,))  # the first ring of each opens a file
        return opened

    mute, ringing, whole, synced = store("mute"), store("ringing"), store("whole"), store("synced", "power-loss")
    mute._db.ring = lambda _: None
    return {
        "+ writers' queue": (mute.path, lambda number: mute._db.execute(_FINISH, rows[number], ids[number])),
        "+ bell, nobody waits": (ringing.path, lambda number: ringing._db.execute(_FINISH, rows[number], ids[number])),
        WHOLE: (whole.path, lambda number: whole.mark_as_done(ids[number], RESULT)),
        SYNCED: (synced.path, lambda number: synced.mark_as_done(ids[number], RESULT)),
    }


def _blocks(operation: Callable[[int], object], block: int) -> Work:
    return lambda number: timed(operation, range(number * block, (number + 1) * block))


def mark_many(settings: Settings) -> Ladder:
    """Many in one transaction, per task."""
    rounds, many = settings.size(60, 2), settings.size(1000, 100)
    total = rounds * many
    ladder = Ladder(f"{many:,} in one transaction, each")
    with settings.place() as folder, contextlib.ExitStack() as stack:
        rungs = {label: rung.as_many() for label, rung in statements(folder, total, stack).items()}
        for label, rung in rungs.items():
            ladder.rung(label, _many(rung.many, rung.rows, many))
        path = shutil.copy(folder / "grouped.db", folder / "whole.db")
        store = stack.enter_context(ResultStore(path, durability="process-crash"))
        items = [(task_id(number), RESULT) for number in range(total)]
        ladder.rung("+ all of mark_many_as_done", _many(store.mark_many_as_done, items, many, dict))
        ladder.climb(rounds)
        for path in [rung.path for rung in rungs.values()] + [store.path]:
            _check_file(path, total)
    return ladder


def _many(
    operation: Callable[[Any], object], rows: Sequence[Any], many: int, collect: Callable[[Any], Any] = list
) -> Work:
    def work(number: int) -> list[float]:
        batch = collect(rows[number * many : (number + 1) * many])
        return [once(lambda: operation(batch))[0] / many]

    return work


# Reading


def get(settings: Settings) -> Ladder:
    """A finished task that was read before."""
    rounds, block = settings.size(40, 2), settings.size(250, 20)
    ladder = Ladder("get")
    ids = [task_id(2 * number) for number in range(block)]
    with settings.place() as folder, contextlib.ExitStack() as stack:
        path = str(folder / "store.db")
        seed(path, range(2 * block), groups={"all": range(2 * block)}, finished=True)
        bare = stack.enter_context(BareTable(str(folder / "bare.db"), range(2 * block), finished=True)).connection
        raw = stack.enter_context(contextlib.closing(_connect(path)))
        store = stack.enter_context(ResultStore(path, durability="process-crash"))
        select = "SELECT result FROM tasks WHERE id = ?"
        works: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
            "bare SELECT by id": (lambda task: bare.execute(select, (task,)).fetchall(), _value_of),
            "+ the whole row": (lambda task: raw.execute(_READ, (task,)).fetchall(), _value_of),
            "+ the thread's connection: read()": (lambda task: store._db.read(_READ, (task,)), _value_of),
            "+ get_task_meta": (store.get_task_meta, lambda meta: meta.value()),
            "+ decoding: get()": (lambda task: AsyncResult(task, store).get(timeout=0), lambda value: value),
        }
        for label, (read, value_of) in works.items():
            check([value_of(read(task)) for task in ids] == [RESULT] * block, f"{label}: a wrong value")
            ladder.rung(label, lambda _, read=read: timed(lambda index: read(ids[index]), range(block)))  # type: ignore[misc]
        ladder.climb(rounds)
    return ladder


def _value_of(rows: list[tuple[Any, ...]]) -> Any:
    """Return the value of a row that is the result alone, or all that the store reads."""
    return json.loads(rows[0][0 if len(rows[0]) == 1 else 2])


def join(settings: Settings) -> Ladder:
    """All values of a stored group, per task."""
    size, rounds = settings.size(100_000, 2_000), settings.size(7, 2)
    ladder = Ladder(f"join of {size:,}, each")
    every = "SELECT result FROM tasks ORDER BY rowid"
    with settings.place() as folder:
        path = str(folder / "store.db")
        seed(path, range(size), groups={"all": range(size)})
        with (
            ResultStore(path, durability="process-crash") as store,
            BareTable(str(folder / "bare.db"), range(size), finished=True) as bare,
        ):
            for start in range(0, size, 10_000):
                store.mark_many_as_done({task_id(n): RESULT for n in range(start, min(size, start + 10_000))})
            decode = store._serializer.decode_many
            works: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
                "bare SELECT": (lambda: bare.connection.execute(every).fetchall(), _values),
                "+ members in order": (lambda: store._db.read(_VALUES, ("all",)), _values),
                "+ decode_many": (lambda: decode([row[:3] for row in store._db.read(_VALUES, ("all",))]), list),
                "+ all of restore_group().join()": (lambda: store.restore_group("all").join(), list),  # type: ignore[union-attr]
                "bare SELECT + json.loads (floor)": (lambda: _values(bare.connection.execute(every).fetchall()), list),
            }
            for label, (operation, values_of) in works.items():
                ladder.rung(label, _judged(operation, values_of, size), beside="floor" in label)
            ladder.climb(rounds)
    return ladder


def _values(rows: list[tuple[Any, ...]]) -> list[Any]:
    return [json.loads(row[0]) for row in rows]


def _judged(operation: Callable[[], Any], values_of: Callable[[Any], Any], size: int) -> Work:
    def work(_: int) -> list[float]:
        spent, found = once(operation)
        check(values_of(found) == [RESULT] * size, "the values came back changed")
        return [spent / size]

    return work
