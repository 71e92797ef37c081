"""A wake taken apart: where writer and waiter are at what time, on the clock that both processes share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from liteerresult import AsyncResult, ResultStore
from liteerresult.bell import _the_hub, notification_in_use

from .harness import Arm, Child, Settings, check, seed, task_id
from .waking import gap

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

WRITERS: dict[str, tuple[Callable[[], float], float]] = {
    "cold": (gap, 0.0),
    "busy": (lambda: 0.0, 0.0003),
    "at once": (lambda: 0.0, 0.0),
}
"""How long the writer sleeps and how long it computes before it finishes the task, in seconds."""

STRETCHES = {
    "start of mark_as_done to ring": ("began", "ringing"),
    "ring to the waiter's poll returning": ("ringing", "polled"),
    "(ring() itself, in the writer)": ("ringing", "rung"),
    "poll to query": ("polled", "asked"),
    "query": ("asked", "answered"),
    "query to get() returning": ("answered", "got"),
    "total": ("began", "got"),
}


class Moments(NamedTuple):
    """When, in nanoseconds of CLOCK_MONOTONIC, the writer and then the waiter were where."""

    began: int
    ringing: int
    rung: int
    polled: int
    asked: int
    answered: int
    got: int


def noting_writer(connection: Connection, path: str) -> None:
    """Finish the tasks it is told to; asked for "moments", send when each began and when its ring began and ended."""
    with ResultStore(path, durability="process-crash") as store:
        moments: list[tuple[int, int, int]] = []
        rings, ring = (0, 0), store._db.ring

        def noting_ring(ids: Any) -> None:
            nonlocal rings
            began = time.monotonic_ns()
            ring(ids)
            rings = began, time.monotonic_ns()

        store._db.ring = noting_ring
        connection.send("ready")
        while (command := connection.recv()) is not None:
            if command == "moments":
                connection.send(moments)
                moments = []
                continue
            task, asleep, busy = command
            _pass_time(asleep, busy)
            began = time.monotonic_ns()
            store.mark_as_done(task, began)
            moments.append((began, *rings))


def _pass_time(asleep: float, busy: float) -> None:
    if asleep:
        time.sleep(asleep)
    end = time.monotonic() + busy
    while time.monotonic() < end:
        pass


class NotingWaiter:
    """Gets tasks of a store, and notes when its poll returned last and when its query began and ended."""

    def __init__(self, store: ResultStore) -> None:
        self._store, self._hub = store, _the_hub()
        self._poller, self._read = self._hub._poller, store._db.read
        self._polled = self._asked = self._answered = 0

    def get(self, task: str) -> tuple[int, tuple[int, int, int, int]]:
        """Return the task's value, and when this poll returned (0: it did not come to that), and so on."""
        self._polled = 0
        value = AsyncResult(task, self._store).get(timeout=60)
        return value, (self._polled, self._asked, self._answered, time.monotonic_ns())

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        events = self._poller.poll(timeout)
        self._polled = time.monotonic_ns()
        return events

    def read(self, *query: Any) -> list[Any]:
        self._asked = time.monotonic_ns()
        rows = self._read(*query)
        self._answered = time.monotonic_ns()
        return rows

    def __enter__(self) -> Self:
        self._hub._poller = self  # type: ignore[assignment]
        self._store._db.read = self.read  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hub._poller = self._poller
        del self._store._db.read


def timeline(settings: Settings) -> tuple[list[Arm], list[str]]:
    """Return what each stretch from mark_as_done in one process to get() in another takes, and notes."""
    rounds, block = settings.size(20, 2), settings.size(50, 10)
    if notification_in_use() != "inotify":
        return [], ["wake: no file events here: nothing to take apart"]
    blocks: dict[str, list[list[Moments]]] = {kind: [] for kind in WRITERS}
    with settings.place() as folder:
        path = str(folder / "store.db")
        total = len(WRITERS) * rounds * block
        seed(path, range(total), groups={"all": range(total)})
        with (
            ResultStore(path, durability="process-crash") as store,
            Child(noting_writer, path) as child,
            NotingWaiter(store) as waiter,
        ):
            child.receive()
            for number in range(len(WRITERS) * rounds):
                kind = list(WRITERS)[(number + number // len(WRITERS)) % len(WRITERS)]
                tasks = [task_id(index) for index in range(number * block, (number + 1) * block)]
                blocks[kind].append(_wakes(waiter, child, tasks, kind))
            group = store.restore_group("all")
            check(group is not None and group.completed_count() == total, "finishes are missing")
    notes = [
        "wake: the writer is cold (sleeps 1 to 5 ms before), busy (computes 0.3 ms), or finishes at once when told",
        "wake: where ring() outlasts the way to get(), the system ran the waiter on the writer's core meanwhile",
    ]
    for kind, found in blocks.items():
        woken = sum(map(len, found))
        notes.append(f"wake, {kind}: {woken} of {rounds * block} waits were ended by the ring; the others don't count")
    return [arm for kind, found in blocks.items() if any(found) for arm in _stretches(kind, found)], notes


def _wakes(waiter: NotingWaiter, child: Child, tasks: list[str], kind: str) -> list[Moments]:
    """Return the moments of each task whose waiter was woken by the ring."""
    sleep, busy = WRITERS[kind]
    mine = []
    for task in tasks:
        child.send((task, sleep(), busy))
        mine.append(waiter.get(task))
    child.send("moments")
    theirs = child.receive()
    check([value for value, _ in mine] == [began for began, _, _ in theirs], "the waiter got other values")
    found = [Moments._make((*writer, *here)) for writer, (_, here) in zip(theirs, mine, strict=True)]
    return [moments for moments in found if moments.polled >= moments.ringing]


def _stretches(kind: str, blocks: list[list[Moments]]) -> list[Arm]:
    return [
        Arm(
            f"wake, {kind}: {stretch}",
            "us",
            [[(getattr(at, end) - getattr(at, start)) / 1000 for at in block] for block in blocks if block],
        )
        for stretch, (start, end) in STRETCHES.items()
    ]
