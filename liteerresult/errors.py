"""Every error this package raises: one tree under `LiteerresultError`.

Each class carries what happened as fields, not only as text, and survives pickling, because
errors travel between the processes that share a store.
"""

from __future__ import annotations

import builtins
from typing import Any

__all__ = [
    "ContentDisallowed",
    "DecodeError",
    "EncodeError",
    "ImproperlyConfigured",
    "IncompleteStream",
    "LiteerresultError",
    "NotAResultStore",
    "RemoteError",
    "SchemaMismatch",
    "StoreBusy",
    "StoreCorrupt",
    "StoreError",
    "TaskRevokedError",
    "TimeoutError",
    "TransitionError",
    "WorkerLostError",
]


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], fields: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


class LiteerresultError(Exception):
    """The root: ``except LiteerresultError`` catches whatever this package raises of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take fields, `args` holds the finished text: rebuild from the parts instead.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


class ImproperlyConfigured(LiteerresultError):
    """A result class needs a backend and none was given, set or named by the environment."""


class TimeoutError(LiteerresultError, builtins.TimeoutError):  # noqa: A001 - the field's name; it is also the builtin one
    """
    A wait or join ended before its results did. Nothing is lost: wait again and it goes on.

    Attributes:
        timeout: The limit that passed, in seconds.
        waiting_for: Ids of some of the tasks that were not final yet, at most ten.
    """

    def __init__(self, message: str, *, timeout: float | None = None, waiting_for: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.timeout = timeout
        self.waiting_for = waiting_for


class TransitionError(LiteerresultError):
    """
    A status change that the rules forbid; the stored row is as it was.

    Attributes:
        task_id: The task.
        from_status: Its stored status, or None if there is no such task.
        to_status: The status that was refused.
        reason: Why, in words.
    """

    def __init__(self, task_id: str, from_status: str | None, to_status: str, reason: str) -> None:
        super().__init__(f"task {task_id!r} can't go from {from_status} to {to_status}: {reason}")
        self.task_id = task_id
        self.from_status = from_status
        self.to_status = to_status
        self.reason = reason


class WorkerLostError(LiteerresultError):
    """
    The process that was to finish a task died first.

    Attributes:
        task_id: The task.
        pid: Process id of the dead owner, or None if unknown.
        host: Its host name, or None if unknown.
        since: When the task was started (or, if it never was, created), Unix seconds.
        started: False if no worker had begun it yet when its submitter died.
    """

    task_id: str | None = None
    pid: int | None = None
    host: str | None = None
    since: float | None = None
    started: bool = True


class TaskRevokedError(LiteerresultError):
    """
    The task was cancelled, so it has no value.

    Attributes:
        task_id: The task, or None if unknown.
    """

    def __init__(self, message: str = "revoked", *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class RemoteError(LiteerresultError):
    """
    A task's exception that can't be rebuilt here: its class is not imported, or is not an exception.

    Attributes:
        exc_module: Module of the original class, or None if a writer gave text only.
        exc_type: Name of the original class, or None likewise.
        exc_args: Its ``args``, as far as they could be stored.
        text: ``str()`` of the original.
    """

    def __init__(
        self, text: str, *, exc_module: str | None = None, exc_type: str | None = None, exc_args: tuple[Any, ...] = ()
    ) -> None:
        name = ".".join(part for part in (exc_module, exc_type) if part)
        super().__init__(f"{name}: {text}" if name and text else name or text)
        self.exc_module = exc_module
        self.exc_type = exc_type
        self.exc_args = exc_args
        self.text = text


class EncodeError(LiteerresultError):
    """
    A value can't be stored so that it comes back the same.

    Attributes:
        path: Where in the value, as a JSON path: ``$.rows[3].blob``.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, *, path: str = "$", remedy: str = "") -> None:
        super().__init__(f"{path}: {problem}" + (f"; {remedy}" if remedy else ""))
        self.path = path
        self.remedy = remedy


class DecodeError(LiteerresultError):
    """
    A stored value can't be read: another program wrote it, or a type is not registered here.

    Attributes:
        task_id: The task, or None if unknown.
        column: The column of the row: result, args, kwargs.
        problem: What is wrong with it.
    """

    def __init__(self, problem: str, *, task_id: str | None = None, column: str | None = None) -> None:
        where = f"task {task_id!r}, column {column}: " if task_id is not None else ""
        super().__init__(where + problem)
        self.task_id = task_id
        self.column = column
        self.problem = problem


class ContentDisallowed(DecodeError):
    """The row is in an encoding that this store was not told to accept."""


class StoreError(LiteerresultError):
    """
    The file can't be read or written: full disk, permissions, a network file system.

    Attributes:
        path: The database file.
        sqlite_errorcode: SQLite's extended result code, or None if the cause is not SQLite.
        sqlite_errorname: Its name, or None likewise.
    """

    def __init__(
        self, message: str, *, path: str = "", sqlite_errorcode: int | None = None, sqlite_errorname: str | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.sqlite_errorcode = sqlite_errorcode
        self.sqlite_errorname = sqlite_errorname


class StoreBusy(StoreError):
    """
    Another program holds the file's lock.

    Attributes:
        waited: How long this call waited for it, in seconds.
    """

    waited: float = 0.0


class StoreCorrupt(StoreError):
    """The file is damaged; nothing was written to it."""


class NotAResultStore(StoreError):
    """The file is not a SQLite database, or is another application's; it was left untouched."""


class SchemaMismatch(StoreError):
    """
    The file's format is newer than this code knows; it was left untouched.

    Attributes:
        found: The file's format version.
        known: The newest one that this code reads.
    """

    found: int = 0
    known: int = 0


class IncompleteStream(LiteerresultError):
    """A tree of results can't be walked to its end yet: a task in it is not ready, and may submit more."""
