"""
Threads commit together: each gets its own outcome, nobody is left waiting, nothing is acknowledged too soon.

The threads of a test stand in line behind a turn that the test holds, so who commits with whom is no matter of luck.
Which of them leads then is: a test that interrupts the leader asks afterwards who it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from liteerresult import EncodeError, ResultStore, StoreBusy, StoreError, TransitionError, connection, groupcommit
from liteerresult.connection import Database, Refused
from tests.process.forks import fork, reap
from tests.support import DEADLINE, eventually, run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path
    from types import FrameType

FINISH = """
    UPDATE tasks SET status = 'DONE', done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND done_number IS NULL"""

UPDATE = "UPDATE tasks SET result = ? WHERE id = 'b'"

LONG = 5.0
"""How long, in seconds, a thread waits before it looks again in a test that shows that it need not."""

needs_fdatasync = pytest.mark.skipif(not connection._SYNC_AFTER_RELEASE, reason="SQLite itself syncs here")


def create(database: Database, *task_ids: str) -> None:
    database.transact(lambda raw: raw.executemany("INSERT INTO tasks (id) VALUES (?)", [(name,) for name in task_ids]))


def finish(database: Database, task_id: str) -> Callable[[], int]:
    return lambda: database.execute(FINISH, (task_id,), task_id)


def done(path: str) -> set[str]:
    """Return what another program finds finished."""
    with closing(sqlite3.connect(path)) as raw:
        return {task_id for (task_id,) in raw.execute("SELECT id FROM tasks WHERE status = 'DONE'")}


def transaction(database: Database, begun: threading.Event, go: threading.Event) -> None:
    """Hold the turn by a transaction, until *go*; it leaves its sync to others."""

    def operation(_: sqlite3.Connection) -> None:
        begun.set()
        assert go.wait(DEADLINE)

    database.transact(operation, durable=False)


def turn_alone(database: Database, begun: threading.Event, go: threading.Event) -> None:
    """Hold the turn without a transaction: other programs can write."""
    with database.queued():
        begun.set()
        assert go.wait(DEADLINE)


@contextlib.contextmanager
def in_line(
    database: Database, *writes: Callable[[], Any], hold: Callable[..., None] = transaction
) -> Iterator[list[Future[Any]]]:
    """Yield what becomes of *writes*, which stand in line in this order while the block runs, each in its thread."""
    connected = threading.Barrier(len(writes) + 1)
    calls = [threading.Event() for _ in writes]
    begun, go = threading.Event(), threading.Event()

    def run(write: Callable[[], Any], call: threading.Event) -> Any:
        database.connection()  # a new connection would wait for the turn
        connected.wait(DEADLINE)
        assert call.wait(DEADLINE)
        return write()

    with ThreadPoolExecutor(len(writes) + 1) as pool:
        futures = [pool.submit(run, write, call) for write, call in zip(writes, calls, strict=True)]
        connected.wait(DEADLINE)
        holder = pool.submit(hold, database, begun, go)
        try:
            assert begun.wait(DEADLINE)
            for call, future in zip(calls, futures, strict=True):
                length = len(database._line)
                call.set()
                eventually(
                    lambda length=length, future=future: len(database._line) > length or future.done(),
                    what=f"{length + 1} threads in line",
                )
            yield futures
        finally:
            go.set()
            for call in calls:
                call.set()
            holder.result(DEADLINE)
            for future in futures:
                future.exception(DEADLINE)


def is_at_rest(database: Database) -> bool:
    """Tell whether nobody stands in line or has the turn, here or by the lock, after one more write."""
    create(database, "one more")
    assert finish(database, "one more")() == 1
    if any(statement.waits for statement in database._line) or not database._turn.acquire(blocking=False):
        return False
    database._turn.release()
    with open(database.path + "-lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is taken
    return True


class Disk:
    """Knows what would survive the machine going down: what was there when a sync began that succeeded."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.syncs = 0
        self.lasting: set[str] = set()
        self._sync = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self.sync)

    def sync(self, fd: int) -> None:
        self.syncs += 1
        there = done(self.path)
        self._sync(fd)
        self.lasting |= there

    def lasts(self, write: Callable[[], int], task_id: str) -> Callable[[], tuple[int, bool]]:
        """Return a *write* that also tells whether the task lasted when it returned."""
        return lambda: (write(), task_id in self.lasting)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "results.db", "process-crash")) as opened:
        yield opened


