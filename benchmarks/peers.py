"""
The same work by others, each where it is installed, set up as its own documentation says.

Durable is compared with durable: what survives power loss once acknowledged, and what survives the death
of processes only. README.md here says how each peer is brought to either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import sqlite3
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from liteerresult import AsyncResult, ResultStore

from .floors import BareTable
from .harness import (
    RESULT,
    Arm,
    Child,
    Report,
    Settings,
    check,
    crowd,
    in_turn,
    keep_writeback_out,
    once,
    ratio,
    task_id,
)
from .waking import gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

CRASH, POWER = "process-crash", "power-loss"
TIMEOUT = 30.0


class Client:
    """One process's connection to a peer: stores results and waits for them."""

    def __init__(
        self, store: Callable[[str, Any], object], get: Callable[[str], Any], close: Callable[[], object]
    ) -> None:
        self.store, self.get, self.close = store, get, close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _ours(durability: str) -> Callable[[str], Client]:
    def client(address: str) -> Client:
        store = ResultStore(address, durability=durability)  # type: ignore[arg-type]
        return Client(store.mark_as_done, lambda task: AsyncResult(task, store).get(timeout=TIMEOUT), store.close)

    return client


def _poller(address: str) -> Client:
    import json

    table = BareTable(address)
    insert = "INSERT INTO tasks VALUES (?, 'DONE', ?)"
    connection = table.connection

    def get(task: str) -> Any:
        deadline, seen = time.monotonic() + TIMEOUT, None
        while time.monotonic() < deadline:
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            if version != seen:
                seen = version
                rows = connection.execute("SELECT result FROM tasks WHERE id = ?", (task,)).fetchall()
                if rows:
                    return json.loads(rows[0][0])
            time.sleep(0.001)
        raise TimeoutError(task)

    return Client(lambda task, value: connection.execute(insert, (task, json.dumps(value))), get, table.close)


def _huey(fsync: bool) -> Callable[[str], Client]:
    def client(address: str) -> Client:
        from huey import SqliteHuey

        huey = SqliteHuey(filename=address, fsync=fsync)
        return Client(
            huey.put_result, lambda task: huey.result(task, blocking=True, timeout=TIMEOUT), huey.storage.close
        )

    return client


def _diskcache(synchronous: int) -> Callable[[str], Client]:
    def client(address: str) -> Client:
        from diskcache import Cache

        cache = Cache(address, sqlite_synchronous=synchronous)
        missing = object()

        def get(task: str) -> Any:
            deadline = time.monotonic() + TIMEOUT
            while time.monotonic() < deadline:
                value = cache.get(task, missing)
                if value is not missing:
                    return value
                time.sleep(0.001)  # as its own Lock does: it has no other way to wait
            raise TimeoutError(task)

        return Client(cache.set, get, cache.close)

    return client


def _celery(address: str) -> Client:
    from celery import Celery

    app = Celery("bench", broker="memory://", backend=address, set_as_current=False)
    return Client(
        app.backend.mark_as_done,
        lambda task: app.AsyncResult(task).get(timeout=TIMEOUT),
        app.close,
    )


@dataclass(frozen=True)
class Peer:
    """
    One of those compared.

    Attributes:
        client: Makes a client of an address.
        address: Of what it stores in, in a folder; a redis-server's policy for syncing instead.
        modules: What must be installed.
    """

    label: str
    durability: str
    client: Callable[[str], Client]
    address: str
    modules: tuple[str, ...] = ()
    redis: str | None = None

    @property
    def name(self) -> str:
        return f"{self.label}, {self.durability}"

    def missing(self) -> list[str]:
        missing = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if self.redis and not shutil.which("redis-server"):
            missing.append("redis-server")
        return missing


