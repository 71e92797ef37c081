"""Finishing tasks: alone, in a large file, and among other writers."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from liteerresult import AsyncResult, ResultStore

from .floors import BareTable, WalSync, frames_of_a_finish
from .harness import (
    RESULT,
    Arm,
    Claim,
    Report,
    Settings,
    check,
    constant,
    count_done,
    crowd,
    in_turn,
    keep_writeback_out,
    once,
    ratio,
    seed,
    task_id,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.connection import Connection
    from pathlib import Path


def finish(settings: Settings) -> Report:
    rounds, block = settings.size(20, 2), settings.size(250, 20)
    many = settings.size(1000, 50)
    single = rounds * block
    spare = 20
    total = single + spare + rounds * many
    arms: dict[str, Arm] = {}
    with settings.place() as folder:
        frames = 0
        for durability, synchronous in (("process-crash", "NORMAL"), ("power-loss", "FULL")):
            path = str(folder / f"{durability}.db")
            seed(path, range(total), groups={"all": range(total)})
            with (
                ResultStore(path, durability=durability) as store,  # type: ignore[arg-type]
                BareTable(str(folder / f"bare-{synchronous}.db"), range(single + rounds * many), synchronous) as bare,
                contextlib.ExitStack() as stack,
            ):
                frames = frames_of_a_finish(store, list(range(single, single + spare)), RESULT)
                works: dict[str, Callable[[int], list[float]]] = {
                    f"liteerresult, {durability}": _finish(store, block),
                    f"bare UPDATE, {synchronous}": lambda number, bare=bare: timed(
                        bare.update, range(number * block, (number + 1) * block)
                    ),
                    f"{many:,} in one call, each, {durability}": _finish_many(store, many, single + spare),
                    f"{many:,} bare UPDATEs in one transaction, each, {synchronous}": lambda number, bare=bare: [
                        once(lambda: bare.update_many(range(single + number * many, single + (number + 1) * many)))[0]
                        / many
                    ],
                }
                if durability == "process-crash":
                    works |= _huey(stack, folder, block)
                else:
                    log = stack.enter_context(WalSync(str(folder / "log"), frames))
                    works["bare WAL sync (floor)"] = lambda _, log=log: timed(log.commit, range(block))
                keep_writeback_out()
                arms |= {arm.label: arm for arm in in_turn(works, rounds)}
                check(bare.done() == single + rounds * many, "the bare table lacks results")
                group = store.restore_group("all")
                check(group is not None and group.ready() and group.completed_count() == total, "finishes are missing")
                check(AsyncResult(task_id(single - 1), store).get(timeout=0) == RESULT, "the value came back changed")
    return Report(
        "one mark_as_done of a group member", list(arms.values()), _finish_claims(arms, many),
        [] if "huey put_result, fsync off" in arms else ["huey is not installed: not compared"],
    )  # fmt: skip


def _finish_claims(arms: dict[str, Arm], many: int) -> list[Claim]:
    crash, power = arms["liteerresult, process-crash"], arms["liteerresult, power-loss"]
    claims = [Claim.of("process-crash: to a bare UPDATE, NORMAL", ratio(crash, arms["bare UPDATE, NORMAL"]), 2)]
    if "huey put_result, fsync off" in arms:
        claims.append(
            Claim.of(
                "process-crash: to huey's put_result, fsync off", ratio(crash, arms["huey put_result, fsync off"]), 1
            )
        )
    claims.append(Claim.of("power-loss: to a bare UPDATE, FULL", ratio(power, arms["bare UPDATE, FULL"]), 1.1))
    claims += [
        Claim(
            f"{many:,} in one call, each, {durability}", arms[f"{many:,} in one call, each, {durability}"].p50, 4, "us"
        )
        for durability in ("process-crash", "power-loss")
    ]
    return claims


def _finish(store: ResultStore, block: int) -> Callable[[int], list[float]]:
    def work(number: int) -> list[float]:
        return timed(
            lambda index: store.mark_as_done(task_id(index), RESULT), range(number * block, (number + 1) * block)
        )

    return work


def _finish_many(store: ResultStore, many: int, first: int) -> Callable[[int], list[float]]:
    def work(number: int) -> list[float]:
        start = first + number * many
        results = {task_id(index): RESULT for index in range(start, start + many)}
        return [once(lambda: store.mark_many_as_done(results))[0] / many]

    return work


def _huey(stack: contextlib.ExitStack, folder: Path, block: int) -> dict[str, Callable[[int], list[float]]]:
    try:
        from huey import SqliteHuey
    except ImportError:
        return {}
    huey = SqliteHuey(filename=str(folder / "huey.db"), fsync=False)
    stack.callback(huey.storage.close)

    def work(number: int) -> list[float]:
        samples = timed(
            lambda index: huey.put_result(task_id(index), RESULT), range(number * block, (number + 1) * block)
        )
        check(huey.result(task_id(number * block), preserve=True) == RESULT, "huey lost a result")
        return samples

    return {"huey put_result, fsync off": work}


# Growth


def growth(settings: Settings) -> Report:
    sizes = settings.size(10_000, 500), settings.size(1_000_000, 20_000)
    rounds, block = settings.size(10, 2), settings.size(200, 20)
    works: dict[str, Callable[[int], list[float]]] = {}
    with settings.place() as folder, contextlib.ExitStack() as stack:
        for size in sizes:
            # Finished tasks are even, unfinished ones odd; both at random, so that no page is warmer than in life.
            order = random.Random(size).sample(range(1, size, 2), rounds * block)
            path = str(folder / f"{size}.db")
            _copy(settings.half_finished(size), path)
            store = stack.enter_context(ResultStore(path, durability="process-crash"))
            bare = stack.enter_context(BareTable(str(folder / f"bare-{size}.db"), range(size), finished=True))
            works[f"finish, {size:,} tasks"] = lambda number, store=store, order=order: timed(
                lambda index: store.mark_as_done(task_id(index), RESULT), order[number * block : (number + 1) * block]
            )
            works[f"get, {size:,} tasks"] = lambda number, store=store, order=order: timed(
                lambda index: _get(store, index - 1), order[number * block : (number + 1) * block]
            )
            works[f"bare UPDATE, {size:,} rows (floor)"] = lambda number, bare=bare, order=order: timed(
                bare.update, order[number * block : (number + 1) * block]
            )
            works[f"bare SELECT, {size:,} rows (floor)"] = lambda number, bare=bare, order=order: timed(
                bare.result, order[number * block : (number + 1) * block]
            )
        keep_writeback_out()
        arms = in_turn(works, rounds)
        for size in sizes:
            check(count_done(str(folder / f"{size}.db")) == size // 2 + rounds * block, "finishes are missing")
    small, large = arms[:4], arms[4:]
    claims = [
        Claim.of(f"{verb} among {sizes[1]:,} to among {sizes[0]:,}", ratio(large[index], small[index]), 1.3)
        for index, verb in enumerate(("finish", "get"))
    ]
    notes = [
        f"a {what} slows by {ratio(large[index], small[index]).value:.2f} x"
        for index, what in ((2, "bare UPDATE"), (3, "bare SELECT"))
    ]
    return Report("finish and get (process-crash) in a large file", arms, claims, notes)


def _copy(source: str, target: str) -> None:
    import shutil

    shutil.copy(source, target)  # closed, and its log is empty


def _get(store: ResultStore, number: int) -> None:
    if AsyncResult(task_id(number), store).get(timeout=0) != RESULT:
        check(False, f"task {number} came back changed")


# Writers

KINDS = {
    "liteerresult, power-loss": "power-loss",
    "SQLite FULL, busy_timeout": "FULL",
    "liteerresult, process-crash": "process-crash",
    "SQLite NORMAL, busy_timeout": "NORMAL",
}


def committer(connection: Connection, kind: str, path: str, share: int, number: int) -> None:
    """Commit one task after the other from a given time on, for some seconds; send how long each took, in us."""
    with contextlib.ExitStack() as stack:
        if kind in ("FULL", "NORMAL"):
            commit: Callable[[int], object] = stack.enter_context(BareTable(path, synchronous=kind)).update
            rows: Callable[[range], Iterable[int]] = itertools.cycle  # its rows can be finished again
        else:
            store = stack.enter_context(ResultStore(path, durability=kind))  # type: ignore[arg-type]
            commit = lambda index: store.mark_as_done(task_id(index), RESULT)  # noqa: E731
            rows = iter
        connection.send("ready")
        while (command := connection.recv()) is not None:
            begin, seconds = command
            tasks = rows(range(number * share, (number + 1) * share))
            connection.send(commit_for(commit, tasks, begin, seconds))


def commit_for(commit: Callable[[int], object], tasks: Iterable[int], begin: float, seconds: float) -> list[float]:
    time.sleep(max(0.0, begin - time.monotonic()))
    deadline = begin + seconds
    samples: list[float] = []
    last = time.perf_counter_ns()
    for index in tasks:
        commit(index)
        now = time.perf_counter_ns()
        samples.append((now - last) / 1000)
        last = now
        if time.monotonic() >= deadline:
            break
    return samples


def race(settings: Settings, kind: str, size: int, seconds: float) -> tuple[float, float, list[float]]:
    """Return commits a second, the slowest of them in ms, and all of them in us, of *size* processes of a kind."""
    share = int(seconds * 60_000 / size) + 2_000  # more than it can finish
    with settings.place() as folder:
        path = str(folder / "file.db")
        if kind in ("FULL", "NORMAL"):
            BareTable(path, range(size * share)).close()
        else:
            seed(path, range(size * share))
        keep_writeback_out()
        with crowd(size, committer, kind, path, share) as children:
            begin = time.monotonic() + 0.1
            for child in children:
                child.send((begin, seconds))
            answers = [child.receive(seconds + 120) for child in children]
        samples = [sample for answer in answers for sample in answer]
        if kind in ("FULL", "NORMAL"):
            wanted = sum(min(share, len(answer)) for answer in answers)
        else:
            check(max(map(len, answers)) < share, "a writer ran out of tasks: make its share larger")
            wanted = len(samples)
        check(count_done(path) == wanted, f"{wanted} tasks acknowledged, {count_done(path)} found")
    # From the common start to the end of each: a writer that is starved to the end counts with what it got.
    rate = sum(len(answer) / max(seconds, sum(answer) / 1e6) for answer in answers)
    return rate, max(samples) / 1000, samples


def writers(settings: Settings) -> Report:
    size, rounds, seconds = settings.size(16, 4), settings.size(3, 1), settings.size(3, 1) * 1.0
    rates = {label: Arm(label, "commits/s") for label in KINDS}
    slowest = {label: Arm(f"{label}: slowest", "ms") for label in KINDS}
    usual = {label: Arm(f"{label}: one commit", "us") for label in KINDS}
    for number in range(rounds):
        labels = list(KINDS)
        for label in labels[number % 4 :] + labels[: number % 4]:
            rate, worst, samples = race(settings, KINDS[label], size, seconds)
            rates[label].blocks.append([rate])
            slowest[label].blocks.append([worst])
            usual[label].blocks.append(samples)
    ours, bare = "liteerresult, power-loss", "SQLite FULL, busy_timeout"
    gain = ratio(rates[ours], rates[bare])
    claims = [
        Claim(f"{size} writers, power-loss: commits/s to SQLite FULL", gain.value, 4, "x", gain, at_least=True),
        Claim.of(
            f"{size} writers, power-loss: slowest commit to SQLite FULL's", ratio(slowest[ours], slowest[bare]), 0.1
        ),
    ]
    threads = [_threads(settings, count, rounds, seconds) for count in (1, size)]
    arms = [*rates.values(), *slowest.values(), *usual.values(), *threads, _floor(settings)]
    return Report(
        f"{size} processes, one commit a task",
        arms,
        claims,
        [],
        {} if settings.quick else _sweep(settings, rates, size),
    )


def _threads(settings: Settings, size: int, rounds: int, seconds: float) -> Arm:
    """Threads of one process, power-loss, one call a task: they commit together."""
    arm = Arm(f"liteerresult, power-loss, {size} thread{'s' * (size > 1)} of one process", "commits/s")
    share = int(seconds * 60_000 / size) + 2_000
    for _ in range(rounds):
        with settings.place() as folder:
            path = str(folder / "file.db")
            seed(path, range(size * share))
            keep_writeback_out()
            with ResultStore(path) as store, ThreadPoolExecutor(size) as pool:
                begin = time.monotonic() + 0.1
                finish = lambda index, store=store: store.mark_as_done(task_id(index), RESULT)  # noqa: E731
                futures = [
                    pool.submit(commit_for, finish, range(number * share, (number + 1) * share), begin, seconds)
                    for number in range(size)
                ]
                answers = [future.result() for future in futures]
            wanted = sum(map(len, answers))
            check(max(map(len, answers)) < share, "a thread ran out of tasks: make its share larger")
            check(count_done(path) == wanted, f"{wanted} tasks acknowledged, {count_done(path)} found")
        arm.blocks.append([sum(len(answer) / max(seconds, sum(answer) / 1e6) for answer in answers)])
    return arm


def _floor(settings: Settings) -> Arm:
    count = settings.size(1000, 50)
    with settings.place() as folder, WalSync(str(folder / "log"), 4) as log:
        return constant(
            "one process's bare WAL syncs, one after the other (floor)",
            1e6 / statistics.mean(timed(log.commit, range(count))),
            "commits/s",
        )


def _sweep(settings: Settings, rates: dict[str, Arm], size: int) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {label: [] for label in KINDS}
    for count in (1, 2, 4, 8):
        for label, kind in KINDS.items():
            series[label].append((count, statistics.median(race(settings, kind, count, 1.5)[0] for _ in range(2))))
    for label, arm in rates.items():
        series[label].append((size, arm.p50))
    return series
