"""
`Runner`: batches over any `concurrent.futures` executor, each call a task that records itself.

A thread of its own hands calls to the executor, a few chunks ahead of the workers, and decides what
becomes of calls whose worker died. Short calls travel together, long ones alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from queue import SimpleQueue
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Self

from .backend import check_id
from .batch import Plan, decide_lost, let_go, plan_group, plan_task, put_back, revoke_all, revoke_waiting
from .errors import EncodeError, TransitionError
from .fingerprints import call_name, unfold
from .liveness import parse_owner
from .results import AsyncResult
from .states import LOST, RETRY
from .worker import Call, ChunkReport, Home, lend, run_chunk, this_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from .groups import GroupResult
    from .store import ResultStore

__all__ = ["Runner"]

CHUNK_SECONDS = 0.005
"""Calls travel together as long as a chunk of them takes no longer than this."""

LARGEST_CHUNK = 256

CHUNKS_AHEAD = 2
"""Chunks handed to the executor for each of its workers."""

BLAMELESS_LIMIT = 3
"""How often a call is made again because of the death of a worker that was not proven to be its own doing."""


class _Batch:
    """Calls of one function that wait to be handed over."""

    __slots__ = ("function", "size", "waiting")

    def __init__(self, function: Callable[..., Any], waiting: Iterable[_Job]) -> None:
        self.function = function
        self.waiting = deque(waiting)
        self.size = 1
        """How many calls the next chunk has."""

    def learn(self, calls: int, seconds: float, chunk_seconds: float) -> None:
        """Set the size of the next chunks by what the last one took."""
        fitting = int(chunk_seconds * calls / max(seconds, 1e-9))
        self.size = max(1, min(fitting, 4 * self.size, LARGEST_CHUNK))


class _Job:
    """One call, and what is known of its attempts."""

    __slots__ = ("args", "attempt", "blameless", "kwargs", "task_id", "tries")

    def __init__(self, task_id: str, attempt: int, tries: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.tries = tries
        """Attempts left after this one."""
        self.blameless = 0
        self.args = args
        self.kwargs = kwargs

    def advance(self) -> None:
        """Go on to the next attempt."""
        self.attempt += 1
        self.tries -= 1

    def call(self) -> Call:
        return Call(self.task_id, self.attempt, self.tries <= 0, self.args, self.kwargs)


class Runner:
    """
    Runs calls in an executor and records each as a task of the store.

    The worker itself records what became of a call, so that the result is safe before this process
    hears of it. Use it as a context manager: the end of the block waits for all calls; leaving it by
    an exception revokes what has not begun. Either shuts the executor down.

    Args:
        store: Where the tasks are.
        executor: Any `concurrent.futures.Executor`, or a function that makes one (which allows a broken
            pool to be replaced, whatever its kind). A `ProcessPoolExecutor` of its own if None.

        chunk_seconds: Calls travel together as long as a chunk of them takes no longer than this. 0: each alone.

    Raises:
        TypeError: *executor* is none of these.
    """

    def __init__(
        self,
        store: ResultStore,
        executor: Executor | Callable[[], Executor] | None = None,
        *,
        chunk_seconds: float = CHUNK_SECONDS,
    ) -> None:
        self.store = store
        self._chunk_seconds = chunk_seconds
        self._make: Callable[[], Executor] | None = None
        if executor is None:
            from concurrent.futures import ProcessPoolExecutor  # takes as long to import as all the rest

            executor = ProcessPoolExecutor
        if isinstance(executor, Executor):
            self._executor = executor
        elif callable(executor):
            self._make = executor
            self._executor = executor()
        else:
            msg = f"an executor, or a function that makes one, is needed; not {type(executor).__name__}"
            raise TypeError(msg)
        self._home = Home(store.path, store.options, this_host(), os.getpid())
        lend(self._home, store)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._batches: deque[_Batch] = deque()
        self._in_flight: dict[Future[ChunkReport], tuple[Executor, _Batch, list[_Job]]] = {}
        self._mutex = threading.Lock()
        self._open: set[_Job] = set()
        self._fruitless = 0
        """How many pools broke one after the other without any call having begun or ended."""
        self._all_ended = threading.Condition(self._mutex)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._cancelled = False
        self.error: BaseException | None = None
        """What ended the dispatching thread before its time; None if all is well."""
        self._warm_up()

    def _warm_up(self) -> None:
        # A pool that forks its workers does so at its first call: now, before this process has threads of ours.
        if _is_process_pool(self._executor):
            self._executor.submit(os.getpid)

    # Submitting

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> AsyncResult:
        """
        Make one call and return its result.

        Args:
            function: What to call; importable by the workers, if they are processes.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Raises:
            RuntimeError: The runner is closed.
        """
        self._check_open()
        shown_args, shown_kwargs = unfold(function, [(args, kwargs)])[0]
        plan = plan_task(
            self.store,
            self.store.new_id(),
            call_name(function),
            shown_args,
            shown_kwargs,
            self.store.parent_id_of(None),
        )
        self._hand_in_or_drop(function, plan, [(args, kwargs)], 0)
        return AsyncResult(plan.todo[0][1], self.store)

    def map(
        self,
        function: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        group_id: str | None = None,
        retries: int = 0,
        name: str | None = None,
    ) -> GroupResult:
        """
        Call *function* with the items of *iterables*, and return the group of results in their order.

        With a *group_id* that the store knows, only those calls are made that are not DONE: run the same
        program again after a crash, and it goes on where it was.

        Args:
            function: What to call; importable by the workers, if they are processes.
            *iterables: Arguments, taken in step like `zip`; they have to be of one length.
            group_id: The group's id; a new one if None.
            retries: How often a call that raises, or whose worker dies, is tried again.
            name: What kind of work it is; the function's name if None.

        Raises:
            ValueError: The group is known, and was of other calls.
            RuntimeError: The runner is closed.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [(args, {}) for args in zip(*iterables, strict=True)]
        return self.run_calls(function, calls, group_id=group_id, retries=retries, name=name)

    def run_calls(
        self,
        function: Callable[..., Any],
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
        *,
        group_id: str | None = None,
        retries: int = 0,
        name: str | None = None,
    ) -> GroupResult:
        """Do what `map` does, with positional and keyword arguments given for each call."""
        self._check_open()
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            msg = f"retries is a number of further attempts, 0 or more; not {retries!r}"
            raise ValueError(msg)
        group_id = self.store.new_id() if group_id is None else check_id(group_id, "group id")
        name = name or call_name(function)
        plan = plan_group(self.store, group_id, name, unfold(function, calls), self.store.parent_id_of(None))
        assert plan.group is not None  # noqa: S101 - of a group
        self._hand_in_or_drop(function, plan, calls, retries)
        return plan.group

    def _check_open(self) -> None:
        if self._closed:
            msg = "the runner is closed; make another"
            raise RuntimeError(msg)
        if self.error is not None:
            msg = "the runner can't go on"
            raise RuntimeError(msg) from self.error

    def _hand_in_or_drop(self, function: Callable[..., Any], plan: Plan, calls: list[Any], retries: int) -> None:
        try:
            self._hand_in(function, plan, calls, retries)
        except BaseException:
            self._drop(plan)
            raise

    def _hand_in(self, function: Callable[..., Any], plan: Plan, calls: list[Any], retries: int) -> None:
        if not plan.todo:
            return
        batch = _Batch(
            function, (_Job(task_id, attempt, retries, *calls[position]) for position, task_id, attempt in plan.todo)
        )
        with self._mutex:
            error = self.error
            if error is None:
                self._open.update(batch.waiting)  # from here on `_count_down` lets go of them
                if self._thread is None:
                    self._thread = threading.Thread(target=self._dispatch, name="liteerresult-runner", daemon=True)
                    self._thread.start()
        if error is not None:
            self._give_up(list(batch.waiting), error)
            self._check_open()
        self._inbox.put(batch)

    def _drop(self, plan: Plan) -> None:
        """Forget a batch that could not be handed in, by Ctrl-C perhaps; whoever maps it again makes its calls."""
        ids = {task_id for _, task_id, _ in plan.todo}
        with self._mutex:
            over = {job for job in self._open if job.task_id in ids}
            self._open -= over
            self._all_ended.notify_all()
        let_go(self.store, ids)

    # Closing

    def close(self, *, cancel: bool = False) -> None:
        """
        Wait for all calls, then shut the executor down.

        Args:
            cancel: Revoke the calls that have not begun, and wait only for those that have.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._wait(cancel=cancel)
        except BaseException:  # Ctrl-C, say: then only what has begun is waited for
            self._wait(cancel=True)
            raise
        finally:
            self._executor.shutdown(wait=True)
        if self.error is not None:
            raise self.error

    def _wait(self, *, cancel: bool) -> None:
        if self._thread is None:
            return
        if cancel:
            self._inbox.put("cancel")
        with self._mutex:
            while self._open:
                self._all_ended.wait()
        self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close(cancel=kind is not None)

    # The dispatching thread

    def _dispatch(self) -> None:
        try:
            while True:
                message = self._inbox.get()
                if message is None:
                    return
                if message == "cancel":
                    self._cancel()
                elif isinstance(message, _Batch):
                    self._batches.append(message)
                else:
                    self._ended(message)
                if self._inbox.empty() or len(self._in_flight) <= 1:
                    self._fill()
        except BaseException as exc:  # noqa: BLE001 - close() raises it where somebody sees it
            with self._mutex:
                self.error = exc
                left = list(self._open)
            try:
                self._give_up(left, exc)
            finally:
                with self._mutex:
                    let_go(self.store, [job.task_id for job in self._open])
                    self._open.clear()
                    self._all_ended.notify_all()

    def _fill(self) -> None:
        """Hand calls over until the executor has enough."""
        workers = getattr(self._executor, "_max_workers", None) or os.cpu_count() or 1
        while self._batches and len(self._in_flight) < CHUNKS_AHEAD * workers:
            batch = self._batches[0]
            # Towards the end smaller chunks, so that all workers end at about the same time.
            size = max(1, min(batch.size, len(batch.waiting) // (CHUNKS_AHEAD * workers)))
            jobs = [batch.waiting.popleft() for _ in range(min(size, len(batch.waiting)))]
            if not batch.waiting:
                self._batches.popleft()
            if jobs:
                self._hand_over(batch, jobs)

    def _hand_over(self, batch: _Batch, jobs: list[_Job]) -> None:
        try:
            future = self._executor.submit(run_chunk, self._home, batch.function, [job.call() for job in jobs])
        except BrokenExecutor as exc:
            self._broken(self._executor, [(batch, jobs)], exc)
        except RuntimeError as exc:  # it was shut down by someone else
            self._give_up(jobs, exc)
        else:
            self._in_flight[future] = self._executor, batch, jobs
            future.add_done_callback(self._inbox.put)

    def _ended(self, future: Future[ChunkReport]) -> None:
        if future not in self._in_flight:
            return  # dealt with when the pool broke
        executor, batch, jobs = self._in_flight.pop(future)
        try:
            report = future.result()
        except CancelledError:
            self._revoke(jobs)
        except BrokenExecutor as exc:
            self._broken(executor, [(batch, jobs)], exc)
        except BaseException as exc:  # noqa: BLE001 - the call could not be sent, or its report not be read
            self._give_up(jobs, exc)
        else:
            batch.learn(len(jobs), report.seconds, self._chunk_seconds)
            if report.outcomes is not None:
                self._record(batch, jobs, report.outcomes)
                return
            self._fruitless = 0
            skipped = [jobs[position] for position in report.skipped]
            lost = self._lost_among(skipped) if skipped else []
            stuck = self._stuck_among(skipped) if skipped else []
            for position in report.again:
                jobs[position].advance()
            self._again(batch, [jobs[position] for position in report.again] + stuck)
            again = {*(jobs[position] for position in report.again), *lost, *stuck}
            if lost:
                self._after_break(batch, lost, BrokenExecutor("a worker died"), {})
            self._count_down([job for job in jobs if job not in again])

    def _again(self, batch: _Batch, jobs: list[_Job]) -> None:
        if self._cancelled:
            self._revoke(jobs)
        elif jobs:
            if not batch.waiting:
                self._batches.append(batch)
            batch.waiting.extend(jobs)

    def _lost_among(self, jobs: list[_Job]) -> list[_Job]:
        """Return those whose worker died, though the executor does not say so: it made the calls once more."""
        self._settle_dead(jobs)
        metas = self.store.get_many([job.task_id for job in jobs])
        return [
            job for job, meta in zip(jobs, metas, strict=True) if meta.status == LOST and meta.retries == job.attempt
        ]

    def _stuck_among(self, jobs: list[_Job]) -> list[_Job]:
        """Return those that somebody gave a custom state while they waited: no worker begins with such a one."""
        store = self.store
        waiting = put_back(store, [(job.task_id, job.attempt) for job in jobs if not store.has_begun(job.task_id)])
        stuck = [job for job in jobs if job.task_id in waiting]
        for job in stuck:
            job.attempt += 1
        return stuck

    def _count_down(self, ended: Iterable[_Job]) -> None:
        with self._mutex:
            over = self._open.intersection(ended)
            let_go(self.store, [job.task_id for job in over])
            self._open -= over
            if not self._open:
                self._all_ended.notify_all()

    # What goes wrong

    def _broken(self, executor: Executor, broken: list[tuple[_Batch, list[_Job]]], exc: BrokenExecutor) -> None:
        """Find out by whose death the pool broke, and go on in a new one."""
        processes = dict(getattr(executor, "_processes", None) or {})
        if executor is self._executor:
            self._replace_executor()  # joins the old pool's processes: from here on they are dead
        others = [
            future
            for future, (its, _, _) in self._in_flight.items()
            if its is executor
            and future.done()
            and not future.cancelled()
            and isinstance(future.exception(), BrokenExecutor)
        ]
        broken += [self._in_flight.pop(future)[1:] for future in others]
        ends = {pid: process.exitcode for pid, process in processes.items()}
        self._fruitless += 1
        for batch, jobs in broken:
            self._after_break(batch, jobs, exc, ends)

    def _after_break(self, batch: _Batch, jobs: list[_Job], exc: BrokenExecutor, ends: dict[int, int | None]) -> None:
        """Decide what becomes of calls whose chunk did not come back; *ends* are the pool's exit codes by pid."""
        store = self.store
        pids = self._settle_dead(jobs)
        again: list[_Job] = []
        lost_again: list[_Job] = []
        lost_for_good: list[_Job] = []
        failed: list[_Job] = []
        for job, meta in zip(jobs, store.get_many([job.task_id for job in jobs]), strict=True):
            if meta.ready:
                self._fruitless = 0
            elif meta.status == LOST:
                self._fruitless = 0
                pid = pids.get(job.task_id) or meta.result["attributes"]["pid"]
                (lost_again if self._may_try_again(job, ends, pid) else lost_for_good).append(job)
            else:
                if meta.status == RETRY and meta.retries == job.attempt + 1:  # it failed, and the report was lost
                    job.advance()
                    self._fruitless = 0
                (failed if self._fruitless > BLAMELESS_LIMIT else again).append(job)
        decide_lost(
            store,
            [(job.task_id, job.attempt) for job in lost_again],
            [(job.task_id, job.attempt) for job in lost_for_good],
        )
        for job in lost_again:
            job.attempt += 1
        self._again(batch, again + lost_again)
        going_on = {*again, *lost_again, *failed}
        self._count_down([job for job in jobs if job not in going_on])
        self._give_up(failed, exc)

    @staticmethod
    def _may_try_again(job: _Job, ends: dict[int, int | None], pid: int) -> bool:
        # The pool ends the other workers by SIGTERM; who ended otherwise is the one that broke it.
        ended_by_pool = ends.get(pid) == -SIGTERM
        if ended_by_pool and any(code not in (None, 0, -SIGTERM) for code in ends.values()):
            return True
        if ended_by_pool and job.blameless < BLAMELESS_LIMIT:
            job.blameless += 1
            return True
        job.tries -= 1
        return job.tries >= 0

    def _settle_dead(self, jobs: list[_Job]) -> dict[str, int | None]:
        """Settle the dead owners of calls; return the process ids of those that ran them, by task."""
        store = self.store
        store.reap()  # of calls that were noted and not yet on record, the file does not say who made them
        pids = {}
        for meta in store.get_many([job.task_id for job in jobs]):
            if not meta.ready and meta.owner is not None and meta.owner != store.own_owner():
                pids[meta.task_id] = parse_owner(meta.owner)[0]
                if not store.owner_is_alive(meta.owner):
                    store.settle(meta.owner)
        return pids

    def _replace_executor(self) -> None:
        old: Any = self._executor
        old.shutdown(wait=True)  # cancel_futures came late, and a broken pool has none
        if self._make is not None:
            self._executor = self._make()
        elif _is_process_pool(old):
            self._executor = type(old)(
                max_workers=old._max_workers,
                mp_context=old._mp_context,
                initializer=old._initializer,
                initargs=old._initargs,
                max_tasks_per_child=old._max_tasks_per_child,
            )
        # else it can't be made anew: what is left fails with the pool's own error

    def _give_up(self, jobs: list[_Job], exc: BaseException) -> None:
        """Fail calls that could not be made."""
        for job in jobs:
            with contextlib.suppress(TransitionError):
                self.store.mark_as_failure(job.task_id, exc)
        self._count_down(jobs)

    def _record(self, batch: _Batch, jobs: list[_Job], outcomes: list[tuple[bool, Any]]) -> None:
        """Record what workers on another host report."""
        again = []
        for job, (succeeded, outcome) in zip(jobs, outcomes, strict=True):
            with contextlib.suppress(TransitionError, EncodeError):  # the store made that the task's failure
                if succeeded:
                    self.store.mark_as_done(job.task_id, outcome)
                elif job.tries > 0 and isinstance(outcome, Exception):
                    self.store.mark_as_retry(job.task_id, outcome)
                    job.advance()
                    again.append(job)
                else:
                    self.store.mark_as_failure(job.task_id, outcome)
        self._again(batch, again)
        self._count_down([job for job in jobs if job not in again])

    def _cancel(self) -> None:
        self._cancelled = True
        waiting = [job for batch in self._batches for job in batch.waiting]
        self._batches.clear()
        self._revoke(waiting)
        # What the executor has can't always be called back; a worker does not begin what is revoked.
        revoke_waiting(self.store, [job.task_id for _, _, jobs in self._in_flight.values() for job in jobs])
        for future in list(self._in_flight):
            future.cancel()

    def _revoke(self, jobs: list[_Job]) -> None:
        if jobs:
            revoke_all(self.store, [job.task_id for job in jobs])
        self._count_down(jobs)


def _is_process_pool(executor: object) -> bool:
    process = sys.modules.get("concurrent.futures.process")
    return process is not None and type(executor) is process.ProcessPoolExecutor
