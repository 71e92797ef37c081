"""A store's verbs on tasks, each beside its SQL."""

from __future__ import annotations

import json
import signal as signals
from contextlib import suppress
from contextvars import ContextVar
from operator import ge
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from .backend import Rest, TaskMeta, check_id
from .core import StoreCore
from .errors import EncodeError, TransitionError
from .liveness import parse_owner
from .manyrows import execute_for_rows
from .marks import Mark
from .results import AsyncResult, ResultBase
from .serialization import encode_exception, format_traceback
from .states import DONE, FAILURE, LOST, PENDING, RETRY, REVOKED, STARTED, check_custom
from .termination import send_to_owner

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from .backend import Backend

    _Row = tuple[str, str, object, str | None, str | None, int, str | None, int | None, int]

__all__ = ["Running", "RunningTask", "TaskVerbs", "current_task"]


class Running(NamedTuple):
    """
    The task that a context runs.

    Attributes:
        path: Of the store.
        task_id: The task.
        attempt: Which attempt it is.
        announce: Records that it has begun, if that was put off.
    """

    path: str
    task_id: str
    attempt: int
    announce: Callable[[], object] | None = None


current_task: ContextVar[Running | None] = ContextVar("liteerresult_current_task", default=None)
"""What this context runs: what it submits has that task for a parent."""

_COLUMNS = "id, status, result, encoding, traceback, retries, owner, done_number, number"

_READ = f"SELECT {_COLUMNS} FROM tasks WHERE id = ?"  # noqa: S608 - constants

# A waiter's pages are stale whenever another process has written: the row's number spares it the index's.
_READ_AGAIN = f"SELECT {_COLUMNS} FROM tasks WHERE number = ? AND id = ?"  # noqa: S608

_READ_MANY = f"SELECT {_COLUMNS} FROM tasks WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608

_READ_REST = "SELECT name, args, kwargs, parent_id, created_at, started_at, done_at FROM tasks WHERE id = ?"

_EXISTS = "SELECT 1 FROM tasks WHERE id = ?"

_COMPLETION_NUMBER = "SELECT done_number - 1 FROM next_completion"

_COMPLETED_SINCE = """
    SELECT done_number, id FROM tasks WHERE done_number IS NOT NULL AND done_number > ?
    ORDER BY done_number LIMIT 5000"""

_CREATE = """
    INSERT INTO tasks (id, name, parent_id, args, kwargs, created_at) VALUES (?, ?, ?, ?, ?, ?)"""

_START = """
    UPDATE tasks SET status = 'STARTED', owner = :owner, started_at = :now,
        result = NULL, encoding = NULL, traceback = NULL
    WHERE id = :id AND done_number IS NULL AND status <> 'STARTED'
      AND (owner IS NULL OR status IN ('PENDING', 'RETRY')) AND retries = coalesce(:attempt, retries)
    RETURNING retries"""

_START_UNKNOWN = """
    INSERT INTO tasks (id, status, owner, created_at, started_at) VALUES (:id, 'STARTED', :owner, :now, :now)"""

_REGISTER_OWNER = "INSERT OR IGNORE INTO owners (id, pid, host, started_at) VALUES (?, ?, ?, ?)"

# `retries` is the fence: a worker that lost its attempt holds an older number.
_FINISH = """
    UPDATE tasks SET status = ?, result = ?, encoding = ?, traceback = ?, done_at = ?,
        done_number = (SELECT done_number FROM next_completion)
    WHERE id = ? AND done_number IS NULL AND retries = coalesce(?, retries)"""

# In the order of the ids given; fewer rows than ids if some have none or are final.
_UNFINISHED = """
    SELECT tasks.number, tasks.retries FROM json_each(?) AS ids CROSS JOIN tasks ON tasks.id = ids.value
    WHERE tasks.done_number IS NULL ORDER BY ids.key"""

# SQLite goes through the rows by their numbers, so the completion numbers have to grow with those.
_FINISH_MANY = """
    UPDATE tasks SET status = 'DONE', result = new.column2, encoding = new.column3, traceback = NULL,
        done_at = new.column4, done_number = new.column5
    FROM (VALUES (?, ?, ?, ?, ?)) AS new WHERE tasks.number = new.column1"""

