"""
Waiting, written once for threads and for asyncio.

What a wait does is a generator that yields `Park` where it has to wait for a change; `drive` and
`drive_async` park a thread or a coroutine there. The order that makes it safe (arm the watch, read,
wait, read again) is theirs: the first `Park` is answered by arming, not by waiting.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import TimeoutError  # noqa: A004 - also the builtin one

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Sequence

    from .backend import Backend, TaskMeta, Waiting

__all__ = ["Deadline", "Park", "Stream", "arrivals", "drive", "drive_async", "one", "parked"]

READ_AT_ONCE = 1000
"""Rows read by one query."""

NAMED_AT_MOST = 10
"""Ids that a TimeoutError names."""

_T = TypeVar("_T")


class Park:
    """
    Wait here for a change.

    Attributes:
        timeout: Longest wait in seconds; None for no limit.
        owners: Owners whose death matters; None for any.
        in_vain: Set by whoever waited: nothing has changed, so there is no need to look.
    """

    __slots__ = ("in_vain", "owners", "timeout")

    def __init__(self, timeout: float | None, owners: Collection[str] | None = None) -> None:
        self.timeout = timeout
        self.owners = owners
        self.in_vain = False


class Deadline:
    """
    One limit for a whole wait, nested groups included.

    Args:
        timeout: Seconds from now, on the monotonic clock. None: no limit. 0 or less: look once.

    Raises:
        TypeError: *timeout* is not a number.
        ValueError: It is not a number of seconds (nan).
    """

    __slots__ = ("at", "timeout")

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.at: float | None = None
        if timeout is not None:
            if isinstance(timeout, bool) or not isinstance(timeout, int | float):
                msg = f"a timeout is a number of seconds or None, not {type(timeout).__name__}"
                raise TypeError(msg)
            if math.isnan(timeout):
                msg = "a timeout is a number of seconds, not nan"
                raise ValueError(msg)
            if timeout != math.inf:
                self.at = time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Return the seconds left, 0 once it passed; None if there is no limit."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def check(self, waiting_for: Collection[str], total: int = 1) -> float | None:
        """Return `remaining`; raise TimeoutError if nothing is left."""
        left = self.remaining()
        if left == 0.0:
            some = tuple(itertools.islice(waiting_for, NAMED_AT_MOST))
            names = ", ".join(some) + (", …" if len(waiting_for) > NAMED_AT_MOST else "")
            msg = f"not ready after {self.timeout} s: {len(waiting_for)} of {total} to wait for ({names})"
            raise TimeoutError(msg, timeout=self.timeout, waiting_for=some)
        return left


def parked(
    deadline: Deadline, owners: Collection[str] | None, on_interval: Callable[[], object] | None
) -> Generator[Park, None, None]:
    """Park until there may be something new to see, or the time is up."""
    while (left := deadline.remaining()) != 0.0:
        # A new one each time: whoever breaks off a wait has not answered, and then the next step is to look.
        park = Park(left, owners)
        yield park
        if on_interval is not None:
            on_interval()
        if not park.in_vain:
            return


def one(
    backend: Backend, task_id: str, deadline: Deadline, on_interval: Callable[[], object] | None = None
) -> Generator[Park, None, TaskMeta]:
    """Return a task's row once it is final."""
    number: int | None = None
    while True:
        meta = backend.get_task_meta(task_id) if number is None else backend.get_task_meta(task_id, number)
        number = meta.number
        if meta.ready:
            return meta
        deadline.check([task_id])
        yield from parked(deadline, (meta.owner,) if meta.owner else (), on_interval)


def arrivals(
    backend: Backend, task_ids: Sequence[str], deadline: Deadline, on_interval: Callable[[], object] | None = None
) -> Generator[Park | TaskMeta, None, None]:
    """
    Yield the rows of distinct tasks in order of completion.

    Members are read once; from then on only what was completed since is looked at, so a result's
    cost does not grow with the group.
    """
    pending = dict.fromkeys(task_ids)
    total = len(pending)
    number = backend.completion_number()  # before the look at the members, or one could fall between
    finished = [
        meta
        for start in range(0, total, READ_AT_ONCE)
        for meta in backend.get_many(task_ids[start : start + READ_AT_ONCE])
        # What is completed between two of these reads comes later, in its order.
        if meta.ready and (meta.done_number or 0) <= number
    ]
    finished.sort(key=lambda meta: meta.done_number or 0)
    for meta in finished:
        del pending[meta.task_id]
        yield meta
    del finished
    while pending:
        number, completed = backend.completed_since(number)
        hits = [task_id for task_id in completed if task_id in pending]
        for meta in backend.get_many(hits) if hits else ():
            if meta.ready:  # else it was resubmitted meanwhile
                del pending[meta.task_id]
                yield meta
        if not pending:
            return
        deadline.check(pending, total)
        if not completed:
            yield from parked(deadline, None, on_interval)


def drive(backend: Backend, steps: Generator[Park, None, _T], task_id: str | None = None) -> _T:
    """Run *steps* to their end, parking this thread; *task_id* if all they wait for is one task."""
    try:
        next(steps)
        with backend.watch(task_id) as watch:
            while True:
                park = next(steps)
                park.in_vain = watch.wait(park.timeout, park.owners) is False
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        steps.close()


async def drive_async(backend: Backend, steps: Generator[Park, None, _T], task_id: str | None = None) -> _T:
    """Run *steps* to their end, parking this coroutine; *task_id* as in `drive`."""
    try:
        next(steps)
        with backend.watch(task_id) as watch:
            while True:
                park = next(steps)
                park.in_vain = await watch.wait_async(park.timeout, park.owners) is False
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        steps.close()


class Stream:
    """
    Values as they come: ``for value in stream`` or ``async for value in stream``.

    Made by ``iterate()``. Ends with the last value; raises what a value's task raised.
    """

    def __init__(self, backend: Backend | None, steps: Generator[Any, None, None]) -> None:
        self._backend = backend
        self._steps = steps
        self._watch: Waiting | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            item = self._step()
            if type(item) is not Park:
                return item
            if self._armed():
                item.in_vain = self._watch.wait(item.timeout, item.owners) is False  # type: ignore[union-attr]

    async def __anext__(self) -> Any:
        while True:
            try:
                item = self._step()
            except StopIteration:
                raise StopAsyncIteration from None
            if type(item) is not Park:
                return item
            if self._armed():
                item.in_vain = await self._watch.wait_async(item.timeout, item.owners) is False  # type: ignore[union-attr]

    def _step(self) -> Any:
        try:
            return next(self._steps)
        except BaseException:
            self.close()
            raise

    def _armed(self) -> bool:
        """Arm at the first call, which asks for another look instead of a wait."""
        if self._watch is not None:
            return True
        if self._backend is not None:
            self._watch = self._backend.watch()
        return False

    def close(self) -> None:
        """Stop before the end."""
        self._steps.close()
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def __del__(self) -> None:
        self.close()
