"""Results of many tasks: `ResultSet`, `GroupResult` and the first release's `TaskSetResult`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .backend import TaskMeta, check_id, default_backend
from .clock import uuid7
from .results import AsyncResult, BaseAsyncResult, EagerResult, ResultBase, link_to
from .states import DONE, PROPAGATE_STATES
from .waiting import Deadline, Park, Stream, arrivals, drive, drive_async, parked

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from .backend import Backend, GroupCounts

__all__ = ["GroupResult", "ResultSet", "TaskSetResult", "result_from_tuple"]


class _Completed(NamedTuple):
    """A member all of whose tasks are final, and the rows that its value needs."""

    member: Any
    rows: dict[str, TaskMeta]


class ResultSet(ResultBase):
    """
    Results in an order of your choice, waited for together. ``await`` it for the list of values.

    Args:
        results: Results of tasks, groups, or ids of tasks. A list is kept as it is, not copied.
        backend: The store of those that are given as ids; the default backend if None.
        **options: ``app`` and ``ready_barrier`` are accepted as Celery's.

    Raises:
        TypeError: A member is neither a result nor an id.

    Source:
        celery.result, ``ResultSet``.
    """

    __slots__ = ("_given_backend", "_results")

    def __init__(self, results: Iterable[ResultBase | str], backend: Backend | None = None, **options: Any) -> None:
        unknown = options.keys() - {"app", "ready_barrier"}
        if unknown:
            msg = f"{type(self).__name__} got an unexpected keyword argument {min(unknown)!r}"
            raise TypeError(msg)
        app = options.get("app")
        self._given_backend: Backend | None = backend if backend is not None else getattr(app, "backend", None)
        if isinstance(results, str):
            msg = f"the members are an iterable of results or task ids, not the text {results!r}"
            raise TypeError(msg)
        whole = isinstance(results, list) and all(isinstance(member, ResultBase) for member in results)
        self._results: list[Any] = results if whole else [self._result(member) for member in results]  # type: ignore[assignment]

    def _result(self, member: ResultBase | str) -> ResultBase:
        if isinstance(member, ResultBase):
            return member
        if not isinstance(member, str):
            msg = f"a member is a result or a task id, not {type(member).__name__}"
            raise TypeError(msg)
        return AsyncResult(member, self._given_backend)

    # Members

    @property
    def results(self) -> list[Any]:
        """The members, in order; the list itself."""
        return self._results

    @property
    def backend(self) -> Backend | None:
        """The store of the members; None if there is none (an empty set, or eager results only)."""
        if self._given_backend is not None:
            return self._given_backend
        for member in self.results:
            if not isinstance(member, EagerResult):
                backend: Backend | None = member.backend
                if backend is not None:
                    return backend
        return None

    def add(self, result: ResultBase | str) -> None:
        """Add a member at the end, unless it is one already."""
        member = self._result(result)
        if member not in self.results:
            self.results.append(member)

    def remove(self, result: ResultBase | str) -> None:
        """
        Remove a member, given as result or id.

        Raises:
            KeyError: It is not a member.
        """
        try:
            self.results.remove(result)
        except ValueError:
            raise KeyError(result) from None

    def discard(self, result: ResultBase | str) -> None:
        """Remove a member if it is one."""
        if result in self.results:
            self.results.remove(result)

    def update(self, results: Iterable[ResultBase | str]) -> None:
        """Add those that are not members yet."""
        known = set(self.results)
        for result in results:
            member = self._result(result)
            if member not in known:
                known.add(member)
                self.results.append(member)

    def clear(self) -> None:
        """Remove all members; they stay in the store."""
        self.results.clear()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __contains__(self, item: object) -> bool:
        return item in self.results

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ResultSet):
            return self.results == other.results
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # members change

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: [{', '.join(str(member) for member in self.results)}]>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.results, self._given_backend)

    # Counting

    def _counts(self) -> GroupCounts | None:
        """Return the stored counts, if this is a stored group as it was stored."""
        return None

    def _statuses(self) -> Iterator[list[str]]:
        """Yield, for each member, the statuses of the tasks in it."""
        rows = _read(self)
        for member in self.results:
            yield [_status(leaf, rows) for leaf in _leaves(member)]

    def ready(self) -> bool:
        """Return True if all members are final."""
        counts = self._counts()
        if counts is not None:
            return counts.waiting == 0
        return not self.waiting()

    def waiting(self) -> bool:
        """Return True if any member is not final yet."""
        counts = self._counts()
        if counts is not None:
            return counts.waiting > 0
        return any(
            status not in PROPAGATE_STATES and status != DONE for member in self._statuses() for status in member
        )

    def successful(self) -> bool:
        """Return True if all members succeeded."""
        counts = self._counts()
        if counts is not None:
            return counts.done == counts.size
        return all(status == DONE for member in self._statuses() for status in member)

    def failed(self) -> bool:
        """Return True if any member failed; a revoked one did not fail."""
        counts = self._counts()
        if counts is not None:
            return counts.failed > 0
        return any(status == "FAILURE" for member in self._statuses() for status in member)

    def completed_count(self) -> int:
        """Return how many members succeeded; a nested group counts as one, once all of it has."""
        counts = self._counts()
        if counts is not None:
            return counts.completed
        return sum(all(status == DONE for status in member) for member in self._statuses())

    # Waiting

    def iterate(self, timeout: float | None = None, propagate: bool = True) -> Stream:
        """
        Yield values in order of completion, as tasks finish; ``async for`` works too.

        A member that stands twice is yielded twice; a nested group yields its list of values once all
        of it is final.

        Args:
            timeout: Longest time for the whole iteration, in seconds. None: no limit. 0: what is there now.
            propagate: False yields the exception of a failed task instead of raising it.

        Raises:
            TimeoutError: *timeout* passed; iterate again for the rest.
            Exception: What the first failed task raised.

        Source:
            celery.result, ``TaskSetResult.iterate``.
        """
        return Stream(self._waiting_backend(), self._iterate(Deadline(timeout), propagate))

    def iter_native(self, timeout: float | None = None, **options: Any) -> Stream:
        """
        Yield (id, row) in order of completion; a nested group yields (id, its results).

        Args:
            timeout: As for `iterate`.
            **options: ``no_ack``, ``on_message``, ``on_interval`` are accepted as Celery's.

        Source:
            celery.result, ``ResultSet.iter_native``.
        """
        del options
        return Stream(self._waiting_backend(), self._iter_native(Deadline(timeout)))

    def join(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        callback: Callable[[str, Any], object] | None = None,
        no_ack: bool | None = None,
        on_message: Callable[..., object] | None = None,
        disable_sync_subtasks: bool | None = None,
        on_interval: Callable[[], object] | None = None,
    ) -> list[Any]:
        """
        Wait for all members and return their values in call order.

        Args:
            timeout: Longest wait for the whole join, nested groups included, in seconds. None: no limit. 0: look once.
            propagate: False puts the exception of a failed task in its place, in nested groups too.
            interval: Not needed, since nothing is polled; accepted as Celery's.
            callback: Called with id and value for each member in order; the list returned is then empty.
            no_ack: Accepted as Celery's.
            on_message: Accepted as Celery's; there are no messages.
            disable_sync_subtasks: Accepted as Celery's; waiting inside a task is allowed.
            on_interval: Called whenever the wait takes another look.

        Raises:
            TimeoutError: *timeout* passed first; nothing is lost, join again.
            Exception: What a member's task raised, as soon as any has failed.

        Source:
            celery.result, ``TaskSetResult.join``.
        """
        del interval, no_ack, on_message, disable_sync_subtasks
        steps = self._join(Deadline(timeout), propagate, callback, on_interval)
        backend = self._waiting_backend()
        if backend is None:
            return _run_through(steps)
        return drive(backend, steps)

    def join_native(self, timeout: float | None = None, propagate: bool = True, **options: Any) -> list[Any]:
        """Wait for all members: `join` under Celery's other name."""
        return self.join(timeout, propagate, **options)

    def get(self, timeout: float | None = None, propagate: bool = True, **options: Any) -> list[Any]:
        """Wait for all members: `join`, as a result of a task has it."""
        return self.join(timeout, propagate, **options)

    async def _join_async(self) -> list[Any]:
        steps = self._join(Deadline(None), propagate=True, callback=None, on_interval=None)
        backend = self._waiting_backend()
        if backend is None:
            return _run_through(steps)
        return await drive_async(backend, steps)

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self._join_async().__await__()

    def maybe_throw(self, callback: Callable[[str, Any], object] | None = None, propagate: bool = True) -> None:
        """Raise the exception of the first member, in order, that failed; do nothing if none has so far."""
        for member in self.results:
            member.maybe_throw(callback=callback, propagate=propagate)

    maybe_reraise = maybe_throw

    def forget(self) -> None:
        """Delete the tasks of all members from the store; a saved group itself stays."""
        for member in self.results:
            member.forget()

    def revoke(self, terminate: bool = False, signal: int | str = "SIGTERM", **options: Any) -> bool:
        """
        Cancel all members that are not final.

        Args:
            terminate: Also signal the processes that run them, as for `AsyncResult.revoke`.
            signal: Which signal, by name or number.
            **options: As for `AsyncResult.revoke`.

        Returns:
            Whether any was cancelled by this call.
        """
        revoked = [member.revoke(terminate=terminate, signal=signal, **options) for member in self.results]
        return any(revoked)

    # How

    def _waiting_backend(self) -> Backend | None:
        backends = {id(leaf.backend): leaf.backend for leaf in _leaves(self) if not isinstance(leaf, EagerResult)}
        if len(backends) > 1 and len({getattr(backend, "path", backend) for backend in backends.values()}) > 1:
            msg = "the members are in several stores: join those of each store on their own"
            raise ValueError(msg)
        return next(iter(backends.values()), None)

    def _arrivals(
        self, deadline: Deadline, on_interval: Callable[[], object] | None = None
    ) -> Generator[Park | TaskMeta, None, None]:
        backend = self._waiting_backend()
        if backend is not None:
            ids = list(dict.fromkeys(leaf.id for leaf in _leaves(self) if not isinstance(leaf, EagerResult)))
            yield from arrivals(backend, ids, deadline, on_interval)

    def _join(
        self,
        deadline: Deadline,
        propagate: bool,
        callback: Callable[[str, Any], object] | None,
        on_interval: Callable[[], object] | None,
    ) -> Generator[Park, None, list[Any]]:
        if propagate:
            for leaf in _leaves(self):
                if isinstance(leaf, EagerResult):
                    leaf.maybe_throw()
        rows: dict[str, TaskMeta] = {}
        for item in self._arrivals(deadline, on_interval):
            if isinstance(item, Park):
                yield item
            elif propagate and item.status in PROPAGATE_STATES:
                raise item.exception()
            else:
                rows[item.task_id] = item
        values = [_value(member, rows, propagate) for member in self.results]
        if callback is None:
            return values
        for member, value in zip(self.results, values, strict=True):
            callback(member.id, value)
        return []

    def _completions(self, deadline: Deadline) -> Generator[Park | _Completed, None, None]:
        """Yield each member, with the rows that its value needs, when the last of its tasks is final."""
        members: dict[str, list[int]] = {}
        missing: list[int] = []
        rows: dict[str, TaskMeta] = {}
        for position, member in enumerate(self.results):
            ids = {leaf.id for leaf in _leaves(member) if not isinstance(leaf, EagerResult)}
            missing.append(len(ids))
            for task_id in ids:
                members.setdefault(task_id, []).append(position)
            if not ids:
                yield _Completed(member, rows)
        for item in self._arrivals(deadline):
            if isinstance(item, Park):
                yield item
                continue
            positions = members.pop(item.task_id)
            rows[item.task_id] = item
            for position in positions:
                missing[position] -= 1
                if not missing[position]:
                    yield _Completed(self.results[position], rows)
            if all(isinstance(self.results[position], BaseAsyncResult) for position in positions):
                del rows[item.task_id]  # no nested group will ask for it

    def _iterate(self, deadline: Deadline, propagate: bool) -> Generator[Any, None, None]:
        for item in self._completions(deadline):
            yield item if isinstance(item, Park) else _value(item.member, item.rows, propagate)

    def _iter_native(self, deadline: Deadline) -> Generator[Any, None, None]:
        for item in self._completions(deadline):
            if isinstance(item, Park):
                yield item
                continue
            member = item.member
            if isinstance(member, ResultSet):
                yield getattr(member, "id", None), list(member.results)
            else:
                yield member.id, item.rows.get(member.id)


