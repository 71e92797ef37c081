"""Many results at once: joining, iterating and counting groups."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from liteerresult import ResultStore

from .floors import BareTable
from .harness import (
    RESULT,
    Arm,
    Child,
    Claim,
    Report,
    Settings,
    check,
    in_turn,
    keep_writeback_out,
    once,
    ratio,
    seed,
    task_id,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection


def join(settings: Settings) -> Report:
    size, rounds = settings.size(100_000, 2_000), settings.size(7, 2)
    with settings.place() as folder:
        path = str(folder / "store.db")
        seed(path, range(size), groups={"all": range(size)})
        with (
            ResultStore(path, durability="process-crash") as store,
            BareTable(str(folder / "bare.db"), range(size), finished=True) as bare,
        ):
            for start in range(0, size, 10_000):
                store.mark_many_as_done({task_id(n): RESULT for n in range(start, min(size, start + 10_000))})
            wanted = [RESULT] * size

            def judged(operation: Callable[[], Any]) -> list[float]:
                spent, values = once(operation)
                check(values == wanted, "the values came back changed")
                return [spent / size]

            def whole(_: int) -> list[float]:
                return judged(lambda: store.restore_group("all").join())  # type: ignore[union-attr]

            def handles(_: int) -> list[float]:
                group: Any = store.restore_group("all")
                check(len(group.results) == size, "members are missing")
                return judged(group.join)

            def floor(_: int) -> list[float]:
                return judged(lambda: [json.loads(row[0]) for row in bare.connection.execute(_ALL).fetchall()])

            keep_writeback_out()
            arms = in_turn(
                {
                    "restore_group().join()": whole,
                    "join() of a group at hand": handles,
                    "bare SELECT + json.loads (floor)": floor,
                },
                rounds,
                "us a task",
            )
    claims = [
        Claim.of("restore_group().join() to bare SELECT + json.loads", ratio(arms[0], arms[2]), 1.5),
        Claim.of("join() of a group at hand to the same", ratio(arms[1], arms[2]), 1.5),
    ]
    return Report(f"join {size:,} finished tasks", arms, claims)


_ALL = "SELECT result FROM tasks ORDER BY rowid"


# Iterating


def in_order(connection: Connection, path: str) -> None:
    """Finish the tasks of the ranges that it is sent, one commit each."""
    with ResultStore(path, durability="process-crash") as store:
        connection.send("ready")
        while (numbers := connection.recv()) is not None:
            for number in numbers:
                store.mark_as_done(task_id(number), number)
            connection.send("done")


def iterate(settings: Settings) -> Report:
    small, large = settings.size(1_000, 200), settings.size(100_000, 2_000)
    rounds, each = settings.size(3, 1), settings.size(7, 2)
    groups, start = [], 0
    for size in ([small] * each + [large]) * rounds:
        groups.append(range(start, start + size))
        start += size
    arms = {size: Arm(f"{size:,} tasks", "us CPU a task") for size in (small, large)}
    walls = {size: Arm(f"{size:,} tasks, elapsed", "us a task") for size in (small, large)}
    with settings.place() as folder:
        path = str(folder / "store.db")
        seed(path, range(start), groups={f"g{numbers.start}": numbers for numbers in groups})
        with ResultStore(path, durability="process-crash") as store, Child(in_order, path) as child:
            child.receive()
            keep_writeback_out()
            for index, numbers in enumerate(groups):
                if index % (each + 1) == 0:
                    for arm in (*arms.values(), *walls.values()):
                        arm.blocks.append([])
                cpu, wall = _iterate_one(store, child, numbers)
                arms[len(numbers)].blocks[-1].append(cpu)
                walls[len(numbers)].blocks[-1].append(wall)
            floor = _floor(store, start, settings.size(5, 1))
    claims = [Claim.of(f"cost a task at {large:,} to that at {small:,}", ratio(arms[large], arms[small]), 1.3)]
    notes = ["cost is the CPU time of the process that iterates; elapsed time is the writer's, one commit a task"]
    return Report(
        "iterate tasks while another process finishes them", [*arms.values(), *walls.values(), floor], claims, notes
    )


def _iterate_one(store: ResultStore, child: Child, numbers: range) -> tuple[float, float]:
    group: Any = store.restore_group(f"g{numbers.start}")
    began, used = time.perf_counter(), time.process_time()
    child.send(numbers)
    values = list(group.iterate(timeout=600))
    cpu, wall = time.process_time() - used, time.perf_counter() - began
    check(child.receive() == "done", "the writer stopped")
    check(values == list(numbers), "not every value came, or not in order of completion")
    return cpu / len(numbers) * 1e6, wall / len(numbers) * 1e6


def _floor(store: ResultStore, total: int, rounds: int) -> Arm:
    import sqlite3

    connection = sqlite3.connect(store.path)
    arm = Arm("bare SELECT in order of completion + json.loads (floor)", "us a task")
    query = "SELECT result FROM tasks WHERE done_number IS NOT NULL ORDER BY done_number"
    for _ in range(rounds):
        spent, values = once(lambda: [json.loads(row[0]) for row in connection.execute(query)])
        check(len(values) == total, "rows are missing")
        arm.blocks.append([spent / total])
    connection.close()
    return arm


# Counting


def counts(settings: Settings) -> Report:
    small, large = 100, settings.size(1_000_000, 20_000)
    rounds, block = settings.size(20, 2), settings.size(200, 20)
    works: dict[str, Callable[[int], list[float]]] = {}
    path = settings.half_finished(large)
    _add_group(path, small)
    with ResultStore(path, durability="process-crash") as store:
        for group_id, size in (("few", small), ("all", large)):
            group: Any = store.restore_group(group_id)
            check(group.completed_count() == size // 2, f"{group.completed_count()} of {size} counted")
            check(not group.ready() and group.waiting() and not group.failed(), "the counts are wrong")
            works[f"ready(), {size:,} members"] = lambda _, group=group: timed(lambda _: group.ready(), range(block))
            works[f"completed_count(), {size:,} members"] = lambda _, group=group: timed(
                lambda _: group.completed_count(), range(block)
            )
        bare = store._db.connection()
        query = "SELECT done FROM groups WHERE number = ?"
        works["bare SELECT of one row (floor)"] = lambda _: timed(
            lambda _: bare.execute(query, (1,)).fetchall(), range(block)
        )
        arms = in_turn(works, rounds)
    claims = [
        Claim.of(f"{verb} of {large:,} members to of {small}", ratio(arms[2 + index], arms[index]), 1.1)
        for index, verb in enumerate(("ready()", "completed_count()"))
    ]
    notes = ['"the same" is taken as within a tenth']
    return Report("count a stored group, half of it finished", arms, claims, notes)


def _add_group(path: str, size: int) -> None:
    with ResultStore(path, durability="process-crash") as store:
        store.create_group([task_id(number) for number in range(size)], group_id="few")
