"""What all verbs of a store stand on: the file, its side files, encoding, and the one way to write."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar

from .bell import FALLBACK_TICK, Bell
from .clock import SystemClock
from .connection import Database, Durability
from .liveness import owners_of
from .serialization import Serializer

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection

    from .bell import Watch
    from .clock import Clock
    from .marks import Marks

__all__ = ["StoreCore", "StoreWatch", "WakeCounts"]

_T = TypeVar("_T")


# From owner to owner by the index, however many tasks each has.
_OWNERS = """
    WITH RECURSIVE owing (id) AS (
        SELECT min(owner) FROM tasks WHERE owner IS NOT NULL AND done_number IS NULL
        UNION ALL
        SELECT (SELECT min(owner) FROM tasks WHERE owner > owing.id AND owner IS NOT NULL AND done_number IS NULL)
        FROM owing WHERE owing.id IS NOT NULL
    )
    SELECT id FROM owing WHERE id IS NOT NULL UNION SELECT id FROM owners"""


class WakeCounts:
    """
    What ended the waits of a store object so far.

    Attributes:
        events: File events: the bell, or the death of an owner.
        ticks: The fallback tick.
    """

    __slots__ = ("events", "ticks")

    def __init__(self) -> None:
        self.events = 0
        self.ticks = 0

    def __repr__(self) -> str:
        return f"WakeCounts(events={self.events}, ticks={self.ticks})"


class StoreCore:
    """The open store, without its verbs."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Durability,
        serializer: str,
        accept: tuple[str, ...],
        clock: Clock | None,
        new_id: Callable[[], str],
    ) -> None:
        self._serializer = Serializer(serializer, accept)
        self._json = Serializer()
        self._options: tuple[Durability, str, tuple[str, ...]] = (durability, serializer, tuple(accept))
        self._db = Database(path, durability)
        self.path = self._db.path
        """The database file, as an absolute path."""
        self.clock: Clock = clock or SystemClock()
        self.new_id = new_id
        self.fallback_tick: float | None = FALLBACK_TICK
        """How often a waiter looks without having heard anything, in seconds; None: never (for measuring)."""
        self.wakes = WakeCounts()
        self._closing = threading.Lock()
        with self._db.mapped_errors():
            self._owners = owners_of(f"{self.path}-owners")
            self._bell = Bell(self.path, self._db.open_side_file, f"{self.path}-owners")
            self._db.ring = self._bell.ring
        # Dropped without close(): the files are let go of, the process's tasks are not.
        weakref.finalize(self, _let_go, self._db, self._bell, os.getpid())

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._db.closed

    def close(self) -> None:
        """
        Close this object's connections, of all threads; it can't be used any more.

        The last object of a process to be closed lets go of the process's tasks: what is unfinished is lost.
        """
        with self._closing:
            if self.closed:
                return
            self._db.close()
        self._bell.close()
        self._owners.leave()

    def _write(
        self,
        operation: Callable[[sqlite3.Connection], _T],
        task_ids: Collection[str] | None = None,
        *,
        durable: bool = True,
    ) -> _T:
        """Run *operation* in a write transaction, then wake the waiters of *task_ids*; of all if None."""
        value = self._db.transact(operation, task_ids=task_ids, durable=durable)
        if not durable:
            self._bell.ring(task_ids)
        return value

    def _write_one(self, sql: str, parameters: tuple[Any, ...], task_id: str) -> bool:
        """Run a statement that changes one task or none, then wake its waiters; return whether it changed one."""
        return self._db.execute(sql, parameters, task_id) > 0

    def transact_quietly(
        self,
        operation: Callable[[sqlite3.Connection], _T],
        *,
        flush: bool,
        task_ids: Collection[str] | None = None,
    ) -> _T:
        """Run *operation* in a write transaction; what it did lasts and is heard of now, or once `flush` ran."""
        return self._db.transact(operation, task_ids=task_ids, durable=flush)

    def read_quietly(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        """Run a query; for those parts of the package that write by `transact_quietly`."""
        return self._db.read(sql, parameters)

    def flush(self, task_ids: Collection[str] | None = None) -> None:
        """Make every commit of this process so far last, then wake the waiters of *task_ids*; all if None."""
        self._db.sync(task_ids)

    def encode_value(self, value: object) -> tuple[str | bytes, str]:
        """Return a value's payload and how it is encoded."""
        return self._serializer.encode(value), self._serializer.encoding

    def encode_readably(self, value: object) -> str:
        """Return a value as JSON, whatever results are stored as: arguments are for people to read."""
        return self._json.encode(value)  # type: ignore[return-value]  # JSON is text

    def own_owner(self) -> str:
        """Return this process's owner id, taking its lock at the first call."""
        return self._owners.acquire()

    def own_marks(self) -> Marks:
        """Return where this process notes which calls it makes, for those who find it dead."""
        return self._owners.marks()

    @property
    def options(self) -> tuple[Durability, str, tuple[str, ...]]:
        """Durability, serializer and accepted encodings, as given."""
        return self._options

    def watch(self, task_id: str | None = None) -> StoreWatch:
        """
        Return an armed watch: what changes from now on ends its `wait`. Use it as a context manager.

        Args:
            task_id: The only task that is waited for, if it is only one: changes of others may not be heard then.
        """
        return StoreWatch(self, self._bell.watch(task_id))

    def settle(self, owner: str) -> list[str]:
        """Fail what a dead owner left; return the ids."""
        raise NotImplementedError

    def owners(self) -> list[str]:
        """Return the ids of all owners that are recorded or answer for a task, dead ones included."""
        return [row[0] for row in self._db.read(_OWNERS)]

    def owner_is_alive(self, owner: str) -> bool:
        """Tell whether an owner's process is alive, from its lock."""
        return owner == self._owners.own or self._owners.is_alive(owner)


def _let_go(database: Database, bell: Bell, pid: int) -> None:
    if pid == os.getpid() and not database.closed:
        database.close(unused=True)
        bell.close()


class StoreWatch:
    """An armed watch on a store. Whoever waits also notices the dead."""

    __slots__ = ("_probed", "_probed_since", "_recorded", "_store", "_version", "_watch")

    def __init__(self, store: StoreCore, watch: Watch) -> None:
        self._store = store
        self._watch = watch
        self._probed: set[str] = set()
        self._probed_since = time.monotonic()
        # The file's version at the last tick that asked for a look, and the owners if they were read since.
        self._version: tuple[int, int, int] | None = None
        self._recorded: list[str] | None = None

    def wait(self, timeout: float | None, owners: Collection[str] | None = None) -> bool:
        """
        Return when the store may have changed, or after *timeout* seconds, or at the fallback tick.

        Args:
            timeout: In seconds; None for no limit.
            owners: Owners whose death matters to the waiter; None for any.

        Returns:
            False at a tick if nothing was committed since the last one: no need to look. Else look, each time.
        """
        if self._settle_dead(owners):
            return True
        limit = self._limit(timeout)
        return self._judge(self._watch.wait(limit), limit == timeout)

    async def wait_async(self, timeout: float | None, owners: Collection[str] | None = None) -> bool:
        """Do the same without blocking the running loop."""
        if self._settle_dead(owners):
            return True
        limit = self._limit(timeout)
        return self._judge(await self._watch.wait_async(limit), limit == timeout)

    def fire(self) -> None:
        """Make the wait return now; from any thread."""
        self._watch.fire()

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._watch.close()

    def _limit(self, timeout: float | None) -> float | None:
        tick = self._store.fallback_tick
        if tick is None or timeout is None:
            return tick if timeout is None else timeout
        return min(tick, timeout)

    def _judge(self, heard: bool, ended: bool) -> bool:
        """Return whether to look, after a wait that *heard* something, or *ended* with the waiter's own time."""
        store = self._store
        if not heard and not ended:
            store.wakes.ticks += 1
            # Before the look: what is committed after this moves the version that the next tick finds.
            version = store._db.version()
            if version == self._version:
                return False
            self._version = version
            self._recorded = None
        if heard:
            store.wakes.events += 1
            while self._watch.names:  # lock files were closed: the next wait probes their owners
                with contextlib.suppress(KeyError):  # another thread's hub may add meanwhile
                    self._probed.discard(self._watch.names.pop().removesuffix(".lock"))
                self._recorded = None
        return True

    def _settle_dead(self, owners: Collection[str] | None) -> bool:
        """Probe those that were not probed yet; return whether anything was settled."""
        store = self._store
        now = time.monotonic()
        if now - self._probed_since >= FALLBACK_TICK:
            # The event of a death may have been lost, or have come just before the lock was dropped.
            self._probed_since = now
            self._probed.clear()
        if owners is None:
            if self._recorded is None:
                self._recorded = store.owners()
            owners = self._recorded
        settled = False
        for owner in owners:
            if owner not in self._probed:
                self._probed.add(owner)
                if not store.owner_is_alive(owner):
                    settled = bool(store.settle(owner)) or settled
        if settled:
            self._recorded = None
        return settled