def _leaves(member: Any) -> Iterator[Any]:
    """Yield the task results in a member, through nested groups."""
    if isinstance(member, ResultSet):
        for inner in member.results:
            yield from _leaves(inner)
    else:
        yield member


def _read(member: ResultSet) -> dict[str, TaskMeta]:
    """Read the rows of all tasks in *member* at once."""
    backend = member._waiting_backend()
    if backend is None:
        return {}
    ids = list(dict.fromkeys(leaf.id for leaf in _leaves(member) if not isinstance(leaf, EagerResult)))
    return {meta.task_id: meta for meta in backend.get_many(ids)}


def _status(leaf: Any, rows: dict[str, TaskMeta]) -> str:
    return leaf.status if isinstance(leaf, EagerResult) else rows[leaf.id].status


def _value(member: Any, rows: dict[str, TaskMeta], propagate: bool) -> Any:
    if isinstance(member, ResultSet):
        return [_value(inner, rows, propagate) for inner in member.results]
    if isinstance(member, EagerResult):
        return member.get(propagate=propagate)
    meta = rows[member.id]
    if meta.status == DONE:
        return meta.value()
    if propagate:
        raise meta.exception()
    return meta.exception()


def _run_through(steps: Generator[Park, None, list[Any]]) -> list[Any]:
    """Run steps that have nothing to wait for."""
    try:
        next(steps)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    msg = "a set of eager results waits for nothing"
    raise AssertionError(msg)