_FINISH_UNKNOWN = """
    INSERT INTO tasks (status, result, encoding, traceback, done_at, id, created_at, done_number)
    VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT done_number FROM next_completion))"""

_UPDATE_STATE = """
    UPDATE tasks SET status = ?, result = ?, encoding = ?, traceback = ?
    WHERE id = ? AND done_number IS NULL AND retries = coalesce(?, retries)"""

_RETRY = """
    UPDATE tasks SET status = ?, result = ?, encoding = ?, traceback = ?, done_at = ?
    WHERE id = ? AND done_number IS NULL AND retries = coalesce(?, retries)"""

_UPDATE_STATE_UNKNOWN = """
    INSERT INTO tasks (status, result, encoding, traceback, id, created_at) VALUES (?, ?, ?, ?, ?, ?)"""

_WHOSE = "SELECT status, owner, number, retries FROM tasks WHERE id = ?"

_RESUBMIT = """
    UPDATE tasks SET status = 'PENDING', retries = retries + 1, owner = NULL, submitter = NULL
    WHERE id = ? AND status IN ('FAILURE', 'REVOKED')"""

_FORGET = "DELETE FROM tasks WHERE id = ?"

_ATTEMPTS = """
    SELECT status, result, encoding, traceback, attempt, owner, started_at, done_at
    FROM attempts WHERE task_id = ? ORDER BY attempt"""


class _Payload(NamedTuple):
    result: str | bytes | None
    encoding: str | None
    traceback: str | None