PEERS = [
    Peer("liteerresult", CRASH, _ours(CRASH), "{}/ours-crash.db"),
    Peer("liteerresult", POWER, _ours(POWER), "{}/ours-power.db"),
    Peer("1 ms data_version poller", CRASH, _poller, "{}/poller.db"),
    Peer("huey SqliteHuey, fsync=False", CRASH, _huey(False), "{}/huey-off.db", ("huey",)),
    Peer("huey SqliteHuey, fsync=True", POWER, _huey(True), "{}/huey-on.db", ("huey",)),
    Peer("diskcache", CRASH, _diskcache(1), "{}/diskcache-normal", ("diskcache",)),
    Peer("diskcache, synchronous=FULL", POWER, _diskcache(2), "{}/diskcache-full", ("diskcache",)),
    Peer("Celery filesystem", CRASH, _celery, "file://{}/celery-files", ("celery",)),
    Peer("Celery SQLAlchemy on SQLite", POWER, _celery, "db+sqlite:///{}/celery.db", ("celery", "sqlalchemy")),
    Peer("Celery Redis, appendfsync everysec", CRASH, _celery, "redis", ("celery", "redis"), "everysec"),
    Peer("Celery Redis, appendfsync always", POWER, _celery, "redis", ("celery", "redis"), "always"),
]
BY_NAME = {peer.name: peer for peer in PEERS}


@contextlib.contextmanager
def redis_server(folder: Path, policy: str) -> Iterator[str]:
    """Run a redis-server of our own on a free port of this host; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = folder / f"redis-{policy}"
    place.mkdir()
    options = {"port": port, "bind": "127.0.0.1", "dir": place, "appendonly": "yes", "appendfsync": policy, "save": ""}
    command = ["redis-server", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_port(server, port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _await_port(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        check(server.poll() is None, "redis-server ended at once")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(16).startswith(b"+PONG"):
                return
        time.sleep(0.02)
    check(False, "redis-server does not answer")


@contextlib.contextmanager
def present(settings: Settings) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield name to address of the peers that are here, and notes on those that are not."""
    notes, addresses = [], {}
    with settings.place() as folder, contextlib.ExitStack() as stack:
        for peer in PEERS:
            missing = peer.missing()
            if missing:
                notes.append(f"{peer.label}: not here ({', '.join(missing)})")
                continue
            if peer.redis:
                address = stack.enter_context(redis_server(folder, peer.redis))
            else:
                address = peer.address.format(folder)
            if peer.client is _poller:
                BareTable(address).close()
            if address.startswith("file://"):
                (folder / "celery-files").mkdir()
            with peer.client(address) as client:  # its tables are made once, before anybody hurries
                client.store(task_id(0), RESULT)
                check(client.get(task_id(0)) == RESULT, f"{peer.name} returned another value")
            addresses[peer.name] = address
        yield addresses, notes


def _report(work: str, arms: list[Arm], notes: list[str], unit_is_rate: bool = False) -> Report:
    for durability in (CRASH, POWER):
        ours = next(arm for arm in arms if arm.label == f"liteerresult, {durability}")
        for arm in arms:
            if arm is not ours and arm.label.endswith(durability):
                times = ratio(ours, arm).value if unit_is_rate else ratio(arm, ours).value
                notes.append(f"{times:.3g} x {arm.label}")
    return Report(work, arms, [], notes)


# Wake


def storer(connection: Connection, name: str, address: str) -> None:
    """Store the results it is told to, each with the time when that began as its value."""
    with BY_NAME[name].client(address) as client:
        connection.send("ready")
        while (command := connection.recv()) is not None:
            task, delay = command
            time.sleep(delay)
            client.store(task, time.monotonic_ns())


def wake(settings: Settings) -> Report:
    rounds, block, limit = settings.size(20, 1), settings.size(50, 3), settings.size(1, 1) * 1.0
    with present(settings) as (addresses, notes), contextlib.ExitStack() as stack:
        works: dict[str, Callable[[int], list[float]]] = {}
        for index, (name, address) in enumerate(addresses.items()):
            child = stack.enter_context(Child(storer, name, address))
            child.receive()
            client = stack.enter_context(BY_NAME[name].client(address))
            works[name] = _wakes(client, child, block, limit, (index + 1) << 20)
        arms = in_turn(works, rounds)
    return _report("store in one process to value in another", arms, [*notes, "x: how much longer than liteerresult"])