class GroupResult(ResultSet):
    """
    A result set with an id, so that it can be stored, found again and counted by the file.

    Args:
        id: The group's id; a new one if None.
        results: Results of tasks or groups, or ids of tasks. A list is kept as it is.
        parent: The result of what submitted it.
        **options: As for `ResultSet`.

    Source:
        celery.result, ``GroupResult``.
    """

    __slots__ = ("_lazy", "_parent", "_parent_known", "_stored_size", "id")

    id: str
    """The group's id."""

    def __init__(
        self,
        id: str | None = None,  # noqa: A002 - Celery's name
        results: Iterable[ResultBase | str] | None = None,
        parent: ResultBase | None = None,
        **options: Any,
    ) -> None:
        super().__init__([] if results is None else results, **options)
        self.id = uuid7() if id is None else check_id(id, "group id")
        self._parent = parent
        self._parent_known = True
        self._lazy = False
        self._stored_size: int | None = None

    @classmethod
    def stored(cls, group_id: str, backend: Backend) -> GroupResult:
        """Return a group that is known to be stored, its members read when they are asked for."""
        group = cls(group_id, [], backend=backend)
        group._lazy = True
        group._parent_known = False
        return group

    def look_up_parent(self) -> None:
        """Take the parent from the store from now on."""
        self._parent_known = False

    def mark_as_stored(self) -> None:
        """Note that the store has these members: from now on it answers for their counts."""
        self._stored_size = len(self.results)

    # Members

    @property
    def results(self) -> list[Any]:
        """The members, in order; the list itself."""
        self._load()
        return self._results

    def _load(self) -> None:
        """Read the members of a group that was restored, and those of its nested groups."""
        if self._lazy:
            backend = self._given_backend
            assert backend is not None  # noqa: S101 - stored() gives one
            self._results.extend(
                GroupResult.stored(member, backend) if is_group else AsyncResult(member, backend)
                for member, is_group in backend.group_members(self.id)
            )
            self._lazy = False
            self._stored_size = len(self._results)
            for member in self._results:
                if isinstance(member, GroupResult):
                    member._load()

    @property
    def children(self) -> list[Any]:
        """The members: `results`."""
        return self.results

    def add(self, result: ResultBase | str) -> None:
        """Add a member at the end, unless it is one already. `save` again to store it."""
        super().add(result)
        self._changed()

    def remove(self, result: ResultBase | str) -> None:
        """
        Remove a member. `save` again to store that.

        Raises:
            KeyError: It is not a member.
        """
        super().remove(result)
        self._changed()

    def discard(self, result: ResultBase | str) -> None:
        """Remove a member if it is one. `save` again to store that."""
        super().discard(result)
        self._changed()

    def update(self, results: Iterable[ResultBase | str]) -> None:
        """Add those that are not members yet. `save` again to store them."""
        super().update(results)
        self._changed()

    def clear(self) -> None:
        """Remove all members; they stay in the store. `save` again to store that."""
        super().clear()
        self._changed()

    def _changed(self) -> None:
        self._stored_size = None

    def is_as_stored(self) -> bool:
        """Tell whether the members are those that the store has, as far as this object knows."""
        return self._lazy or self._stored_size == len(self._results)

    def _counts(self) -> GroupCounts | None:
        backend = self.backend if self.is_as_stored() else None
        return None if backend is None else backend.group_counts(self.id)

    def _waiting_backend(self) -> Backend | None:
        return self.backend if self.is_as_stored() else super()._waiting_backend()

    def _join(
        self,
        deadline: Deadline,
        propagate: bool,
        callback: Callable[[str, Any], object] | None,
        on_interval: Callable[[], object] | None,
    ) -> Generator[Park, None, list[Any]]:
        # The file counts for a stored group: until it is done there is one number to look at.
        while (counts := self._counts()) is not None:
            left = deadline.remaining()
            if counts.waiting == 0 or left == 0.0 or (propagate and counts.failed + counts.revoked):
                break
            yield from parked(deadline, None, on_interval)
        if counts is not None and callback is None and counts.done == counts.size == counts.members:
            backend = self.backend
            values = None if backend is None else backend.group_values(self.id)
            if values is not None and len(values) == counts.size:
                return values
        return (yield from super()._join(deadline, propagate, callback, on_interval))

    # Storing

    def save(self, backend: Backend | None = None) -> GroupResult:
        """
        Store the group: its order, nesting and parent. Saving again stores what has changed.

        Args:
            backend: Where to; the members' own store if None.

        Returns:
            The group.

        Source:
            celery.result, ``GroupResult.save``.
        """
        (backend or self.backend or default_backend()).save_group(self)
        return self

    def delete(self, backend: Backend | None = None) -> None:
        """Delete the stored group; its tasks stay, and so do this object's members. It may not be stored at all."""
        self._load()
        (backend or self.backend or default_backend()).delete_group(self.id)
        self._changed()

    @classmethod
    def restore(cls, id: str, backend: Backend | None = None, app: Any = None) -> GroupResult | None:  # noqa: A002
        """
        Return a stored group with its order, nesting and parent; None if there is none of that id.

        Args:
            id: The group's id.
            backend: Where it is; if None, ``app.backend``, else the default backend.
            app: Anything with a ``backend``.

        Source:
            celery.result, ``GroupResult.restore``.
        """
        check_id(id, "group id")
        if backend is None:
            backend = getattr(app, "backend", None) or default_backend()
        group = backend.restore_group(id)
        if group is None or isinstance(group, cls):
            return group
        return cls.stored(id, backend)

    @property
    def parent(self) -> ResultBase | None:
        """The result of the task or group that submitted this one, or None."""
        if not self._parent_known:
            backend = self._given_backend
            self._parent = link_to(backend.parent_of(self.id), backend) if backend is not None else None
            self._parent_known = True
        return self._parent

    @parent.setter
    def parent(self, value: ResultBase | None) -> None:
        self._parent, self._parent_known = value, True

    def as_tuple(self) -> tuple[Any, ...]:
        """Return ``((id, parent's tuple or None), [members' tuples])``: see `result_from_tuple`."""
        parent = self.parent
        return (
            (self.id, parent.as_tuple() if parent is not None else None),  # type: ignore[attr-defined]
            [member.as_tuple() for member in self.results],
        )

    # Identity

    def __bool__(self) -> bool:
        return True  # it has an id, whether or not it has members

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GroupResult):
            return self.id == other.id
        if isinstance(other, str):
            return self.id == other
        return super().__eq__(other)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        members = "…" if self._lazy else ", ".join(str(member) for member in self._results)
        return f"<{type(self).__name__}: {self.id} [{members}]>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._lazy or (self._stored_size is not None and self._stored_size == len(self._results)):
            return _restored, (type(self), self.id, self.backend)
        return _rebuilt, (type(self), self.id, self._results, self._parent, self._given_backend)


