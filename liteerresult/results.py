"""The result of one task: `AsyncResult` and its kin. Knows a `Backend`, and no SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backend import check_id, default_backend
from .errors import DecodeError, IncompleteStream, TaskRevokedError
from .futures import future_of
from .states import DONE, FAILURE, PROPAGATE_STATES, READY_STATES, REVOKED, state_of, status_of
from .waiting import Deadline, drive, drive_async, one

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future
    from datetime import datetime

    from .backend import Backend, TaskMeta

__all__ = ["AsyncResult", "BaseAsyncResult", "EagerResult", "ResultBase", "link_to"]


class ResultBase:
    """
    What all results have in common.

    Source:
        celery.result, ``ResultBase``.
    """

    __slots__ = ("__weakref__",)

    @property
    def parent(self) -> ResultBase | None:
        """The result of the task or group that submitted this one, or None."""
        return None


def link_to(link: tuple[str, bool] | None, backend: Backend) -> ResultBase | None:
    """Return the result that a stored link (id, is a group) leads to."""
    if link is None:
        return None
    task_id, is_group = link
    if is_group:
        group: ResultBase | None = backend.restore_group(task_id)
        return group
    return AsyncResult(task_id, backend)


class BaseAsyncResult(ResultBase):
    """
    A task's result, in a backend of your choice.

    Results are equal if their ids are, also to the id itself, and pickle to id and database path.
    ``await result`` waits for the value like `get`.

    Args:
        task_id: The id of the task, recorded or not.
        backend: The store it is in.
        parent: The result of what submitted it; looked up in the backend if None.

    Raises:
        ValueError: *task_id* is None or empty.
        TypeError: It is not a string.

    Source:
        celery.result, ``BaseAsyncResult``.
    """

    __slots__ = ("_done", "_parent", "backend", "id")

    id: str
    """The task's id."""
    backend: Backend
    """The store the task is in."""

    def __init__(self, task_id: str, backend: Backend, parent: ResultBase | None = None) -> None:
        self.id = check_id(task_id)
        self.backend = backend
        self._parent = parent
        self._done: TaskMeta | None = None

    # Identity

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.id

    @task_id.setter
    def task_id(self, value: str) -> None:
        self.id = check_id(value)
        self._done = None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, BaseAsyncResult):
            return self.id == other.id
        if isinstance(other, str):
            return self.id == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.id, self.backend, self._parent)

    def __copy__(self) -> BaseAsyncResult:
        return type(self)(self.id, self.backend, self._parent)

    # The row

    def _meta(self) -> TaskMeta:
        # Only DONE can't change any more: FAILURE and REVOKED may be resubmitted.
        if self._done is not None:
            return self._done
        meta = self.backend.get_task_meta(self.id)
        if meta.status == DONE:
            self._done = meta
        return meta

    @property
    def status(self) -> str:
        """The status as stored: PENDING, STARTED, RETRY, DONE, FAILURE, REVOKED or a custom state."""
        return self._meta().status

    @property
    def state(self) -> str:
        """The status in Celery 5's word for it: SUCCESS where `status` says DONE."""
        return state_of(self._meta().status)

    @property
    def result(self) -> Any:
        """The return value; the exception if the task failed; a custom state's meta; else None."""
        return self._meta().result

    @property
    def info(self) -> Any:
        """The same as `result`: the name that fits custom states."""
        return self._meta().result

    @property
    def traceback(self) -> str | None:
        """Text of the traceback in the process that failed, or None."""
        return self._meta().traceback

    def ready(self) -> bool:
        """Return True if the task is final: it succeeded, failed or was revoked."""
        return self._meta().status in READY_STATES

    def is_done(self) -> bool:
        """Return True if the task succeeded."""
        return self._meta().status == DONE

    def successful(self) -> bool:
        """Return True if the task succeeded."""
        return self._meta().status == DONE

    def failed(self) -> bool:
        """Return True if the task raised an exception or its worker was lost; a revoked one did not fail."""
        return self._meta().status == FAILURE

    def exists(self) -> bool:
        """Return True if the task is recorded: this tells an unknown id from a pending one."""
        return self.backend.exists(self.id)

    @property
    def name(self) -> str | None:
        """What kind of work it is, as given to create_task."""
        return self._meta().name

    @property
    def args(self) -> Any:
        """The positional arguments, as a tuple; None if they were not stored."""
        return self._meta().args

    @property
    def kwargs(self) -> Any:
        """The keyword arguments, as a dict; None if they were not stored."""
        return self._meta().kwargs

    @property
    def retries(self) -> int:
        """How many attempts were made before the present one."""
        return self._meta().retries

    @property
    def worker(self) -> str | None:
        """The process that ran the task, as ``pid@host``; None if no process of this library did."""
        owner = self._meta().owner
        return owner.rpartition("-")[0] or owner if owner else None

    @property
    def date_done(self) -> datetime | None:
        """When the task became final, in UTC; None before that."""
        done_at = self._meta().done_at
        from datetime import UTC, datetime

        try:
            return None if done_at is None else datetime.fromtimestamp(done_at, UTC)
        except (OverflowError, ValueError, OSError) as exc:
            msg = f"{done_at!r} is no time in Unix seconds"
            raise DecodeError(msg, task_id=self.id, column="done_at") from exc

    # Waiting

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        no_ack: bool | None = None,
        follow_parents: bool = True,
        callback: Callable[[str, Any], object] | None = None,
        on_message: Callable[..., object] | None = None,
        on_interval: Callable[[], object] | None = None,
        disable_sync_subtasks: bool | None = None,
    ) -> Any:
        """
        Block until the task is final and return its value.

        Args:
            timeout: Longest wait in seconds, monotonic clock. None waits without limit; 0 looks once.
            propagate: False returns the exception of a failed task instead of raising it.
            interval: Not needed, since nothing is polled; accepted as Celery's.
            no_ack: Accepted as Celery's.
            follow_parents: Raise the exception of a failed parent first, if the parent was given to the constructor.
            callback: Called with id and value, if there is one.
            on_message: Accepted as Celery's; there are no messages.
            on_interval: Called whenever the wait takes another look.
            disable_sync_subtasks: Accepted as Celery's; waiting inside a task is allowed.

        Returns:
            The value passed to mark_as_done, equal and of the same type.

        Raises:
            TimeoutError: *timeout* passed first; the task is unchanged and can be waited for again.
            WorkerLostError: The process that ran the task died.
            TaskRevokedError: The task was cancelled.
            DecodeError: The stored value can't be read.
            Exception: Whatever the task raised, rebuilt as design.md section 4 says.

        Source:
            celery.result, ``AsyncResult.get``.
        """
        del interval, no_ack, on_message, disable_sync_subtasks
        if follow_parents and propagate and self._parent is not None:
            self._raise_parent_error()
        deadline = Deadline(timeout)
        meta = self._done
        if meta is None:
            meta = drive(self.backend, one(self.backend, self.id, deadline, on_interval), self.id)
        return self._conclude(meta, propagate, callback)

    def wait(self, timeout: float | None = None, **options: Any) -> Any:
        """
        Block until the task is final and return its value: `get` under its first name.

        Args:
            timeout: Longest wait in seconds, monotonic clock. None waits without limit; 0 looks once.
            **options: As for `get`.

        Returns:
            The value passed to mark_as_done, equal and of the same type.

        Raises:
            TimeoutError: *timeout* passed first; the task is unchanged and can be waited for again.
            Exception: Whatever the task raised, as for `get`.

        Source:
            celery.result, ``BaseAsyncResult.wait``.
        """
        return self.get(timeout, **options)

    async def _get_async(self) -> Any:
        meta = self._done
        if meta is None:
            meta = await drive_async(self.backend, one(self.backend, self.id, Deadline(None)), self.id)
        return self._conclude(meta, propagate=True, callback=None)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._get_async().__await__()

    def future(self) -> Future[Any]:
        """
        Return a `concurrent.futures.Future` of the value, for ``wait``, ``as_completed`` and ``asyncio.wrap_future``.

        One thread a process waits for all of them. Cancelling the future does not revoke the task.
        """
        return future_of(self.backend, self.id)

    def _conclude(self, meta: TaskMeta, propagate: bool, callback: Callable[[str, Any], object] | None) -> Any:
        if meta.status == DONE:
            self._done = meta
            value = meta.value()
        else:
            value = meta.exception()
            if propagate:
                raise value
        if callback is not None:
            callback(self.id, value)
        return value

    def maybe_throw(self, propagate: bool = True, callback: Callable[[str, Any], object] | None = None) -> Any:
        """
        Raise the exception of a failed or revoked task; else return `result` as it is now, without waiting.

        Args:
            propagate: False returns the exception instead.
            callback: Called with id and what is returned.

        Source:
            celery.result, ``AsyncResult.maybe_throw``.
        """
        meta = self._meta()
        value = meta.result
        if propagate and meta.status in PROPAGATE_STATES:
            raise value
        if callback is not None:
            callback(self.id, value)
        return value

    maybe_reraise = maybe_throw

    # Changing

    def forget(self) -> None:
        """
        Delete the task from the store; nothing happens if it is not there.

        Its groups keep its id and wait for it anew. A parent given to the constructor is forgotten too.
        """
        self._done = None
        parent = self._parent
        if isinstance(parent, BaseAsyncResult):
            parent.forget()
        self.backend.forget(self.id)

    def revoke(self, terminate: bool = False, signal: int | str = "SIGTERM", **options: Any) -> bool:
        """
        Cancel the task, unless it is final already.

        Args:
            terminate: Also signal the process that runs it, if that is proven to be its owner.
            signal: Which signal, by name or number.
            **options: ``wait``, ``timeout`` and ``connection`` are accepted as Celery's.

        Returns:
            Whether this call cancelled it.
        """
        del options
        return self.backend.revoke(self.id, terminate=terminate, signal=signal)

    # Family

    @property
    def parent(self) -> ResultBase | None:
        """The result of the task or group that submitted this one, or None."""
        if self._parent is None:
            return link_to(self.backend.parent_of(self.id), self.backend)
        return self._parent

    @property
    def children(self) -> list[ResultBase]:
        """What the task submitted, in order: results of tasks, and of groups as a whole."""
        found = (link_to(link, self.backend) for link in self.backend.children_of(self.id))
        return [child for child in found if child is not None]

    def _raise_parent_error(self) -> None:
        chain: list[BaseAsyncResult] = []
        parent = self._parent
        while isinstance(parent, BaseAsyncResult):
            chain.append(parent)
            parent = parent._parent
        for result in reversed(chain):
            result.maybe_throw()

    def iterdeps(self, intermediate: bool = False) -> Iterator[tuple[ResultBase | None, ResultBase]]:
        """
        Yield (parent, result) for this result and all below it, breadth first.

        Args:
            intermediate: Go on past what is not ready.

        Raises:
            IncompleteStream: Something is not ready, so there may be more below it.

        Source:
            celery.result, ``AsyncResult.iterdeps``.
        """
        queue: list[tuple[ResultBase | None, ResultBase]] = [(None, self)]
        for parent, node in queue:  # grows as we go
            yield parent, node
            if node.ready():  # type: ignore[attr-defined]
                queue.extend((node, child) for child in node.children or ())  # type: ignore[attr-defined]
            elif not intermediate:
                msg = f"{node} is not ready: what it will submit is not known yet"
                raise IncompleteStream(msg)

    def collect(self, intermediate: bool = False, **options: Any) -> Iterator[tuple[ResultBase, Any]]:
        """
        Yield (result, value) for this result and all below it, waiting for each.

        Args:
            intermediate: As for `iterdeps`.
            **options: As for `get`.

        Source:
            celery.result, ``AsyncResult.collect``.
        """
        for _, node in self.iterdeps(intermediate=intermediate):
            yield node, node.get(**options)  # type: ignore[attr-defined]

    def get_leaf(self) -> Any:
        """Return the value at the end of the tree: the last that `collect` yields."""
        value = None
        for _, value in self.collect():  # noqa: B007
            pass
        return value

    @property
    def graph(self) -> dict[ResultBase, list[ResultBase]]:
        """
        For this result and all below it, the results right below each.

        Raises:
            IncompleteStream: One of them is not ready, so there may be more below it.
        """
        edges: dict[ResultBase, list[ResultBase]] = {}
        for parent, node in self.iterdeps():
            edges.setdefault(node, [])
            if parent is not None:
                edges[parent].append(node)
        return edges

    def as_tuple(self) -> tuple[Any, ...]:
        """Return ``((id, parent's tuple or None), None)``: see `result_from_tuple`."""
        parent = self.parent
        return (self.id, parent.as_tuple() if parent is not None else None), None  # type: ignore[attr-defined]

    def as_list(self) -> list[str]:
        """Return the ids of this result and of all above it, upwards."""
        parent = self.parent
        above = parent.as_list() if isinstance(parent, BaseAsyncResult) else [parent.id] if parent is not None else []  # type: ignore[attr-defined]
        return [self.id, *above]


