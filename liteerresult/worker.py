"""The worker's half of a batch: runs calls and records what became of each, in the process that ran them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from .errors import EncodeError
from .marks import Mark
from .serialization import encode_exception, format_traceback
from .states import DONE, FAILURE
from .tasks import Running, current_task

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from .store import ResultStore

__all__ = ["Call", "ChunkReport", "Home", "run_chunk", "this_host"]

FLUSH_EVERY = 0.002
"""Between two calls, what ended is recorded if the last record is this many seconds old."""

LOOK_AHEAD = 64
"""So many calls are looked at together, to see whether they may be made."""

_BEGIN = """
    UPDATE tasks SET status = 'STARTED', owner = ?, started_at = ?, result = NULL, encoding = NULL, traceback = NULL
    WHERE id = ? AND retries = ? AND status IN ('PENDING', 'RETRY')"""

_LOOK = """
    SELECT id, number, retries FROM tasks
    WHERE id IN (SELECT value FROM json_each(?)) AND status IN ('PENDING', 'RETRY')"""

_FINISH = """
    UPDATE tasks SET status = ?, result = ?, encoding = ?, traceback = ?, done_at = ?,
        done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND retries = ? AND done_number IS NULL"""

# Of a call that was over before its beginning was recorded.
_FINISH_AT_ONCE = """
    UPDATE tasks SET status = 'DONE', result = ?, encoding = ?, traceback = NULL,
        owner = iif(status IN ('PENDING', 'RETRY'), ?, owner), started_at = ?, done_at = ?,
        done_number = (SELECT done_number FROM next_completion)
    WHERE number = ? AND id = ? AND retries = ? AND done_number IS NULL"""

# An attempt that failed and is not the last goes back to the process that manages the batch.
_GIVE_BACK = """
    UPDATE tasks SET status = 'RETRY', result = ?, encoding = ?, traceback = ?, done_at = ?, owner = submitter
    WHERE id = ? AND retries = ? AND done_number IS NULL AND submitter IN (SELECT id FROM owners)"""


class Call(NamedTuple):
    """
    One call to make.

    Attributes:
        task_id: The task it is.
        attempt: The attempt's number; the worker records nothing for another.
        last: True if a failure is final.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    task_id: str
    attempt: int
    last: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ChunkReport(NamedTuple):
    """
    What the submitting process hears.

    Attributes:
        again: Positions of calls that failed and are to be tried again.
        seconds: How long the whole chunk took.
        skipped: Positions of calls that were not made, because the task is no longer at that attempt.
        outcomes: On another host, which can't reach the file: (True, value) or (False, exception) for each call.
    """

    again: list[int]
    seconds: float
    outcomes: list[tuple[bool, Any]] | None = None
    skipped: tuple[int, ...] = ()


class Home(NamedTuple):
    """
    Where the store is.

    Attributes:
        path: The database file.
        options: The store's options, to open it with.
        host: Identifies the running system: see `this_host`.
        pid: The submitter's process.
    """

    path: str
    options: tuple[Any, ...]
    host: str
    pid: int = 0


@cache
def this_host() -> str:
    """Identify the running system: file events and locks reach no further than its kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        import platform

        return platform.node()


def run_chunk(home: Home, function: Callable[..., Any], calls: list[Call]) -> ChunkReport:
    """Make *calls* one after the other, recording each."""
    started = time.perf_counter()
    if home.host != this_host() or not os.path.exists(home.path):
        outcomes = [_outcome(function, call) for call in calls]
        return ChunkReport([], time.perf_counter() - started, outcomes)
    again, skipped = [], []
    with _Recorder(_store_at(home), calls, notes=home.pid != os.getpid()) as recorder:
        for position, call in enumerate(calls):
            if not recorder.begin(call):
                skipped.append(position)
            elif recorder.run(function, call):
                again.append(position)
    return ChunkReport(again, time.perf_counter() - started, None, tuple(skipped))


_lent: weakref.WeakValueDictionary[tuple[int, Home], ResultStore] = weakref.WeakValueDictionary()


def lend(home: Home, store: ResultStore) -> None:
    """Let calls that threads of this process make use the submitter's store."""
    _lent[os.getpid(), home] = store


_stores: dict[tuple[Any, ...], ResultStore] = {}


def _store_at(home: Home) -> ResultStore:
    """Return the store, kept open from one chunk to the next."""
    from .store import open_store

    store = _lent.get((os.getpid(), home))
    if store is not None and not store.closed:
        return store
    store = _stores.get(home)
    if store is None or store.closed:
        store = _stores[home] = open_store(home.path, *home.options)
    return store


def _outcome(function: Callable[..., Any], call: Call) -> tuple[bool, Any]:
    try:
        return True, function(*call.args, **call.kwargs)
    except BaseException as exc:  # noqa: BLE001 - the submitting process records it
        return False, exc