def _restored(cls: type[GroupResult], group_id: str, backend: Backend) -> GroupResult:
    return cls.stored(group_id, backend)


def _rebuilt(
    cls: type[GroupResult], group_id: str, results: list[Any], parent: ResultBase | None, backend: Backend | None
) -> GroupResult:
    group = cls.__new__(cls)
    GroupResult.__init__(group, group_id, results, parent, backend=backend)
    return group


class TaskSetResult(GroupResult):
    """
    A group under its first name.

    Args:
        taskset_id: The group's id.
        subtasks: Results of tasks, or ids of tasks.
        backend: The store of those that are given as ids; the default backend if None.
        **options: As for `GroupResult`.

    Source:
        celery.result, ``TaskSetResult``.
    """

    __slots__ = ()

    def __init__(
        self, taskset_id: str, subtasks: Iterable[ResultBase | str], backend: Backend | None = None, **options: Any
    ) -> None:
        super().__init__(check_id(taskset_id, "taskset id"), subtasks, backend=backend, **options)

    @property
    def taskset_id(self) -> str:
        """The group's id."""
        return self.id

    @property
    def subtasks(self) -> list[Any]:
        """The members: `results`."""
        return self.results

    @property
    def subtask_ids(self) -> list[str]:
        """The ids of the members."""
        return [member.id for member in self.results]

    def itersubtasks(self) -> Iterator[Any]:
        """Return an iterator over the members."""
        return iter(self.results)

    @property
    def total(self) -> int:
        """How many members there are."""
        return len(self.results)