class TaskVerbs(StoreCore):
    """Verbs on tasks."""

    _attempts: dict[str, int]
    """Attempts that this store object has begun: task id to number."""
    _reported: set[tuple[str, int]]
    """Attempts that ended by a report from inside `run_task`."""
    _registered: str | None = None

    def _attempt_of(self, task_id: str) -> int | None:
        """Return the attempt at the task that this context, or else this store object, has begun."""
        running = self._running()
        if running is not None and running.task_id == task_id:
            return running.attempt
        return self._attempts.get(task_id)

    def has_begun(self, task_id: str) -> bool:
        """Tell whether this store object has begun the task, outside of a batch."""
        return task_id in self._attempts

    def _running(self) -> Running | None:
        """Return the task of this store that this context runs, which from now on is known to have begun."""
        running = current_task.get()
        if running is None or running.path != self.path:
            return None
        if running.announce is not None:
            running.announce()
        return running

    def _result(self, task_id: str) -> AsyncResult:
        return AsyncResult(task_id, cast("Backend", self))  # with the verbs on groups, which lie above

    # Reading

    def get_task_meta(self, task_id: str, number: int | None = None) -> TaskMeta:
        """
        Return a task's row; payloads are decoded only when asked for.

        Args:
            task_id: The task.
            number: The row's number, if it was read before: it is found sooner.

        Returns:
            The row; one with status PENDING for an id nobody recorded (its ``created_at`` is None).
        """
        self._running()
        rows = self._db.read(_READ_AGAIN, (number, task_id)) if number is not None else ()
        if not rows:
            rows = self._db.read(_READ, (check_id(task_id),))
        return self._meta_of(rows[0]) if rows else TaskMeta(self._serializer, task_id)

    def _meta_of(self, row: _Row) -> TaskMeta:
        return TaskMeta(self._serializer, *row, more=self._read_rest)

    def _read_rest(self, task_id: str) -> Rest:
        rows = self._db.read(_READ_REST, (task_id,))
        return Rest(*rows[0]) if rows else Rest()

    def get_many(self, task_ids: Sequence[str]) -> list[TaskMeta]:
        """Return the rows of many tasks in one query, in the order asked."""
        self._running()
        found = {row[0]: self._meta_of(row) for row in self._db.read(_READ_MANY, (json.dumps(list(task_ids)),))}
        return [found.get(task_id) or TaskMeta(self._serializer, task_id) for task_id in task_ids]

    def exists(self, task_id: str) -> bool:
        """Tell whether the task is recorded: an unknown id is PENDING too."""
        return bool(self._db.read(_EXISTS, (check_id(task_id),)))

    def completion_number(self) -> int:
        """Return the number of the task that was completed last, 0 if none was."""
        return int(self._db.read(_COMPLETION_NUMBER)[0][0])

    def completed_since(self, number: int) -> tuple[int, list[str]]:
        """Return ids of tasks completed after *number*, in that order (5,000 at most), and the number reached."""
        rows = self._db.read(_COMPLETED_SINCE, (number,))
        return (rows[-1][0] if rows else number), [row[1] for row in rows]

    def attempts(self, task_id: str) -> list[TaskMeta]:
        """Return what the earlier attempts of a task that was retried or resubmitted ended with."""
        return [
            TaskMeta(
                self._serializer, task_id, status, payload, encoding, traceback,
                retries=attempt, owner=owner, started_at=started_at, done_at=done_at,
            )
            for status, payload, encoding, traceback, attempt, owner, started_at, done_at in self._db.read(
                _ATTEMPTS, (check_id(task_id),)
            )
        ]  # fmt: skip

    # Creating

    def create_task(
        self,
        name: str | None = None,
        *,
        task_id: str | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        parent: ResultBase | str | None = None,
    ) -> AsyncResult:
        """
        Record a task that waits for execution.

        Args:
            name: What kind of work it is, for people.
            task_id: Its id; a new one if None.
            args: Positional arguments, kept for people and for resuming.
            kwargs: Keyword arguments, likewise.
            parent: What submits it; the task that is running in this context if None.

        Returns:
            Its result, PENDING.

        Raises:
            TransitionError: There is a task of that id already.
            EncodeError: An argument can't be stored.
        """
        task_id = self.new_id() if task_id is None else check_id(task_id)
        encoded = self.encode_readably(tuple(args)), self.encode_readably(dict(kwargs or {}))
        parent_id = self.parent_id_of(parent)
        row = (task_id, name, parent_id, *encoded, self.clock.time())

        def operation(connection: sqlite3.Connection) -> None:
            known = connection.execute("SELECT status FROM tasks WHERE id = ?", (task_id,)).fetchone()
            if known is not None:
                raise TransitionError(task_id, known[0], PENDING, "the id is taken; use another, or resubmit the task")
            connection.execute(_CREATE, row)

        self._write(operation, (task_id,))
        return self._result(task_id)

    def parent_id_of(self, parent: ResultBase | str | None) -> str | None:
        """Return the id of what is given as a parent; of the task that runs in this context if None."""
        if parent is None:
            running = current_task.get()
            return running.task_id if running is not None and running.path == self.path else None
        if isinstance(parent, str):
            return check_id(parent, "parent id")
        identity = getattr(parent, "id", None)
        if not isinstance(parent, ResultBase) or identity is None:
            msg = f"a parent is the result of a task or group, or its id; not {type(parent).__name__}"
            raise TypeError(msg)
        return str(identity)

    # Running

    def run_task(self, task_id: str) -> RunningTask:
        """
        Run a task in a ``with`` block: STARTED and owned by this process, DONE or FAILURE on the way out.

        The value is what the block assigns to ``task.result``. What the block raises is stored and goes on.

        Raises:
            TransitionError: Someone runs it already, or it is final.
        """
        return RunningTask(self, check_id(task_id))

    def mark_as_started(self, task_id: str) -> int:
        """
        Record that this process runs the task from now on: if it dies, the task is FAILURE with WorkerLostError.

        Returns:
            The attempt's number: how many there were before.

        Raises:
            TransitionError: Someone runs it already, or it is final.
        """
        return self.start(check_id(task_id))

    def start(self, task_id: str, attempt: int | None = None, *, durable: bool = True) -> int:
        """Do what `mark_as_started` does, for a given attempt only, and synced later if not *durable*."""
        self._running()
        owner = self._owners.acquire()
        row = {"id": task_id, "owner": owner, "now": self.clock.time(), "attempt": attempt}

        def operation(connection: sqlite3.Connection) -> int:
            self.register_owner(connection)
            found = connection.execute(_START, row).fetchone()
            if found is not None:
                return int(found[0])
            if connection.execute(_EXISTS, (task_id,)).fetchone() is None:
                connection.execute(_START_UNKNOWN, row)
                return 0
            raise self._refusal(connection, task_id, STARTED, attempt)

        number = self._write(operation, (task_id,), durable=durable)
        self._registered = owner
        self._attempts[task_id] = number
        return number

    def register_owner(self, connection: sqlite3.Connection) -> None:
        """Record this process among the owners, in the transaction of its first task."""
        owner = self._owners.acquire()
        if self._registered != owner:
            connection.execute(_REGISTER_OWNER, (owner, *parse_owner(owner), self.clock.time()))

    # Finishing

    def mark_as_done(self, task_id: str, result: Any = None) -> None:
        """
        Record that the task succeeded. The first final report wins.

        Args:
            task_id: The task; recorded now if nobody did before.
            result: The return value.

        Raises:
            TransitionError: The task is final already, or this process lost its attempt; nothing changed.
            EncodeError: The value can't be stored: the task is FAILURE with that error.
        """
        task_id = check_id(task_id)
        try:
            payload = _Payload(self._serializer.encode(result), self._serializer.encoding, None)
            self._finish(task_id, DONE, payload)
        except EncodeError as exc:  # by the encoder, or by SQLite's own limit
            self.mark_as_failure(task_id, exc)
            raise

    def mark_as_failure(self, task_id: str, exc: BaseException | str, traceback: str | None = None) -> None:
        """
        Record that the task failed.

        Args:
            task_id: The task; recorded now if nobody did before.
            exc: What it raised; a text stands for a RemoteError.
            traceback: Text of the traceback; that of *exc* if None.

        Raises:
            TransitionError: The task is final already, or this process lost its attempt; nothing changed.
        """
        self._finish(check_id(task_id), FAILURE, _failure(exc, traceback))

    def mark_as_revoked(self, task_id: str, reason: str | None = None) -> None:
        """
        Record that the task is cancelled: ``get()`` raises TaskRevokedError.

        Args:
            task_id: The task; recorded now if nobody did before, so that nobody starts it.
            reason: Why, in words.

        Raises:
            TransitionError: The task is final already; nothing changed.
        """
        payload = _Payload(None, None, None) if reason is None else _Payload(json.dumps(reason), "json", None)
        self._finish(check_id(task_id), REVOKED, payload, fenced=False)

    def mark_many_as_done(self, results: Mapping[str, Any]) -> None:
        """
        Record many successes in one transaction: all of them, or none.

        Args:
            results: Task id to return value.

        Raises:
            TransitionError: One of them is final already; nothing changed.
            EncodeError: One of the values can't be stored; nothing changed.
        """
        now, encoding = self.clock.time(), self._serializer.encoding
        ids = [check_id(task_id) for task_id in results]
        payloads = list(map(self._serializer.encode, results.values()))
        attempts = list(map(self._attempts.get, ids))

        def operation(connection: sqlite3.Connection) -> None:
            numbers = self._numbers_in_order(connection, ids, attempts)
            if numbers is None:
                for task_id, payload, attempt in zip(ids, payloads, attempts, strict=True):
                    self._finish_row(connection, (DONE, payload, encoding, None, now, task_id, attempt))
                return
            (last,) = connection.execute(_COMPLETION_NUMBER).fetchone()
            rows = [
                (number, payload, encoding, now, place)
                for place, (number, payload) in enumerate(zip(numbers, payloads, strict=True), last + 1)
            ]
            execute_for_rows(connection, _FINISH_MANY, rows)

        if ids:
            self._write(operation, ids)
            for task_id in ids:
                self._attempts.pop(task_id, None)

    @staticmethod
    def _numbers_in_order(
        connection: sqlite3.Connection, ids: list[str], attempts: list[int | None]
    ) -> list[int] | None:
        """Return the rows' numbers if all can be finished now and the numbers grow, None else."""
        found = connection.execute(_UNFINISHED, (json.dumps(ids),)).fetchall()
        numbers = [row[0] for row in found]
        if len(found) != len(ids) or any(map(ge, numbers, numbers[1:])):
            return None
        held = all(attempt is None or attempt == row[1] for attempt, row in zip(attempts, found, strict=True))
        return numbers if held else None

    def _finish(self, task_id: str, status: str, payload: _Payload, *, fenced: bool = True) -> None:
        attempt = self._attempt_of(task_id) if fenced else None
        row = (status, *payload, self.clock.time(), task_id, attempt)

        if not self._write_one(_FINISH, row, task_id):
            self._write(lambda connection: self._finish_row(connection, row), (task_id,))
        if fenced:
            self._attempts.pop(task_id, None)
        self._note_report(task_id)

    def _note_report(self, task_id: str) -> None:
        running = current_task.get()
        if running is not None and running.task_id == task_id and running.path == self.path:
            self._reported.add((task_id, running.attempt))

    def _finish_row(self, connection: sqlite3.Connection, row: tuple[Any, ...]) -> None:
        """Finish a task that may have no row; refuse it if it has one that can't be finished."""
        task_id = row[5]
        if connection.execute(_FINISH, row).rowcount == 1:
            return  # it was made meanwhile
        if connection.execute(_EXISTS, (task_id,)).fetchone() is not None:
            raise self._refusal(connection, task_id, row[0], row[6])
        connection.execute(_FINISH_UNKNOWN, (*row[:6], row[4]))

    def _refusal(
        self, connection: sqlite3.Connection, task_id: str, to_status: str, attempt: int | None
    ) -> TransitionError:
        status, retries, owner = connection.execute(
            "SELECT status, retries, owner FROM tasks WHERE id = ?", (task_id,)
        ).fetchone()
        if attempt is not None and retries != attempt:
            reason = f"this worker's attempt {attempt} was declared lost, the task is at attempt {retries}"
        elif status in (DONE, FAILURE, REVOKED):
            reason = "the first final report wins" if to_status != PENDING else "DONE never changes"
        elif to_status == STARTED and owner is not None:
            reason = f"{owner} runs it"
        else:
            reason = "it has begun"
        return TransitionError(task_id, status, to_status, reason)

    # On the way

    def update_state(self, task_id: str, state: str, meta: Any = None) -> None:
        """
        Record a custom state such as PROGRESS.

        Args:
            task_id: The task; recorded now if nobody did before.
            state: An upper-case name, none of the built-in ones.
            meta: What `info` answers.

        Raises:
            TransitionError: The task is final already, or this process lost its attempt; nothing changed.
            EncodeError: *meta* can't be stored; nothing changed.
            ValueError: *state* can't be a custom state.
        """
        payload = _Payload(self._serializer.encode(meta), self._serializer.encoding, None)
        self._update(check_id(task_id), check_custom(state), payload)

    def mark_as_retry(self, task_id: str, exc: BaseException | str | None = None, traceback: str | None = None) -> None:
        """
        Record that an attempt failed and there will be another.

        Args:
            task_id: The task; recorded now if nobody did before.
            exc: What it raised; a text stands for a RemoteError.
            traceback: Text of the traceback; that of *exc* if None.

        Raises:
            TransitionError: The task is final already, or this process lost its attempt; nothing changed.
        """
        payload = _Payload(None, None, None) if exc is None else _failure(exc, traceback)
        self._update(check_id(task_id), RETRY, payload)
        self._attempts.pop(task_id, None)
        self._note_report(task_id)

    def _update(self, task_id: str, status: str, payload: _Payload) -> None:
        attempt = self._attempt_of(task_id)

        # When an attempt ended is told to `attempts`; the task itself goes on.
        row: tuple[Any, ...]
        sql, row = _UPDATE_STATE, (status, *payload, task_id, attempt)
        if status == RETRY:
            sql, row = _RETRY, (status, *payload, self.clock.time(), task_id, attempt)

        def operation(connection: sqlite3.Connection) -> None:
            if connection.execute(sql, row).rowcount == 1:
                return
            if connection.execute(_EXISTS, (task_id,)).fetchone() is not None:
                raise self._refusal(connection, task_id, status, attempt)
            connection.execute(_UPDATE_STATE_UNKNOWN, (status, *payload, task_id, self.clock.time()))

        if not self._write_one(sql, row, task_id):
            self._write(operation, (task_id,))

    # Back, and away

    def resubmit(self, task_id: str) -> AsyncResult:
        """
        Send a failed or revoked task back to PENDING, for its next attempt; `attempts` keeps how the last one ended.

        Raises:
            TransitionError: It is neither FAILURE nor REVOKED, or unknown.
        """
        task_id = check_id(task_id)

        def operation(connection: sqlite3.Connection) -> None:
            if connection.execute(_RESUBMIT, (task_id,)).rowcount == 1:
                return
            known = connection.execute("SELECT status FROM tasks WHERE id = ?", (task_id,)).fetchone()
            if known is None:
                raise TransitionError(task_id, None, PENDING, "no such task; create it")
            reason = "DONE never changes" if known[0] == DONE else "only FAILURE and REVOKED are resubmitted"
            raise TransitionError(task_id, known[0], PENDING, reason)

        self._write(operation, (task_id,))
        return self._result(task_id)

    def revoke(self, task_id: str, *, terminate: bool = False, signal: int | str = "SIGTERM") -> bool:
        """
        Cancel a task unless it is final; an unknown id is recorded as REVOKED, so that nobody starts it.

        Args:
            task_id: The task.
            terminate: Also signal the process that runs it, if that is proven to be its owner and is not this process.
            signal: Which signal, by name or number.

        Returns:
            Whether this call cancelled it.

        Raises:
            ValueError: There is no such signal.
        """
        number = (
            signals.Signals[signal] if isinstance(signal, str) and signal in signals.Signals.__members__ else signal
        )
        if isinstance(number, str):
            msg = f"no signal is named {signal!r}; try SIGTERM"
            raise ValueError(msg)  # noqa: TRY004 - the type was right
        number = signals.Signals(number)
        task_id = check_id(task_id)
        self._running()
        row = (REVOKED, None, None, None, self.clock.time(), task_id, None)

        def operation(connection: sqlite3.Connection) -> tuple[str | None, Mark | None]:
            before = connection.execute(_WHOSE, (task_id,)).fetchone()
            self._finish_row(connection, row)
            if before is None:
                return None, None
            status, its_owner, number, attempt = before
            if status in (PENDING, RETRY):  # its owner is who submitted it, and does much else besides
                return None, Mark.of(task_id, number, attempt)
            return None if status == LOST else its_owner, None

        try:
            owner, mark = self._write(operation, (task_id,))
        except TransitionError:
            return False
        self._note_report(task_id)
        if terminate:
            self._terminate(owner, mark, number)
        return True

    def _terminate(self, owner: str | None, mark: Mark | None, number: signals.Signals) -> None:
        """Signal who runs a task, or has noted that it makes the call *mark* and not recorded that yet."""
        if mark is not None:
            owner = next((other for other, its_mark in self._owners.marks_of_the_living() if its_mark == mark), None)

        def is_at_it(owner: str) -> bool:
            return self._owners.is_alive(owner) and (mark is None or mark in self._owners.marks_of(owner))

        if owner is not None and owner != self._owners.own:
            send_to_owner(owner, number, is_at_it)

    def forget(self, task_id: str) -> None:
        """Delete a task's row; nothing happens if there is none. Its groups keep the id and wait for it anew."""
        task_id = check_id(task_id)
        self._write_one(_FORGET, (task_id,), task_id)