class _Flusher:
    """A thread that records, for a call that takes long, that it has begun, and what ended before it."""

    def __init__(self) -> None:
        self._wanted = threading.Event()
        self._recorders: set[_Recorder] = set()
        threading.Thread(target=self._run, name="liteerresult-flusher", daemon=True).start()

    def add(self, recorder: _Recorder) -> None:
        """Look after a recorder from now on."""
        self._recorders.add(recorder)

    def remove(self, recorder: _Recorder) -> None:
        """Look after it no more."""
        self._recorders.discard(recorder)

    def later(self) -> None:
        """Look at all recorders in `FLUSH_EVERY` seconds."""
        if not self._wanted.is_set():
            self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(FLUSH_EVERY)
            self._wanted.clear()
            for recorder in tuple(self._recorders):  # one step: others add meanwhile
                with contextlib.suppress(Exception):  # the recorder meets it too, and can tell somebody
                    if not recorder.publish(late=True):
                        self._wanted.set()
            recorder = None  # type: ignore[assignment]  # else it would live until the next one


_flushers: list[_Flusher] = []
_guard = threading.Lock()


def _the_flusher() -> _Flusher:
    with _guard:
        if not _flushers:
            _flushers.append(_Flusher())
        return _flushers[0]


def _after_fork_in_child() -> None:
    global _guard  # noqa: PLW0603 - another thread of the parent may have held it
    _guard = threading.Lock()
    _flushers.clear()  # the parent's threads are not here


os.register_at_fork(after_in_child=_after_fork_in_child)


class _Statement(NamedTuple):
    sql: str
    row: tuple[Any, ...]


class _Ended(NamedTuple):
    """
    How a call ended.

    Attributes:
        task_id: The task.
        begin: What has to be recorded first: that it had begun.
        alternatives: Statements, of which the first that changes something counts.
    """

    task_id: str
    begin: _Statement | None
    alternatives: tuple[_Statement, ...]

    def record(self, connection: sqlite3.Connection) -> None:
        if self.begin is not None:
            connection.execute(*self.begin)
        for sql, row in self.alternatives:
            if connection.execute(sql, row).rowcount:
                return


class _Making(NamedTuple):
    """A call that is being made."""

    call: Call
    number: int
    started_at: float
    begin: _Statement


