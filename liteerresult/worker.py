"""The worker's half of a batch: runs calls and records what became of each, in the process that ran them."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import EncodeError, StoreError
from .serialization import encode_exception, format_traceback
from .states import DONE, FAILURE
from .tasks import current_task

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from .store import ResultStore

__all__ = ["Call", "ChunkReport", "Home", "run_chunk", "this_host"]

FLUSH_EVERY = 0.002
"""What was finished is synced and rung after about this many seconds at the latest."""

_BEGIN = """
    UPDATE tasks SET status = 'STARTED', owner = ?, started_at = ?, result = NULL, encoding = NULL, traceback = NULL
    WHERE id = ? AND retries = ? AND status IN ('PENDING', 'RETRY')"""

_FINISH = """
    UPDATE tasks SET status = ?, result = ?, encoding = ?, traceback = ?, done_at = ?,
        done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND retries = ? AND done_number IS NULL"""

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
    """

    path: str
    options: tuple[Any, ...]
    host: str


@functools.cache
def this_host() -> str:
    """Identify the running system: file events and locks reach no further than its kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        import platform

        return platform.node()


def run_chunk(home: Home, function: Callable[..., Any], calls: list[Call]) -> ChunkReport:
    """Make *calls* one after the other, recording each as it begins and ends."""
    started = time.perf_counter()
    if home.host != this_host() or not os.path.exists(home.path):
        outcomes = [_outcome(function, call) for call in calls]
        return ChunkReport([], time.perf_counter() - started, outcomes)
    recorder = _Recorder(_store_at(home))
    again, skipped = [], []
    for position, call in enumerate(calls):
        if not recorder.begin(call):
            skipped.append(position)
        elif recorder.run(function, call):
            again.append(position)
    recorder.end()
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


_Statement = tuple[str, tuple[Any, ...]]


def _first_that_fits(connection: sqlite3.Connection, statements: tuple[_Statement, ...]) -> None:
    """Run statements up to the first that changes something."""
    for sql, row in statements:
        if connection.execute(sql, row).rowcount:
            return


class _Flusher:
    """A thread that flushes what a call that takes long would keep waiting."""

    def __init__(self, store: ResultStore) -> None:
        self._store = weakref.ref(store)
        self._wanted = threading.Event()
        threading.Thread(target=self._run, name="liteerresult-flusher", daemon=True).start()

    def later(self) -> None:
        """Flush in `FLUSH_EVERY` seconds."""
        if not self._wanted.is_set():
            self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(FLUSH_EVERY)
            self._wanted.clear()
            store = self._store()
            if store is None or store.closed:
                return
            with contextlib.suppress(StoreError):  # the recorder meets it too, and can tell somebody
                store.flush()
            del store


_flushers: weakref.WeakKeyDictionary[ResultStore, _Flusher] = weakref.WeakKeyDictionary()


def _flusher_of(store: ResultStore) -> _Flusher:
    flusher = _flushers.get(store)
    if flusher is None:
        flusher = _flushers[store] = _Flusher(store)
    return flusher


def _after_fork_in_child() -> None:
    _flushers.clear()  # the parent's threads are not here


os.register_at_fork(after_in_child=_after_fork_in_child)


class _Recorder:
    """
    Writes "the last call ended, the next begins" as one transaction.

    So what a killed worker was at is known exactly, at one commit a call. The sync and the bell, which
    cost more, follow at most `FLUSH_EVERY` seconds later: nobody is told before.
    """

    def __init__(self, store: ResultStore) -> None:
        self._store = store
        self._flusher = _flusher_of(store)
        self._ended: tuple[_Statement, ...] = ()
        self._flushed = 0.0

    def begin(self, call: Call) -> bool:
        """Record what ended and that *call* begins; False if the call is not to be made (any more)."""
        store = self._store
        row = (store.own_owner(), store.clock.time(), call.task_id, call.attempt)
        ended, self._ended = self._ended, ()

        def operation(connection: sqlite3.Connection) -> bool:
            _first_that_fits(connection, ended)
            store.register_owner(connection)
            return connection.execute(_BEGIN, row).rowcount == 1

        due = bool(ended) and self._is_due()
        begun = store.transact_quietly(operation, flush=due)
        if ended and not due:
            self._flusher.later()
        return begun

    def run(self, function: Callable[..., Any], call: Call) -> bool:
        """Make the call and remember how it ended; True if it is to be tried again."""
        store = self._store
        token = current_task.set((store.path, call.task_id, call.attempt))
        try:
            value = function(*call.args, **call.kwargs)
            payload = store.encode_value(value)
            self._ended = ((_FINISH, (DONE, *payload, None, store.clock.time(), call.task_id, call.attempt)),)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, it is the call's outcome
            text, traceback = encode_exception(exc), format_traceback(exc)
            row = (text, "json", traceback, store.clock.time(), call.task_id, call.attempt)
            failed = (_FINISH, (FAILURE, *row))
            if not call.last and isinstance(exc, Exception) and not isinstance(exc, EncodeError):
                self._ended = ((_GIVE_BACK, row), failed)  # if nobody is there to take it back
                return True
            self._ended = (failed,)
        finally:
            current_task.reset(token)
        return False

    def end(self) -> None:
        """Record what ended last, and see that all of it lasts and is heard of."""
        ended = self._ended
        if ended:
            self._store.transact_quietly(lambda connection: _first_that_fits(connection, ended), flush=True)
        else:
            self._store.flush()

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._flushed < FLUSH_EVERY:
            return False
        self._flushed = now
        return True