def _failure(exc: BaseException | str, traceback: str | None) -> _Payload:
    if isinstance(exc, str):
        return _Payload(json.dumps(exc), "json", traceback)
    if not isinstance(exc, BaseException):
        msg = f"a failure is an exception or a text, not {type(exc).__name__}"
        raise TypeError(msg)
    return _Payload(encode_exception(exc), "json", format_traceback(exc) if traceback is None else traceback)


class RunningTask:
    """
    A task while this process runs it: made by `ResultStore.run_task`.

    Attributes:
        task_id: The id.
        retries: Attempts before this one.
        result: The value to be stored at the end; None until the block assigns it.
    """

    def __init__(self, store: TaskVerbs, task_id: str) -> None:
        self._store = store
        self.task_id = task_id
        self.retries = 0
        self.result: Any = None

    def update_state(self, state: str, meta: Any = None) -> None:
        """Record a custom state such as PROGRESS: see `ResultStore.update_state`."""
        self._store.update_state(self.task_id, state, meta)

    def __enter__(self) -> Self:
        self.retries = self._store.start(self.task_id)
        self._token = current_task.set(Running(self._store.path, self.task_id, self.retries))
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        store, attempt = self._store, (self.task_id, self.retries)
        try:
            if attempt not in store._reported:  # else the block reported the end itself
                self._report(exc)
        finally:
            store._reported.discard(attempt)
            current_task.reset(self._token)

    def _report(self, exc: BaseException | None) -> None:
        if exc is None:
            self._store.mark_as_done(self.task_id, self.result)
        else:
            # Refused if it was revoked meanwhile, say; what the block raised goes on all the same.
            with suppress(TransitionError):
                self._store.mark_as_failure(self.task_id, exc)