def _wakes(client: Client, child: Child, block: int, limit: float, first: int) -> Callable[[int], list[float]]:
    def work(number: int) -> list[float]:
        samples = []
        deadline = time.monotonic() + limit
        for index in range(block):
            task = task_id(first + number * block + index)
            child.send((task, gap()))
            began = client.get(task)
            samples.append((time.monotonic_ns() - began) / 1000)
            check(0 < samples[-1] < TIMEOUT * 1e6, "the value is another's")
            if time.monotonic() > deadline:
                break
        return samples

    return work


# Finish


def finish(settings: Settings) -> Report:
    rounds, block, limit = settings.size(15, 1), settings.size(200, 10), 1.0
    with present(settings) as (addresses, notes), contextlib.ExitStack() as stack:
        works: dict[str, Callable[[int], list[float]]] = {}
        for index, (name, address) in enumerate(addresses.items()):
            client = stack.enter_context(BY_NAME[name].client(address))
            works[name] = _finishes(client, block, limit, (index + 1) << 20)
        keep_writeback_out()
        arms = in_turn(works, rounds)
    return _report("store one result under a new id", arms, [*notes, "x: how much longer than liteerresult"])


def _finishes(client: Client, block: int, limit: float, first: int) -> Callable[[int], list[float]]:
    def work(number: int) -> list[float]:
        samples: list[float] = []
        deadline = time.monotonic() + limit
        tasks = [task_id(first + number * block + index) for index in range(block)]
        for task in tasks:
            samples.append(once(lambda task=task: client.store(task, RESULT))[0])
            if time.monotonic() > deadline:
                break
        check(client.get(tasks[len(samples) - 1]) == RESULT, "the value came back changed")
        return samples

    return work


# Writers


def crowded(connection: Connection, name: str, address: str, first: int, number: int) -> None:
    """Store one result after the other for some seconds; send how long each took, in us, and how many were refused."""
    start = first + number * 1_000_000
    with BY_NAME[name].client(address) as client:
        client.store(task_id(start + 999_999), RESULT)  # connected
        connection.send("ready")
        while (command := connection.recv()) is not None:
            begin, seconds = command
            time.sleep(max(0.0, begin - time.monotonic()))
            samples, refused, index = [], 0, start
            while time.monotonic() < begin + seconds:
                try:
                    samples.append(once(lambda index=index: client.store(task_id(index), RESULT))[0])
                except (sqlite3.OperationalError, OSError, _errors()):
                    refused += 1
                index += 1
            connection.send((samples, refused, index - 1))


def _errors() -> type[BaseException]:
    try:
        from sqlalchemy.exc import OperationalError
    except ImportError:
        return OSError
    return OperationalError  # type: ignore[no-any-return]


def writers(settings: Settings) -> Report:
    size, rounds, seconds = settings.size(16, 2), settings.size(3, 1), settings.size(20, 5) / 10
    with present(settings) as (addresses, notes):
        arms = [Arm(name, "results/s") for name in addresses]
        slowest = [Arm(f"{name}: slowest", "ms") for name in addresses]
        for number in range(rounds):
            for arm, worst, (name, address) in zip(arms, slowest, addresses.items(), strict=True):
                keep_writeback_out()
                samples, refused = _crowd(name, address, size, seconds, (number + 1) * 100_000_000)
                arm.blocks.append([len(samples) / seconds])
                worst.blocks.append([max(samples) / 1000])
                if refused:
                    notes.append(f"{name}: {refused} of {len(samples) + refused} refused in round {number + 1}")
    notes = [*notes, "x: how many times its throughput"]
    report = _report(f"{size} processes store results", arms, notes, unit_is_rate=True)
    report.arms += slowest
    return report


def _crowd(name: str, address: str, size: int, seconds: float, first: int) -> tuple[list[float], int]:
    with crowd(size, crowded, name, address, first) as children:
        begin = time.monotonic() + 0.1
        for child in children:
            child.send((begin, seconds))
        answers = [child.receive(seconds + 180) for child in children]
    with BY_NAME[name].client(address) as client:
        for samples, refused, last in answers:
            if samples and not refused:
                check(client.get(task_id(last)) == RESULT, f"{name} lost a result")
    samples = [sample for answer in answers for sample in answer[0]]
    check(bool(samples), f"{name} stored nothing")
    return samples, sum(answer[1] for answer in answers)
