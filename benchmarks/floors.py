"""The least that the machine asks for the same work: what a figure is compared with."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .harness import RESULT_TEXT, check, task_id, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from liteerresult import ResultStore

WAL_PAGES = 2000
"""Where the log begins anew, as the store's does."""


class BareTable:
    """
    One table in a WAL database, one UPDATE a commit, with nothing around it.

    Args:
        path: The file; made and filled if it is not there.
        tasks: Numbers of the rows.
        synchronous: ``NORMAL`` or ``FULL``.
        finished: The rows have results already.
    """

    UPDATE = "UPDATE tasks SET status = 'DONE', result = ? WHERE id = ?"

    def __init__(
        self, path: str, tasks: Iterable[int] = (), synchronous: str = "NORMAL", *, finished: bool = False
    ) -> None:
        fresh = not Path(path).exists()
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)
        if fresh:
            self._fill(tasks, finished)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute(f"PRAGMA synchronous = {synchronous}")

    def _fill(self, tasks: Iterable[int], finished: bool) -> None:
        status, result = ("DONE", RESULT_TEXT) if finished else ("PENDING", None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = OFF")
        self.connection.execute("CREATE TABLE tasks (id TEXT PRIMARY KEY, status TEXT NOT NULL, result TEXT)")
        self.connection.execute("BEGIN")
        self.connection.executemany(
            "INSERT INTO tasks VALUES (?, ?, ?)", ((task_id(number), status, result) for number in tasks)
        )
        self.connection.execute("COMMIT")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def update(self, number: int) -> None:
        self.connection.execute(self.UPDATE, (RESULT_TEXT, task_id(number)))

    def update_many(self, numbers: Iterable[int]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(self.UPDATE, ((RESULT_TEXT, task_id(number)) for number in numbers))
        self.connection.execute("COMMIT")

    def result(self, number: int) -> str:
        rows = self.connection.execute("SELECT result FROM tasks WHERE id = ?", (task_id(number),)).fetchall()
        return rows[0][0]  # type: ignore[no-any-return]

    def done(self) -> int:
        return int(self.connection.execute("SELECT count(*) FROM tasks WHERE status = 'DONE'").fetchone()[0])

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class WalSync:
    """
    What a durable commit asks of the disk: append its frames to a log that begins anew now and then, and sync.

    Args:
        path: The log.
        frames: How many pages a commit changes.
        page_size: Their size in bytes.
    """

    def __init__(self, path: str, frames: int, page_size: int = 2048) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        frame = page_size + 24
        self._data = os.urandom(frame * frames)
        self._limit = frame * WAL_PAGES
        self._offset = 0

    def commit(self, _number: int = 0) -> None:
        os.pwrite(self._fd, self._data, self._offset)
        self._offset += len(self._data)
        if self._offset > self._limit:
            self._offset = 0
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def frames_of(path: str, commit: Callable[[int], object], numbers: Sequence[int]) -> float:
    """Commit with each number in a file whose log is short, and return how many pages each wrote to it, on average."""
    log = Path(path + "-wal")
    before = log.stat().st_size
    timed(commit, numbers)
    with Path(path).open("rb") as file:
        page_size = int.from_bytes(file.read(18)[16:], "big")
    frames = (log.stat().st_size - before) / len(numbers) / (page_size + 24)
    check(frames < 50, f"a commit wrote {frames} frames")
    return frames


def frames_of_a_finish(store: ResultStore, numbers: list[int], result: object) -> int:
    """Finish tasks of a store whose log is short, and return how many pages each commit wrote to it."""
    with contextlib.suppress(OSError):
        frames = frames_of(store.path, lambda number: store.mark_as_done(task_id(number), result), numbers)
        return max(1, round(frames))
    return 4
