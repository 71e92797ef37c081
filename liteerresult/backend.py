"""What the result classes need of a store: the `Backend` protocol, a task's stored row, the default backend."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

from .errors import ImproperlyConfigured, RemoteError, TaskRevokedError
from .states import DONE, PENDING, PROPAGATE_STATES, READY_STATES, RETRY, REVOKED, STARTED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

__all__ = [
    "Backend",
    "Decoder",
    "GroupCounts",
    "Rest",
    "TaskMeta",
    "Waiting",
    "check_id",
    "default_backend",
    "set_default_backend",
    "set_opener",
]


def check_id(value: object, what: str = "task id") -> str:
    """
    Return *value* if it can be an id.

    Raises:
        ValueError: It is None, empty, or text that SQLite can't keep.
        TypeError: It is not a string.
    """
    if type(value) is str and value and value.isascii() and "\0" not in value:
        return value
    if value is None:
        msg = f"a {what} is needed, not None"
        raise ValueError(msg)
    if not isinstance(value, str):
        msg = f"a {what} is a str, not {type(value).__name__}"
        raise TypeError(msg)
    if not value:
        msg = f"a {what} is not empty"
        raise ValueError(msg)
    try:
        value.encode()
    except UnicodeEncodeError:
        msg = f"a {what} is valid Unicode text, not {value!r}"
        raise ValueError(msg) from None
    if "\0" in value:
        msg = f"a {what} holds no NUL character: {value!r}"
        raise ValueError(msg)
    return str(value)


class Decoder(Protocol):
    """Turns stored payloads into values: `liteerresult.serialization.Serializer` is one."""

    def decode(self, data: object, encoding: str | None, *, task_id: str | None = None, column: str = "result") -> Any:
        """Return the value of a payload."""
        ...

    def decode_exception(
        self, data: object, encoding: str | None, traceback: str | None, *, task_id: str | None = None
    ) -> BaseException:
        """Return a new instance of a stored exception."""
        ...


class Rest(NamedTuple):
    """The columns of a task that a wait does not need."""

    name: str | None = None
    args: object = None
    kwargs: object = None
    parent_id: str | None = None
    created_at: float | None = None
    started_at: float | None = None
    done_at: float | None = None


class TaskMeta:
    """
    A task as stored. Payloads are decoded when asked for, never before; what a wait does not need is read then.

    Attributes:
        task_id: The id.
        status: The stored word: see `liteerresult.states`.
        payload: The encoded result.
        encoding: How it is encoded.
        traceback: Text of the failed process's traceback, or None.
        retries: Attempts before this one.
        owner: Id of the process that answers for the task, or None.
        done_number: Its place in the order of completion, or None.
        number: Where the store found it, so that it finds it again sooner; None if that doesn't matter.
    """

    __slots__ = (
        "_decoder", "_more", "_rest", "done_number", "encoding", "number", "owner", "payload", "retries", "status",
        "task_id", "traceback",
    )  # fmt: skip

    def __init__(
        self,
        decoder: Decoder,
        task_id: str,
        status: str = PENDING,
        payload: object = None,
        encoding: str | None = None,
        traceback: str | None = None,
        retries: int = 0,
        owner: str | None = None,
        done_number: int | None = None,
        number: int | None = None,
        more: Callable[[str], Rest] | None = None,
        **rest: Any,
    ) -> None:
        self._decoder = decoder
        self.task_id = task_id
        self.status = status
        self.payload = payload
        self.encoding = encoding
        self.traceback = traceback
        self.retries = retries
        self.owner = owner
        self.done_number = done_number
        self.number = number
        self._more = more
        self._rest: Rest | None = None if more else Rest(**rest)

    def _read_more(self) -> Rest:
        if self._rest is None:
            assert self._more is not None  # noqa: S101 - one of the two is given
            self._rest = self._more(self.task_id)
        return self._rest

    @property
    def name(self) -> str | None:
        """Kind of work, or None."""
        return self._read_more().name

    @property
    def parent_id(self) -> str | None:
        """Id of the task or group that submitted it, or None."""
        return self._read_more().parent_id

    @property
    def created_at(self) -> float | None:
        """Unix seconds; None if there is no such task."""
        return self._read_more().created_at

    @property
    def started_at(self) -> float | None:
        """Unix seconds, or None."""
        return self._read_more().started_at

    @property
    def done_at(self) -> float | None:
        """Unix seconds, or None."""
        return self._read_more().done_at

    @property
    def ready(self) -> bool:
        """True if the status is final."""
        return self.status in READY_STATES

    @property
    def result(self) -> Any:
        """The return value, the exception, or a custom state's meta; None before there is any."""
        if self.status in PROPAGATE_STATES or self.status == RETRY:
            return self.exception()
        if self.status in (PENDING, STARTED):
            return None
        return self._decoder.decode(self.payload, self.encoding, task_id=self.task_id)

    def exception(self) -> BaseException:
        """Return a new instance of the stored exception."""
        if self.status == REVOKED and self.payload is None:
            return TaskRevokedError(f"task {self.task_id!r} was revoked", task_id=self.task_id)
        error = self._decoder.decode_exception(self.payload, self.encoding, self.traceback, task_id=self.task_id)
        if self.status == REVOKED and not isinstance(error, TaskRevokedError):
            text = error.text if isinstance(error, RemoteError) else str(error)
            return TaskRevokedError(text, task_id=self.task_id)
        return error

    def value(self) -> Any:
        """Return the value of a DONE task; raise the exception of any other final one."""
        if self.status == DONE:
            return self._decoder.decode(self.payload, self.encoding, task_id=self.task_id)
        raise self.exception()

    @property
    def args(self) -> Any:
        """The positional arguments, as far as they were stored."""
        return self._decoder.decode(self._read_more().args, None, task_id=self.task_id, column="args")

    @property
    def kwargs(self) -> Any:
        """The keyword arguments, likewise."""
        return self._decoder.decode(self._read_more().kwargs, None, task_id=self.task_id, column="kwargs")

    def __repr__(self) -> str:
        return f"<TaskMeta {self.task_id} {self.status}>"