def result_from_tuple(r: Any, backend: Backend | None = None, app: Any = None) -> Any:
    """
    Rebuild a result from what ``as_tuple()`` gave; lists instead of tuples, as JSON makes of them, will do.

    Args:
        r: ``((id, parent), None)`` or ``(id, None)`` for a task, ``((id, parent), [members])`` for a group; or a
            result, which is returned.
        backend: The store; ``app.backend`` or the default backend if None.
        app: Anything with a ``backend``.

    Raises:
        ValueError: It is of no such form.

    Source:
        celery.result, ``result_from_tuple``.
    """
    if isinstance(r, ResultBase):
        return r
    if backend is None:
        backend = getattr(app, "backend", None)
    try:
        if isinstance(r, str):
            raise TypeError  # noqa: TRY301 - two letters would unpack
        head, nodes = r
        group_or_task_id, parent = (head, None) if isinstance(head, str) else head
    except (TypeError, ValueError):
        msg = f"a result's tuple is ((id, parent), members or None), not {r!r}"
        raise ValueError(msg) from None
    if parent is not None:
        parent = result_from_tuple(parent, backend)
    if nodes is None:
        return AsyncResult(group_or_task_id, backend, parent)
    return GroupResult(group_or_task_id, [result_from_tuple(node, backend) for node in nodes], parent, backend=backend)