def _rows(connection: sqlite3.Connection, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
    return connection.execute(sql, parameters).fetchall()


class _Recorder:
    """
    Writes what becomes of a chunk's calls.

    That the first call begins is recorded before it is made: nobody else begins with this chunk then. Of the
    others it is only noted (`marks`), until they end or have taken some milliseconds; what ended is
    recorded together. A call whose beginning is on record has its end recorded before the next one begins. So
    what a killed worker was at is known exactly: it is the call on record as STARTED, or else the one
    that was noted. What had ended within the last `FLUSH_EVERY` seconds is not known to have been made.
    """

    def __init__(self, store: ResultStore, calls: list[Call], *, notes: bool) -> None:
        self._store = store
        self._pid = os.getpid()
        self._owner = store.own_owner()
        self._calls = calls
        self._mutex = threading.Lock()  # the flusher has its own thread
        self._position = 0
        """Of the call that is next."""
        self._numbers: dict[str, int] | None = None
        """Row numbers of the next calls that may be made, by task id; None before the first has begun."""
        self._looked_at = 0
        """Up to which position they were looked at."""
        self._reaped = False
        self._making: _Making | None = None
        self._is_on_record = False
        self._ended: list[_Ended] = []
        self._is_urgent = False
        self._recorded_at = 0.0
        self._flusher = _the_flusher()
        # A thread of the submitter's has none: their deaths are one, and leave nobody who could try again.
        self._marks = store.own_marks() if notes and len(calls) > 1 else None
        self._slot = -1

    def __enter__(self) -> Self:
        if self._marks is not None:
            self._slot = self._marks.take()
        self._flusher.add(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Record what ended last."""
        try:
            with self._mutex:
                self._making = None
                if self._ended:
                    self._record(look=False)
        finally:
            self._flusher.remove(self)
            if self._marks is not None:
                try:
                    self._marks.clear(self._slot)
                finally:
                    self._marks.give_back(self._slot)

    def begin(self, call: Call) -> bool:
        """Note that *call* begins; False if it is not to be made (any more)."""
        with self._mutex:
            self._position += 1
            if self._numbers is None:
                return self._begin_first(call)
            is_due = self._ended and time.monotonic() - self._recorded_at >= FLUSH_EVERY
            if self._is_urgent or is_due:
                self._record(look=True)
            elif self._position > self._looked_at:
                self._numbers = self._look(self._store.read_quietly, LOOK_AHEAD)
            number = self._numbers.get(call.task_id)
            if number is None:
                return False
            if self._marks is not None:
                self._marks.mark(self._slot, Mark.of(call.task_id, number, call.attempt))
            now = self._store.clock.time()
            self._making = _Making(call, number, now, self._beginning(call, now))
            self._is_on_record = False
        self._flusher.later()
        return True

    def _beginning(self, call: Call, now: float) -> _Statement:
        return _Statement(_BEGIN, (self._owner, now, call.task_id, call.attempt))

    def _begin_first(self, call: Call) -> bool:
        store, now = self._store, self._store.clock.time()
        begin = self._beginning(call, now)
        ahead = LOOK_AHEAD if len(self._calls) > 1 else 0

        def operation(connection: sqlite3.Connection) -> dict[str, int] | None:
            store.register_owner(connection)
            return self._look(partial(_rows, connection), ahead) if connection.execute(*begin).rowcount else None

        self._numbers = store.transact_quietly(operation, flush=False)
        if self._numbers is None:
            if not self._reaped:  # perhaps another worker had the chunk, and died of one of its calls
                self._reaped = True
                store.reap()
            return False
        self._making = _Making(call, 0, now, begin)
        self._is_on_record = True
        self._recorded_at = time.monotonic()
        return True

    def _look(self, read: Callable[[str, tuple[Any, ...]], list[Any]], ahead: int) -> dict[str, int]:
        """Find out which of the next calls may be made, the present one among them."""
        calls = self._calls[self._position - 1 : self._position - 1 + ahead]
        self._looked_at = self._position - 1 + len(calls)
        if not calls:
            return {}
        attempts = {call.task_id: call.attempt for call in calls}
        rows = read(_LOOK, (json.dumps(list(attempts)),))
        return {task_id: number for task_id, number, attempt in rows if attempts[task_id] == attempt}

    def run(self, function: Callable[..., Any], call: Call) -> bool:
        """Make the call and remember how it ended; True if it is to be tried again."""
        store = self._store
        token = current_task.set(Running(store.path, call.task_id, call.attempt, self.publish))
        again = False
        value: tuple[Any, ...] | None = None
        failed: tuple[_Statement, ...] = ()
        try:
            value = store.encode_value(function(*call.args, **call.kwargs))
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is the call's outcome
            text, traceback = encode_exception(exc), format_traceback(exc)
            row = (text, "json", traceback, store.clock.time(), call.task_id, call.attempt)
            failed = (_Statement(_FINISH, (FAILURE, *row)),)
            if not call.last and isinstance(exc, Exception) and not isinstance(exc, EncodeError):
                failed = (_Statement(_GIVE_BACK, row), *failed)  # the second if nobody is there to take it back
                again = True
        finally:
            current_task.reset(token)
        with self._mutex:
            self._remember(call, value, failed)
        return again

    def _remember(self, call: Call, value: tuple[Any, ...] | None, failed: tuple[_Statement, ...]) -> None:
        making, self._making = self._making, None
        assert making is not None  # noqa: S101 - `begin` has made it
        now = self._store.clock.time()
        if value is None:
            self._ended.append(_Ended(call.task_id, None if self._is_on_record else making.begin, failed))
        elif self._is_on_record:
            row = (DONE, *value, None, now, call.task_id, call.attempt)
            self._ended.append(_Ended(call.task_id, None, (_Statement(_FINISH, row),)))
        else:
            row = (*value, self._owner, making.started_at, now, making.number, call.task_id, call.attempt)
            self._ended.append(_Ended(call.task_id, None, (_Statement(_FINISH_AT_ONCE, row),)))
        self._is_urgent = self._is_on_record

    def _record(self, *, look: bool) -> None:
        """Record what ended, and *look* which of the next calls may still be made. With the mutex held."""
        ended = self._ended

        def operation(connection: sqlite3.Connection) -> dict[str, int]:
            for end in ended:
                end.record(connection)
            return self._look(partial(_rows, connection), LOOK_AHEAD) if look else {}

        self._numbers = self._store.transact_quietly(operation, flush=True, task_ids=[end.task_id for end in ended])
        self._ended = []
        self._is_urgent = False
        self._recorded_at = time.monotonic()

    def publish(self, *, late: bool = False) -> bool:
        """
        Record that the call which is being made has begun, and what ended before it.

        Args:
            late: Only if the last record is twice as old as it should be.

        Returns:
            False if there is something to record, and it is not late.
        """
        if self._pid != os.getpid():  # forked by the call: its parent records
            return True
        with self._mutex:
            making = None if self._is_on_record else self._making
            if making is None and not self._ended:
                return True
            if late and time.monotonic() - self._recorded_at < 2 * FLUSH_EVERY:
                return False
            ended = self._ended

            def operation(connection: sqlite3.Connection) -> None:
                for end in ended:
                    end.record(connection)
                if making is not None:
                    connection.execute(*making.begin)

            task_ids = [end.task_id for end in ended] + ([making.call.task_id] if making else [])
            self._store.transact_quietly(operation, flush=True, task_ids=task_ids)
            self._ended = []
            self._is_on_record = making is not None or self._is_on_record
            self._recorded_at = time.monotonic()
        return True
