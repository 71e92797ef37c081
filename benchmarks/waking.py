"""Waking: how fast, how cheap while nothing happens, and what a crowd of waiters costs the writer."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from liteerresult import AsyncResult, ResultStore, TimeoutError as NotReady

from .floors import WalSync, frames_of_a_finish
from .harness import (
    CONTEXT,
    Arm,
    Child,
    Claim,
    Report,
    Settings,
    check,
    crowd,
    in_turn,
    ratio,
    seed,
    task_id,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

gaps = random.Random(1)  # the same gaps in every run


def gap() -> float:
    """Return how long the waiter has waited when the writer begins, in seconds."""
    return gaps.uniform(0.001, 0.005)


def short_gap() -> float:
    """Return the same for a writer that is at work all the time: nothing has gone cold yet."""
    return gaps.uniform(0, 0.001)


def finisher(connection: Connection, path: str, durability: Any) -> None:
    """Finish the tasks it is told to, each with the time when that began as its value."""
    with ResultStore(path, durability=durability) as store:
        connection.send("ready")
        while (command := connection.recv()) is not None:
            task, delay = command
            time.sleep(delay)
            store.mark_as_done(task, time.monotonic_ns())


def piper(connection: Connection, pipe: Connection) -> None:
    connection.send("ready")
    out = pipe.fileno()
    while (delay := connection.recv()) is not None:
        time.sleep(delay)
        os.write(out, time.monotonic_ns().to_bytes(8, "little"))


def no_op(delay: float) -> int:
    """Be a task that ends at the time it returns."""
    time.sleep(delay)
    return time.monotonic_ns()


def wake(settings: Settings) -> Report:
    rounds, block = settings.size(20, 2), settings.size(50, 10)
    with settings.place() as folder, contextlib.ExitStack() as stack:
        total = rounds * block
        stores, works = {}, {}
        for durability in ("process-crash", "power-loss"):
            path = str(folder / f"{durability}.db")
            seed(path, range(total + 20), groups={"all": range(total + 20)})
            store = stores[durability] = stack.enter_context(ResultStore(path, durability=durability))
            child = stack.enter_context(Child(finisher, path, durability))
            child.receive()
            works[f"liteerresult, {durability}"] = _get(store, child, block, gap)
        frames = frames_of_a_finish(stores["power-loss"], list(range(total, total + 20)), 1)
        pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=CONTEXT))
        pool.submit(no_op, 0).result()
        works["ProcessPoolExecutor future"] = lambda _: [_future(pool) for _ in range(block)]
        reader, writer = CONTEXT.Pipe(duplex=False)
        piping = stack.enter_context(Child(piper, writer))
        writer.close()
        piping.receive()
        works["pipe (floor)"] = lambda _: [_pipe(piping, reader.fileno()) for _ in range(block)]
        log = stack.enter_context(WalSync(str(folder / "log"), frames))
        works["bare WAL sync (floor)"] = lambda _: [_sync(log) for _ in range(block)]
        arms = in_turn(works, rounds)
        arms += in_turn(
            {"liteerresult, process-crash, alone": _alone(str(folder / "alone.db"), total, stores, stack)}, 1
        )
        ticks = sum(store.wakes.ticks for store in stores.values())
        reader.close()
    crash, power, future, _, sync, alone = arms
    claims = [
        Claim(
            "process-crash: p50 at or below a ProcessPoolExecutor future's",
            crash.p50, future.p50, "us",
        ),
        Claim("two processes alone, gaps up to 1 ms, process-crash: p50", alone.p50, 100, "us"),
        Claim("power-loss: p50 at most one bare WAL sync + 60 us", power.p50, sync.p50 + 60, "us"),
        Claim("waits ended by the fallback tick instead of the bell", ticks, 0, "waits"),
    ]  # fmt: skip
    speed = ratio(crash, future)
    notes = [
        f"process-crash to future, round by round: {speed.value:.2f} x ({speed.low:.2f} - {speed.high:.2f})",
        f"a finish writes {frames} frames of 2,072 bytes; the bare sync writes as much",
    ]
    return Report("mark_as_done in one process to get() returning in another", arms, claims, notes)


def _alone(path: str, total: int, stores: dict[str, ResultStore], stack: contextlib.ExitStack) -> Any:
    """Nothing else in turn with it, tasks in no group: two processes that do nothing but this."""
    seed(path, range(total))
    store = stores["alone"] = stack.enter_context(ResultStore(path, durability="process-crash"))
    child = stack.enter_context(Child(finisher, path, "process-crash"))
    child.receive()
    return _get(store, child, total, short_gap)


def _get(store: ResultStore, child: Child, block: int, wait: Callable[[], float]) -> Any:
    def work(number: int) -> list[float]:
        samples = []
        for index in range(number * block, (number + 1) * block):
            task = task_id(index)
            child.send((task, wait()))
            began = AsyncResult(task, store).get(timeout=60)
            samples.append((time.monotonic_ns() - began) / 1000)
            check(0 < samples[-1] < 60_000_000, f"woken {samples[-1]} us after the finish began")
        return samples

    return work


def _future(pool: ProcessPoolExecutor) -> float:
    began = pool.submit(no_op, gap()).result(timeout=60)
    return (time.monotonic_ns() - began) / 1000


def _pipe(child: Child, pipe: int) -> float:
    child.send(gap())
    began = int.from_bytes(os.read(pipe, 8), "little")
    return (time.monotonic_ns() - began) / 1000


def _sync(log: WalSync) -> float:
    time.sleep(gap())
    began = time.monotonic_ns()
    log.commit()
    return (time.monotonic_ns() - began) / 1000


# The herd


def bystander(connection: Connection, path: str, number: int) -> None:
    """Wait for the task that it is told, again and again."""
    with ResultStore(path, durability="process-crash") as store:
        connection.send("ready")
        while (first := connection.recv()) is not None:
            connection.send("waiting")
            value = AsyncResult(task_id(first + number), store).get(timeout=600)
            connection.send(value)


def herd(settings: Settings) -> Report:
    rounds, block, size = settings.size(8, 1), settings.size(200, 20), settings.size(64, 8)
    paced = settings.size(100, 10)
    work = 2 * (block + paced)
    with settings.place() as folder:
        path = str(folder / "store.db")
        waited_for = rounds * work
        seed(path, range(waited_for + rounds * size), groups={"all": range(waited_for)})
        with ResultStore(path, durability="process-crash") as store, crowd(size, bystander, path) as children:

            def finish(number: int) -> None:
                store.mark_as_done(task_id(number), number)

            crowds, paces = ("nobody waits", f"{size} wait"), ("one a 5 ms", "at once")
            arms = [Arm(f"{pace}, {who}") for who in crowds for pace in paces]
            for number in range(rounds):
                start = number * work
                for crowded in (False, True) if number % 2 else (True, False):
                    first = waited_for + number * size
                    if crowded:
                        _all_wait(children, first)
                    slow, fast = arms[2:] if crowded else arms[:2]
                    slow.blocks.append(_paced(finish, range(start, start + paced)))
                    fast.blocks.append(timed(finish, range(start + paced, start + paced + block)))
                    start += block + paced
                    if crowded:
                        store.mark_many_as_done({task_id(first + index): index for index in range(size)})
                        values = [child.receive() for child in children]
                        check(values == list(range(size)), "the herd got the values of others")
            group = store.restore_group("all")
            check(group is not None and group.completed_count() == waited_for, "finishes are missing")
    claims = [
        Claim.of(f"writer with {size} processes waiting for other tasks", ratio(arms[2], arms[0]), 1.3),
        Claim.of("the same, one finish right after the other", ratio(arms[3], arms[1]), 1.3),
    ]
    return Report("mark_as_done (process-crash) while others wait for other tasks", arms, claims)


def _all_wait(children: list[Child], first: int) -> None:
    for child in children:
        child.send(first)
    for child in children:
        check(child.receive() == "waiting", "a bystander does not wait")
    time.sleep(0.3)  # nothing tells when get() has parked; then they all sleep


def _paced(operation: Any, numbers: range) -> list[float]:
    samples = []
    for number in numbers:
        time.sleep(0.005)
        samples += timed(operation, [number])
    return samples


# Idle


def idler(connection: Connection, path: str, what: str) -> None:
    """Wait in vain, and send the CPU seconds that took, those of a look and a TimeoutError, and the seconds passed."""
    with ResultStore(path) as store:
        target: Any = store.restore_group("all") if what == "join" else None
        if target is None:
            target = AsyncResult(task_id(0 if what == "get" else 1), store)
        with contextlib.suppress(NotReady):
            target.get(timeout=0.3)  # what is done once
        connection.send("ready")
        while (seconds := connection.recv()) is not None:
            used = _cpu()
            with contextlib.suppress(NotReady):
                target.get(timeout=0)
            once = _cpu() - used
            began, used = time.monotonic(), _cpu()
            try:
                target.get(timeout=seconds)
            except NotReady:
                connection.send((_cpu() - used, once, time.monotonic() - began))
            else:
                connection.send("a task was ready that nobody finished")


def blocked(connection: Connection, _path: str, _what: str) -> None:
    """Be the floor: one sleep in the kernel."""
    connection.send("ready")
    while (seconds := connection.recv()) is not None:
        began, used = time.monotonic(), _cpu()
        time.sleep(seconds)
        connection.send((_cpu() - used, 0.0, time.monotonic() - began))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def idle(settings: Settings) -> Report:
    seconds, rounds = settings.size(10, 1), settings.size(3, 1)
    labels = {
        "get": "get() of a task",
        "owned": "get() of a task that a live process runs",
        "join": "join() of 1,000 tasks",
        "floor": "one sleep (floor)",
    }
    arms = {what: Arm(label, "% of a core") for what, label in labels.items()}
    ends = {what: Arm(label, "s") for what, label in labels.items()}
    with settings.place() as folder, contextlib.ExitStack() as stack:
        path = str(folder / "store.db")
        seed(path, range(1000), groups={"all": range(1000)})
        owner = stack.enter_context(ResultStore(path))
        owner.mark_as_started(task_id(1))
        children = {
            what: stack.enter_context(Child(blocked if what == "floor" else idler, path, what)) for what in labels
        }
        for child in children.values():
            child.receive()
        for _ in range(rounds):
            for child in children.values():
                child.send(seconds)
            for what, child in children.items():
                answer = child.receive(seconds + 60)
                check(isinstance(answer, tuple) and answer[2] >= seconds * 0.99, str(answer))
                used, once, passed = answer
                arms[what].blocks.append([100 * (used - once) / passed])
                ends[what].blocks.append([once])
        owner.mark_as_done(task_id(1), 1)
    claims = [Claim(labels[what], arms[what].p50, 0.1, "%") for what in ("get", "owned", "join")]
    notes = [
        f"not counted: {1e6 * ends[what].p50:.0f} us of CPU to look once and raise TimeoutError, {labels[what]}"
        for what in ("get", "owned", "join")
    ]
    return Report(f"a waiter with nothing happening for {seconds} s", list(arms.values()), claims, notes)