class AsyncResult(BaseAsyncResult):
    """
    A task's result.

    Args:
        task_id: The id of the task, recorded or not.
        backend: The store it is in; the default backend if None.
        parent: The result of what submitted it; looked up in the backend if None.

    Raises:
        ImproperlyConfigured: There is no default backend.
        ValueError: *task_id* is None or empty.
        TypeError: It is not a string.

    Source:
        celery.result, ``AsyncResult``.
    """

    __slots__ = ()

    def __init__(self, task_id: str, backend: Backend | None = None, parent: ResultBase | None = None) -> None:
        super().__init__(task_id, default_backend() if backend is None else backend, parent)


class EagerResult(AsyncResult):
    """
    The result of a task that was run on the spot: always ready, in no store.

    Args:
        task_id: An id.
        ret_value: The return value, or the exception.
        state: SUCCESS (or DONE), FAILURE, REVOKED, RETRY or another state.
        traceback: Text of the traceback, or None.
        name: What kind of work it was.

    Source:
        celery.result, ``EagerResult``.
    """

    __slots__ = ("_eager_name", "_result", "_status", "_traceback")

    def __init__(
        self, task_id: str, ret_value: Any, state: str, traceback: str | None = None, name: str | None = None
    ) -> None:
        self.id = check_id(task_id)
        self.backend = None  # type: ignore[assignment]  # it is in no store
        self._parent = None
        self._done = None
        self._result = ret_value
        self._status = status_of(state)
        self._traceback = traceback
        self._eager_name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.id, self._result, self._status, self._traceback, self._eager_name)

    def __copy__(self) -> EagerResult:
        return type(self)(self.id, self._result, self._status, self._traceback, self._eager_name)

    def __repr__(self) -> str:
        return f"<EagerResult: {self.id}>"

    @property
    def status(self) -> str:
        """The status, DONE for a success."""
        return self._status

    @property
    def state(self) -> str:
        """The status in Celery 5's word for it."""
        return state_of(self._status)

    @property
    def result(self) -> Any:
        """The return value or the exception."""
        return self._result

    info = result

    @property
    def traceback(self) -> str | None:
        """Text of the traceback, or None."""
        return self._traceback

    @property
    def name(self) -> str | None:
        """What kind of work it was."""
        return self._eager_name

    def ready(self) -> bool:
        """Return True: it was run on the spot."""
        return True

    def is_done(self) -> bool:
        """Return True if the task succeeded."""
        return self._status == DONE

    def successful(self) -> bool:
        """Return True if the task succeeded."""
        return self._status == DONE

    def failed(self) -> bool:
        """Return True if the task raised an exception."""
        return self._status == FAILURE

    def exists(self) -> bool:
        """Return True: it is here, though in no store."""
        return True

    def _exception(self) -> BaseException:
        return self._result if isinstance(self._result, BaseException) else Exception(self._result)

    def get(self, timeout: float | None = None, propagate: bool = True, *args: Any, **options: Any) -> Any:
        """
        Return the value at once.

        Args:
            timeout: Ignored: there is nothing to wait for.
            propagate: False returns the exception of a failure instead of raising it.
            *args: Ignored, like *options*.
            **options: As for `AsyncResult.get`.

        Raises:
            Exception: What the task raised.
        """
        del timeout, args, options
        if self._status == DONE:
            return self._result
        if self._status in PROPAGATE_STATES:
            if propagate:
                raise self._exception()
            return self._result
        return None

    async def _get_async(self) -> Any:
        return self.get()

    def future(self) -> Future[Any]:
        """Return a finished `concurrent.futures.Future`."""
        from concurrent.futures import Future

        future: Future[Any] = Future()
        if self._status in PROPAGATE_STATES:
            future.set_exception(self._exception())
        else:
            future.set_result(self.get())
        return future

    def maybe_throw(self, propagate: bool = True, callback: Callable[[str, Any], object] | None = None) -> Any:
        """Raise the exception of a failure; else return the result."""
        if propagate and self._status in PROPAGATE_STATES:
            raise self._exception()
        if callback is not None:
            callback(self.id, self._result)
        return self._result

    maybe_reraise = maybe_throw

    def forget(self) -> None:
        """Do nothing: it is in no store."""

    def revoke(self, terminate: bool = False, signal: int | str = "SIGTERM", **options: Any) -> bool:
        """Turn it into a revoked result."""
        del terminate, signal, options
        self._status = REVOKED
        self._result = TaskRevokedError(f"task {self.id!r} was revoked", task_id=self.id)
        return True

    @property
    def parent(self) -> ResultBase | None:
        """None: it is in no store."""
        return None

    @property
    def children(self) -> list[ResultBase]:
        """Empty: it is in no store."""
        return []

    @property
    def args(self) -> Any:
        """None: not kept."""
        return None

    kwargs = args

    @property
    def retries(self) -> int:
        """0: not kept."""
        return 0

    @property
    def worker(self) -> str | None:
        """None: not kept."""
        return None

    @property
    def date_done(self) -> datetime | None:
        """None: not kept."""
        return None