@pytest.fixture
def synced(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "synced.db", "power-loss")) as opened:
        yield opened


@pytest.fixture
def disk(synced: Database, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(synced.path, monkeypatch)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a thread look soon whether its leader got lost: for tests that lose many."""
    monkeypatch.setattr(groupcommit, "LOOK_AGAIN", 0.002)


class TestTogether:
    @needs_fdatasync
    @pytest.mark.parametrize("count", [2, 8, 64])
    def test_one_transaction_and_one_sync(self, synced: Database, disk: Disk, count: int) -> None:
        names = [f"t{number}" for number in range(count)]
        create(synced, *names)
        seen: list[str] = []

        def write(name: str) -> tuple[int, bool]:
            synced.connection().set_trace_callback(seen.append)
            return disk.lasts(finish(synced, name), name)()

        with in_line(synced, *[lambda name=name: write(name) for name in names]) as futures:
            disk.syncs = 0
        assert [future.result() for future in futures] == [(1, True)] * count
        assert [seen.count(sql) for sql in ("BEGIN IMMEDIATE", "COMMIT")] == [1, 1]
        assert disk.syncs == 1
        assert done(synced.path) == set(names)
        assert is_at_rest(synced)

    def test_who_comes_by_while_nobody_waits_needs_no_transaction(self, database: Database) -> None:
        create(database, "a")
        seen: list[str] = []
        database.connection().set_trace_callback(seen.append)
        assert finish(database, "a")() == 1
        assert not any(sql.startswith("BEGIN") for sql in seen)

    def test_they_are_told_about_by_one_ring(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        create(database, "a", "b", "c")
        rung: list[list[str]] = []
        with in_line(database, *[finish(database, name) for name in ("a", "nothing", "b", "c")]):
            monkeypatch.setattr(database, "ring", lambda names: rung.append(sorted(names)))
            # That of the transaction they waited for does not ring.
        assert ["a", "b", "c"] in rung

    @pytest.mark.parametrize("hold", [transaction, turn_alone])
    def test_the_thread_that_waits_first_is_called(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, hold: Callable[..., None]
    ) -> None:
        """Else it would only look again after a while."""
        monkeypatch.setattr(groupcommit, "LOOK_AGAIN", LONG)
        create(database, "a", "b", "c")
        with in_line(database, *[finish(database, name) for name in "abc"], hold=hold) as futures:
            started = time.monotonic()
        assert [future.result() for future in futures] == [1, 1, 1]
        assert time.monotonic() - started < LONG / 2


class TestEachItsOwn:
    def test_a_transition_that_is_refused(self, store: ResultStore) -> None:
        store.mark_as_done("b", "first")

        def mark(name: str) -> Callable[[], None]:
            return lambda: store.mark_as_done(name, name)

        for name in "acd":
            store.create_task(task_id=name)
        with in_line(store._db, *[mark(name) for name in "abcd"]) as futures:
            pass
        errors = [future.exception() for future in futures]
        assert [type(error) for error in errors] == [type(None), TransitionError, type(None), type(None)]
        values = [meta.result for meta in store.get_many(["a", "b", "c", "d"])]
        assert values == ["a", "first", "c", "d"]

    def test_two_who_finish_one_task(self, store: ResultStore) -> None:
        store.create_task(task_id="a")
        with in_line(store._db, *[lambda n=n: store.mark_as_done("a", n) for n in range(5)]) as futures:
            pass
        errors = [future.exception() for future in futures]
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", *["TransitionError"] * 4]
        assert errors[store.get_task_meta("a").result] is None

    def test_a_statement_that_a_trigger_refuses(self, database: Database) -> None:
        create(database, "a", "b", "c")
        finish(database, "b")()
        refused = ("UPDATE tasks SET status = 'FAILURE' WHERE id = ?", ("b",), "b")
        with in_line(database, finish(database, "a"), lambda: database.execute(*refused), finish(database, "c")) as (
            first,
            second,
            third,
        ):
            pass
        assert (first.result(), third.result()) == (1, 1)
        error = second.exception()
        assert isinstance(error, Refused)
        assert isinstance(error.__cause__, sqlite3.IntegrityError)
        assert done(database.path) == {"a", "b", "c"}
        assert is_at_rest(database)

    @pytest.mark.parametrize(
        ("sql", "parameters", "kind"),
        [
            (UPDATE, ("x" * 20_000,), EncodeError),
            (UPDATE, ("\ud800",), UnicodeEncodeError),
            (UPDATE, (1 << 70,), OverflowError),
            (UPDATE, (object(),), StoreError),
            (UPDATE, (), StoreError),
            ("INSERT INTO tasks (id) VALUES (?)", ("",), StoreError),
            ("UPDATE absent SET x = ?", (1,), StoreError),
        ],
        ids=["too large", "no text", "too long a number", "no type of SQLite's", "too few", "constraint", "wrong SQL"],
    )
    def test_whatever_else_the_driver_says(
        self, database: Database, sql: str, parameters: tuple[Any, ...], kind: type[Exception]
    ) -> None:
        create(database, "a", "b", "c")
        writes = [finish(database, name) for name in "abc"]
        writes[1] = lambda: database.execute(sql, parameters, "b")
        with in_line(database, *writes) as futures:
            for raw in database._raw:  # whichever runs it
                raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        assert [type(future.exception()) for future in futures] == [type(None), kind, type(None)]
        assert done(database.path) == {"a", "c"}
        assert is_at_rest(database)


class TestNothingIsWritten:
    def test_another_program_holds_the_lock(self, database: Database) -> None:
        names = ["a", "b", "c"]
        create(database, *names)
        with closing(sqlite3.connect(database.path, isolation_level=None)) as other:
            with in_line(database, *[finish(database, name) for name in names], hold=turn_alone) as futures:
                for raw in database._raw:
                    raw.execute("PRAGMA busy_timeout = 50")
                other.execute("BEGIN IMMEDIATE")
            errors = [future.exception(DEADLINE) for future in futures]
            assert [type(error) for error in errors] == [StoreBusy] * 3
            assert all(error.waited >= 0.05 for error in errors if isinstance(error, StoreBusy))
            other.execute("ROLLBACK")
        assert done(database.path) == set()
        assert is_at_rest(database)

    def test_no_room_for_the_commit(self, database: Database) -> None:
        """The transaction is SQLite's own to end then."""
        resource = pytest.importorskip("resource")
        names = ["a", "b", "c"]
        create(database, *names)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with in_line(database, *[finish(database, name) for name in names], hold=turn_alone) as futures:
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(database.path + "-wal").st_size, limits[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        errors = [future.exception(DEADLINE) for future in futures]
        assert [type(error) for error in errors] == [StoreError] * 3
        assert all("nothing was written" in str(error) for error in errors)
        assert done(database.path) == set()
        assert is_at_rest(database)


class Interrupts:
    """A parameter whose conversion is interrupted the first time: somewhere between BEGIN and COMMIT."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.times = 0

    def __conform__(self, _: object) -> str:
        self.times += 1
        if self.times == 1:
            raise KeyboardInterrupt
        return self.value


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return *function* as it is when Ctrl-C comes before its first call."""
    first = [True]

    def interrupted(*args: Any) -> Any:
        if first:
            first.pop()
            raise KeyboardInterrupt
        return function(*args)

    return interrupted


def who(futures: list[Future[Any]], kind: type[BaseException]) -> list[int]:
    """Return the places of those who got an exception of this kind; the others got none."""
    errors = [future.exception(DEADLINE) for future in futures]
    assert all(error is None or isinstance(error, kind) for error in errors), errors
    return [number for number, error in enumerate(errors) if error is not None]


class TestInterruptedLeader:
    def test_before_the_commit(self, database: Database) -> None:
        """The others are given back to the line, and one of them leads."""
        names = ["a", "b", "c", "d"]
        create(database, *names)
        middle = Interrupts("c")
        writes = [finish(database, name) for name in names]
        writes[2] = lambda: database.execute(FINISH, (middle,), "c")
        with in_line(database, *writes) as futures:
            pass
        (leader,) = who(futures, KeyboardInterrupt)
        assert middle.times == (1 if leader == 2 else 2)
        assert {names[number] for number in range(4) if number != leader} <= done(database.path)

    def test_what_it_did_not_write_is_not_written_later(self, database: Database, brief: None) -> None:
        """Who was told of the interruption may have done something else meanwhile: created the task anew, say."""
        create(database, "a", "b")
        with in_line(database, lambda: database.execute(FINISH, (Interrupts("a"),), "a")) as futures:
            pass
        assert who(futures, KeyboardInterrupt) == [0]
        assert done(database.path) == set()
        assert is_at_rest(database)
        assert done(database.path) == {"one more"}

    @needs_fdatasync
    @pytest.mark.parametrize(("place", "name"), [(connection, "leave"), (os, "fdatasync")])
    def test_between_the_commit_and_the_sync(
        self, synced: Database, disk: Disk, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
    ) -> None:
        """The others see to the sync."""
        names = ["a", "b", "c", "d"]
        create(synced, *names)
        with in_line(synced, *[disk.lasts(finish(synced, task_id), task_id) for task_id in names]) as futures:
            monkeypatch.setattr(place, name, once(getattr(place, name)))
        (leader,) = who(futures, KeyboardInterrupt)
        assert [future.result() for future in futures if future is not futures[leader]] == [(1, True)] * 3
        assert done(synced.path) == set(names)
        assert is_at_rest(synced)

    @needs_fdatasync
    @pytest.mark.parametrize("interrupted", [False, True])
    def test_nobody_takes_an_older_sync_for_this_one(
        self, synced: Database, disk: Disk, brief: None, monkeypatch: pytest.MonkeyPatch, interrupted: bool
    ) -> None:
        """The leader stands still right after COMMIT: the others look, and must not find that all is synced."""
        names = ["a", "b", "c"]
        create(synced, *names)
        returned = threading.Semaphore(0)
        leave, decide, commit = groupcommit.leave, groupcommit.Batch.interrupted, groupcommit.Batch.commit

        def write(name: str) -> tuple[int, bool]:
            outcome = disk.lasts(finish(synced, name), name)()
            returned.release()
            return outcome

        def stand_still(*args: Any, **kwargs: Any) -> None:
            (decide if interrupted else leave)(*args, **kwargs)
            for _ in range(2):
                returned.acquire(timeout=DEADLINE)

        def commit_after_a_sync(batch: groupcommit.Batch, raw: sqlite3.Connection) -> None:
            synced._sync()
            commit(batch, raw)

        with in_line(synced, *[lambda name=name: write(name) for name in names]) as futures:
            monkeypatch.setattr(groupcommit.Batch, "commit", commit_after_a_sync)
            if interrupted:
                monkeypatch.setattr(connection, "leave", once(leave))
                monkeypatch.setattr(groupcommit.Batch, "interrupted", stand_still)
            else:
                monkeypatch.setattr(connection, "leave", stand_still)
        leaders = who(futures, KeyboardInterrupt)
        assert len(leaders) == interrupted
        assert [future.result() for future in futures if not future.exception()] == [(1, True)] * (3 - interrupted)

    @needs_fdatasync
    def test_who_is_left_by_it_is_woken(self, synced: Database, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else it would only look again after a while."""
        monkeypatch.setattr(groupcommit, "LOOK_AGAIN", LONG)
        create(synced, "a", "b", "c")
        with in_line(synced, *[disk.lasts(finish(synced, name), name) for name in "abc"]) as futures:
            monkeypatch.setattr(os, "fdatasync", once(disk.sync))
            started = time.monotonic()
        (leader,) = who(futures, KeyboardInterrupt)
        assert [future.result() for future in futures if future is not futures[leader]] == [(1, True)] * 2
        assert time.monotonic() - started < LONG / 2


class CtrlC:
    """
    A profile function that interrupts the nth time a call in the two modules begins or has ended: where CPython can.

    Attributes:
        place: Where it did, if it did.
    """

    FILES = (connection.__file__, groupcommit.__file__)

    def __init__(self, number: int) -> None:
        self.place: str | None = None
        self._left = number

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        caller = frame.f_back if event == "return" else frame
        if event == "c_call" or caller is None or caller.f_code.co_filename not in self.FILES:
            return
        self._left -= 1
        if self._left == 0:
            self.place = f"{event} in {caller.f_code.co_name}, line {caller.f_lineno}"
            raise KeyboardInterrupt

    def during(self, write: Callable[[], Any]) -> Any:
        sys.setprofile(self)
        try:
            return write()
        finally:
            sys.setprofile(None)


@needs_fdatasync
@pytest.mark.parametrize(
    ("count", "place"),
    [
        (1, 0),
        (3, 0),
        (3, 2),
    ],
)
def test_ctrl_c_anywhere(synced: Database, disk: Disk, brief: None, count: int, place: int) -> None:
    """
    The first in line mostly leads, the third is led: wherever one of them is interrupted, nobody else notices.

    What is in the store when all are back is what stays: nothing is written later.
    """
    for number in itertools.count(1):
        ctrl_c = CtrlC(number)
        names = [f"t{number}-{n}" for n in range(count)]
        create(synced, *names)
        writes: list[Callable[[], Any]] = [disk.lasts(finish(synced, name), name) for name in names]
        writes[place] = functools.partial(ctrl_c.during, writes[place])
        with in_line(synced, *writes) as futures:
            pass
        interrupted = [] if ctrl_c.place is None else [place]
        assert who(futures, KeyboardInterrupt) == interrupted, ctrl_c.place
        others = [future.result() for future in futures if not future.exception()]
        assert others == [(1, True)] * (count - len(interrupted)), ctrl_c.place
        assert not any(statement.waits for statement in synced._line), ctrl_c.place
        there = done(synced.path)
        create(synced, f"t{number}-after")
        finish(synced, f"t{number}-after")()
        assert done(synced.path) == there | {f"t{number}-after"}, ctrl_c.place
        assert not connection._inside, ctrl_c.place
        if not interrupted:
            break
    assert number > 20


class TestInterruptedFollower:
    def test_by_a_signal(self, database: Database) -> None:
        """It stands in line, in the main thread, and is not written: no other thread had begun."""
        create(database, "a", "b", "c")
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with in_line(database, finish(database, "a"), finish(database, "b")) as futures:

                def press() -> None:
                    eventually(lambda: len(database._line) == 3, what="the main thread in line")
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

                thread = threading.Thread(target=press)
                thread.start()
                with pytest.raises(KeyboardInterrupt):
                    finish(database, "c")()
                thread.join(DEADLINE)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert [future.result() for future in futures] == [1, 1]
        assert done(database.path) == {"a", "b"}
        assert is_at_rest(database)

    def test_when_it_was_to_lead(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        """The call that it got is lost with it: the others look again by themselves."""
        create(database, "a", "b", "c")
        park = groupcommit.Statement.park
        first = [True]

        def interrupted(statement: groupcommit.Statement) -> None:
            park(statement)
            if first:
                first.pop()
                raise KeyboardInterrupt

        monkeypatch.setattr(groupcommit.Statement, "park", interrupted)
        with in_line(database, *[finish(database, name) for name in "abc"]) as futures:
            # One looks, by the time limit or because it is called, and is interrupted.
            pass
        (gone,) = who(futures, KeyboardInterrupt)
        assert done(database.path) == set("abc") - {"abc"[gone]}
        assert is_at_rest(database)


@needs_fdatasync
class TestSync:
    @pytest.mark.parametrize("times", [1, 1000])
    def test_one_that_fails_reaches_everyone(
        self, synced: Database, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        """The system may report a lost write only once: a second sync that succeeds says nothing."""
        create(synced, "a", "b", "c")
        failures = [OSError(errno.EIO, "Input/output error")] * times
        sync = os.fdatasync

        def fail(fd: int) -> None:
            if failures:
                raise failures.pop()
            sync(fd)

        with in_line(synced, *[finish(synced, name) for name in "abc"]) as futures:
            monkeypatch.setattr(os, "fdatasync", fail)
        errors = [future.exception() for future in futures]
        assert [type(error) for error in errors] == [StoreError] * 3
        assert all("disk did not confirm" in str(error) for error in errors)
        with pytest.raises(StoreError, match="earlier commit"):
            finish(synced, "d")()

    def test_one_serves_all_who_committed_before_it(self, synced: Database, disk: Disk) -> None:
        """Also those who committed alone."""
        names = [f"t{number}" for number in range(4)]
        create(synced, *names)
        together = threading.Barrier(4)

        def write(name: str) -> tuple[int, bool]:
            together.wait(DEADLINE)
            return disk.lasts(finish(synced, name), name)()

        with ThreadPoolExecutor(4) as pool:
            with synced._sync_turn:
                disk.syncs = 0
                futures = [pool.submit(write, name) for name in names]
                eventually(lambda: done(synced.path) == set(names), what="four commits that wait for their sync")
            assert [future.result(DEADLINE) for future in futures] == [(1, True)] * 4
        assert disk.syncs <= 2  # the first may have begun before the last was counted

    def test_a_signal_handler_that_writes_meanwhile(self, tmp_path: Path) -> None:
        code = """
            import os, signal, sys
            from liteerresult import ResultStore

            signal.signal(signal.SIGUSR1, lambda *_: store.update_state("job", "PROGRESS", 1))
            sync = os.fdatasync
            def interrupted(fd):
                os.fdatasync = sync
                signal.raise_signal(signal.SIGUSR1)
                sync(fd)
            with ResultStore(sys.argv[1]) as store:
                store.create_task(task_id="a")
                os.fdatasync = interrupted
                store.mark_as_done("a", 1)
                print(store.get_task_meta("a").status, store.get_task_meta("job").status)
        """
        assert run_python(code, tmp_path / "results.db", timeout=10).split() == ["DONE", "PROGRESS"]

    def test_a_warning_about_the_wal_is_the_leader_s(
        self, synced: Database, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may be an error, as it is here: what the others wrote stands, and lasts."""
        create(synced, "a", "b", "c")
        monkeypatch.setattr(connection, "_WAL_CHECK_EVERY", 1)
        writes = [disk.lasts(finish(synced, name), name) for name in "abc"]
        with in_line(synced, *writes, hold=turn_alone) as futures:
            synced._warned_at = 0
        assert len(who(futures, RuntimeWarning)) == 1
        assert [future.result() for future in futures if not future.exception()] == [(1, True)] * 2
        assert disk.lasting >= {"a", "b", "c"}


class TestForkAndClose:
    def test_a_fork_waits_for_the_line(self, database: Database) -> None:
        """Its child has a line of its own, and the parent's goes on."""
        names = [f"t{number}" for number in range(6)]
        create(database, "child", *names)
        with ThreadPoolExecutor(1) as pool:
            with in_line(database, *[finish(database, name) for name in names]) as futures:
                forked = pool.submit(fork, finish(database, "child"))
                eventually(lambda: connection._gate.is_shut, what="the fork that waits")
                assert not forked.done()
            reap(forked.result(DEADLINE))
        assert [future.result() for future in futures] == [1] * 6
        assert done(database.path) == {"child", *names}
        assert is_at_rest(database)

    def test_close_waits_for_the_line(self, tmp_path: Path) -> None:
        database = Database(tmp_path / "results.db", "process-crash")
        create(database, "a", "b", "c")
        with ThreadPoolExecutor(1) as pool:
            with in_line(database, *[finish(database, name) for name in "abc"]) as futures:
                closed = pool.submit(database.close)
                eventually(lambda: connection._gate.is_shut, what="the close that waits")
                assert not closed.done()
            closed.result(DEADLINE)
        assert [future.result() for future in futures] == [1, 1, 1]
        assert done(database.path) == {"a", "b", "c"}
        with pytest.raises(StoreError, match="is closed"):
            finish(database, "a")()


class Model:
    """
    What one thread does, and knows to become of it: its own tasks are nobody else's.

    Attributes:
        tasks: Its tasks' values by id; ... is not finished.
        won: The values by which it finished tasks that all threads may finish.
    """

    SHARED = tuple(f"shared-{number}" for number in range(40))

    def __init__(self, store: ResultStore, number: int) -> None:
        self.tasks: dict[str, Any] = {}
        self.won: dict[str, Any] = {}
        self._store = store
        self._number = number

    def run(self, rounds: int) -> None:
        dice = random.Random(self._number)
        for step in range(rounds):
            name = f"t{self._number}-{dice.randrange(6)}"
            verb = dice.choice([self.create, self.finish, self.finish, self.progress, self.forget, self.finish_shared])
            verb(dice.choice(self.SHARED) if verb == self.finish_shared else name, step)

    def create(self, name: str, _: int) -> None:
        with self._refused_if(name in self.tasks):
            self._store.create_task(task_id=name)
            self.tasks[name] = ...

    def finish(self, name: str, step: int) -> None:
        with self._refused_if(self._is_final(name)):
            self._store.mark_as_done(name, step)
            self.tasks[name] = step

    def progress(self, name: str, step: int) -> None:
        with self._refused_if(self._is_final(name)):
            self._store.update_state(name, "PROGRESS", step)
            self.tasks[name] = ...

    def forget(self, name: str, _: int) -> None:
        self._store.forget(name)
        self.tasks.pop(name, None)

    def finish_shared(self, name: str, step: int) -> None:
        with contextlib.suppress(TransitionError):
            self._store.mark_as_done(name, [self._number, step])
            assert name not in self.won
            self.won[name] = [self._number, step]

    def _is_final(self, name: str) -> bool:
        return self.tasks.get(name, ...) is not ...

    @staticmethod
    def _refused_if(refused: bool) -> contextlib.AbstractContextManager[Any]:
        return pytest.raises(TransitionError) if refused else contextlib.nullcontext()


@pytest.mark.parametrize(("durability", "rounds"), [("process-crash", 400), ("power-loss", 200)])
def test_many_threads_against_a_dict(tmp_path: Path, durability: Any, rounds: int) -> None:
    """Through two store objects: everyone gets what is due to it, refusals included, and one wins each shared task."""
    path = tmp_path / "results.db"
    with (
        ResultStore(path, durability=durability) as one,
        ResultStore(path, durability=durability) as two,
        ThreadPoolExecutor(16) as pool,
    ):
        models = [Model((one, one, two)[number % 3], number) for number in range(16)]
        for future in [pool.submit(model.run, rounds) for model in models]:
            future.result(DEADLINE)
        found = {
            name: one.get_task_meta(name).result if status == "DONE" else ...
            for name, status in one._db.read("SELECT id, status FROM tasks")
        }
        expected: dict[str, Any] = {}
        for model in models:
            assert not model.won.keys() & expected.keys()
            expected |= model.tasks | model.won
        assert found == expected
        assert is_at_rest(one._db)
        one.forget("one more")
        assert is_at_rest(two._db)
