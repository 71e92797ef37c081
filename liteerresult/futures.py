"""`concurrent.futures.Future`s of stored results: one thread a backend and process completes them all."""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .states import DONE

if TYPE_CHECKING:
    from .backend import Backend, TaskMeta, Waiting

__all__ = ["future_of"]


class _StoredFuture(Future[Any]):
    """A future that nobody runs: cancelling it is the end of it, for those who wait on it too."""

    def __init__(self) -> None:
        super().__init__()
        self.add_done_callback(_notify_if_cancelled)


def _notify_if_cancelled(future: Future[Any]) -> None:
    if future.cancelled():
        future.set_running_or_notify_cancel()


class _Completer:
    """Waits for every task that somebody has a future of; its thread ends when there is none left."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._new: dict[str, list[Future[Any]]] = {}
        self._cancelled: set[str] = set()
        self._watch: Waiting | None = None
        self._running = False

    def add(self, backend: Backend, task_id: str, future: Future[Any]) -> None:
        """Wait for a task on behalf of *future*."""
        with self._mutex:
            self._new.setdefault(task_id, []).append(future)
            if self._watch is not None:
                self._watch.fire()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, args=(backend,), name="liteerresult-futures", daemon=True).start()

    def drop(self, task_id: str, future: Future[Any]) -> None:
        """Stop waiting for what nobody wants any more."""
        if future.cancelled():
            with self._mutex:
                self._cancelled.add(task_id)
                if self._watch is not None:
                    self._watch.fire()

    def _run(self, backend: Backend) -> None:
        pending: dict[str, list[Future[Any]]] = {}
        try:
            with backend.watch() as watch:
                with self._mutex:
                    self._watch = watch
                number = backend.completion_number()
                while self._take(backend, pending):
                    seen, number = number, self._look(backend, pending, number)
                    if seen == number and pending and not self._new:
                        while watch.wait(None) is False:
                            pass
        except BaseException as exc:  # noqa: BLE001 - nobody else could hear of it
            with self._mutex:
                self._running, self._watch = False, None
                lost, self._new = [*pending.values(), *self._new.values()], {}
            for futures in lost:
                for future in futures:
                    _settle(future, exc, failed=True)

    def _take(self, backend: Backend, pending: dict[str, list[Future[Any]]]) -> bool:
        """Take over what was added, completing what is ready already; False if the thread may end."""
        with self._mutex:
            new, self._new = self._new, {}
            cancelled, self._cancelled = self._cancelled, set()
            for task_id, futures in new.items():
                pending.setdefault(task_id, []).extend(futures)
            for task_id in cancelled & pending.keys():
                if all(future.cancelled() for future in pending[task_id]):
                    del pending[task_id]
            if not pending:
                self._running, self._watch = False, None
                return False
        fresh = [task_id for task_id in new if task_id in pending]
        for meta in backend.get_many(fresh) if fresh else ():
            if meta.ready:
                _complete(meta, pending.pop(meta.task_id))
        return True

    @staticmethod
    def _look(backend: Backend, pending: dict[str, list[Future[Any]]], number: int) -> int:
        number, completed = backend.completed_since(number)
        hits = [task_id for task_id in completed if task_id in pending]
        for meta in backend.get_many(hits) if hits else ():
            if meta.ready:
                _complete(meta, pending.pop(meta.task_id))
        return number


def _complete(meta: TaskMeta, futures: list[Future[Any]]) -> None:
    for future in futures:
        try:
            if meta.status == DONE:
                _settle(future, meta.value())
            else:
                _settle(future, meta.exception(), failed=True)
        except Exception as exc:  # noqa: BLE001 - a row that can't be decoded is the future's outcome
            _settle(future, exc, failed=True)


def _settle(future: Future[Any], outcome: Any, *, failed: bool = False) -> None:
    try:
        if failed:
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # cancelled by its holder
        pass


_completers: WeakKeyDictionary[Backend, _Completer] = WeakKeyDictionary()
_guard = threading.Lock()


def _after_fork_in_child() -> None:
    global _completers, _guard
    _completers, _guard = WeakKeyDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def future_of(backend: Backend, task_id: str) -> Future[Any]:
    """Return a future that gets the task's value, or its exception, once it is final."""
    future = _StoredFuture()
    with _guard:
        completer = _completers.get(backend)
        if completer is None:
            completer = _completers[backend] = _Completer()
    completer.add(backend, task_id, future)
    future.add_done_callback(functools.partial(completer.drop, task_id))
    return future