class GroupCounts(NamedTuple):
    """
    A stored group's counts, kept by the file.

    Attributes:
        size: Task positions, those of nested groups included.
        done: Of these, DONE.
        failed: FAILURE.
        revoked: REVOKED.
        members: Direct members.
        completed: Direct members that are wholly DONE.
    """

    size: int
    done: int
    failed: int
    revoked: int
    members: int
    completed: int

    @property
    def waiting(self) -> int:
        """Task positions that are not final yet."""
        return self.size - self.done - self.failed - self.revoked


class Waiting(Protocol):
    """An armed watch on a backend; a context manager."""

    def wait(self, timeout: float | None, owners: Collection[str] | None = None) -> bool | None:
        """
        Return when something may have changed, or after *timeout* seconds, or to be asked again.

        Args:
            timeout: In seconds, None for no limit.
            owners: Owners whose death matters to the waiter; None for any.

        Returns:
            False if nothing has changed for certain since the waiter last looked; else it looks, each time.
        """
        ...

    async def wait_async(self, timeout: float | None, owners: Collection[str] | None = None) -> bool | None:
        """Do the same without blocking the running loop."""
        ...

    def fire(self) -> None:
        """Make the wait return now; from any thread."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


@runtime_checkable
class Backend(Protocol):
    """What the result classes ask of a store. `ResultStore` is one; write your own to keep results elsewhere."""

    def get_task_meta(self, task_id: str, number: int | None = None) -> TaskMeta:
        """Return a task's row, PENDING if there is none; *number* is its number at the last look, if there was one."""
        ...

    def get_many(self, task_ids: Sequence[str]) -> list[TaskMeta]:
        """Return the rows of many tasks, in the order asked."""
        ...

    def exists(self, task_id: str) -> bool:
        """Tell whether the task is recorded."""
        ...

    def completion_number(self) -> int:
        """Return the number of the task that was completed last, 0 if none was."""
        ...

    def completed_since(self, number: int) -> tuple[int, list[str]]:
        """Return the ids of tasks completed after *number*, in that order, and the number reached."""
        ...

    def watch(self, task_id: str | None = None) -> Waiting:
        """Return an armed watch: what changes from now on ends its `wait`; of one task only if *task_id* is given."""
        ...

    def forget(self, task_id: str) -> None:
        """Delete a task's row; nothing happens if there is none."""
        ...

    def revoke(self, task_id: str, *, terminate: bool = False, signal: int | str = "SIGTERM") -> bool:
        """Cancel a task that is not final; return whether it was cancelled."""
        ...

    def parent_of(self, task_id: str) -> tuple[str, bool] | None:
        """Return the id of a task's parent and whether that is a group; None if it has no parent."""
        ...

    def children_of(self, task_id: str) -> list[tuple[str, bool]]:
        """Return the ids of what a task submitted, in order, each with whether it is a group."""
        ...

    def save_group(self, group: Any) -> Any:
        """Store a `GroupResult`, its order, nesting and parent; return it."""
        ...

    def restore_group(self, group_id: str) -> Any:
        """Return a stored group as `GroupResult`, or None."""
        ...

    def delete_group(self, group_id: str) -> None:
        """Delete a stored group, not its tasks; nothing happens if there is none."""
        ...

    def group_members(self, group_id: str) -> Iterable[tuple[str, bool]]:
        """Yield the ids of a stored group's members, in order, each with whether it is a group."""
        ...

    def group_values(self, group_id: str) -> list[Any] | None:
        """Return the values of a stored group of tasks all of which are DONE; None if it is not of that kind."""
        ...

    def group_counts(self, group_id: str) -> GroupCounts | None:
        """Return a stored group's counts in one read; None if there is no such group."""
        ...


_default: Backend | None = None
_opener: Callable[[str], Backend] | None = None

ENVIRONMENT_VARIABLE = "LITEERRESULT_DB"


def set_default_backend(backend: Backend | None) -> None:
    """
    Set the backend of results that are made without one; None unsets it.

    Raises:
        TypeError: *backend* is not a `Backend`.
    """
    global _default  # noqa: PLW0603 - a process-wide default is what it is
    if backend is not None and not isinstance(backend, Backend):
        msg = f"a backend is a ResultStore or has its methods; got {type(backend).__name__}"
        raise TypeError(msg)
    _default = backend


def default_backend() -> Backend:
    """
    Return the default backend: the one that was set, else the store that the environment names.

    Raises:
        ImproperlyConfigured: There is neither.
    """
    if _default is not None:
        return _default
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        msg = (
            "no backend: pass backend=store, call set_default_backend(store), "
            f"or set the environment variable {ENVIRONMENT_VARIABLE} to the path of a store"
        )
        raise ImproperlyConfigured(msg)
    if _opener is None:
        msg = f"{ENVIRONMENT_VARIABLE} is set, but nothing is there to open a store with: import liteerresult"
        raise ImproperlyConfigured(msg)
    return _opener(path)


def set_opener(opener: Callable[[str], Backend]) -> None:
    """Say how a store is opened that only the environment names: the layer above tells the one below."""
    global _opener  # noqa: PLW0603
    _opener = opener
