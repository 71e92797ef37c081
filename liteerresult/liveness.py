"""
Who is alive: each process that answers for tasks holds a lock that the kernel drops at its death.

The closing of a dead process's lock file is itself a file event, so waiters hear of a death as they
hear the bell. Nothing here depends on time, heartbeats or process ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from typing import TYPE_CHECKING

from .marks import Mark, Marks, read_marks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filelock import BaseFileLock

__all__ = ["Owners", "host_name", "owners_of", "parse_owner"]

SUFFIX = ".lock"
MARKS_SUFFIX = ".running"

# Lock objects that a forked child inherited: their release, or garbage collection, could drop the parent's lock.
_abandoned: list[object] = []
_owners: dict[str, Owners] = {}
_owners_guard = threading.Lock()


def host_name() -> str:
    """Return this host's name as owner ids have it."""
    return re.sub(r"[^\w.-]", "_", os.uname().nodename)


def parse_owner(owner: str) -> tuple[int | None, str | None]:
    """Return the process id and host name that an owner id tells, as far as it does."""
    match = re.match(r"(\d+)@(.*)-[0-9a-f]{32}\Z", owner)
    return (int(match[1]), match[2]) if match else (None, None)


class Owners:
    """
    The owners of one store's tasks: this process's own lock, and a look at the others'.

    A process has one for a store, whatever the number of objects it opened it with: see `owners_of`.

    Args:
        folder: Where the lock files are; made if it is not there.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        # Imported here rather than when first needed: a fork in the midst of an import blocks the child.
        from filelock import FileLock

        self._new_lock = FileLock
        self.users = 0
        """How many store objects use it."""
        self._reset()

    def _reset(self) -> None:
        self._guard = threading.Lock()
        self._lock: BaseFileLock | None = None
        self.own: str | None = None
        """This process's owner id, or None if it never asked for one."""
        self._marks: Marks | None = None

    def acquire(self) -> str:
        """Return this process's owner id, taking its lock at the first call."""
        if self.own is not None:
            return self.own
        with self._guard:
            if self.own is None:
                owner = f"{os.getpid()}@{host_name()}-{os.urandom(16).hex()}"
                os.makedirs(self.folder, exist_ok=True)
                # thread_local=False: any thread may release it. Nobody else knows the name yet, so no wait.
                self._lock = self._new_lock(self._path(owner), thread_local=False, fallback_to_soft=False, timeout=0)
                self._lock.acquire()
                self.own = owner
        return self.own

    def marks(self) -> Marks:
        """Return where this process notes which calls it makes."""
        owner = self.acquire()
        with self._guard:
            if self._marks is None:
                self._marks = Marks(self._path(owner, MARKS_SUFFIX))
            return self._marks

    def marks_of(self, owner: str) -> list[Mark]:
        """Return the calls that an owner noted last."""
        return read_marks(self._path(owner, MARKS_SUFFIX))

    def marks_of_the_living(self) -> Iterator[tuple[str, Mark]]:
        """Yield the calls that processes are making, each with its owner."""
        for owner in list(self.names()):
            for mark in self.marks_of(owner):
                if owner == self.own or self.is_alive(owner):
                    yield owner, mark

    def is_alive(self, owner: str) -> bool:
        """Tell whether *owner*'s process still holds its lock."""
        try:
            # Opened for reading only: closing a descriptor for writing would wake every waiter.
            fd = os.open(self._path(owner), os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as exc:
            if isinstance(exc, PermissionError):
                raise
            return False  # no such file, or no name that a file could have
        try:
            # Shared, so that two who look at once don't take each other for the owner.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def names(self) -> Iterator[str]:
        """Yield the ids of all owners that have a lock file, dead ones included."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                if name.endswith(SUFFIX):
                    yield name.removesuffix(SUFFIX)

    def discard(self, owner: str) -> None:
        """Delete the files of a dead owner whose tasks are settled."""
        for suffix in (MARKS_SUFFIX, SUFFIX):  # in this order: what has no lock is looked at by nobody
            with contextlib.suppress(OSError):
                os.unlink(self._path(owner, suffix))

    def is_stale(self) -> bool:
        """Tell whether this process's lock file was removed under it, with the whole store perhaps."""
        return self.own is not None and not os.path.exists(self._path(self.own))

    def leave(self) -> None:
        """Say that a store object is closed: the last one lets go of this process's own lock."""
        with _owners_guard:
            self.users -= 1
            if self.users <= 0:
                self.release()

    def release(self) -> None:
        """Let go of this process's own lock, if it has one."""
        with self._guard:
            lock, self._lock = self._lock, None
            marks, self._marks = self._marks, None
            self.own = None
        if marks is not None:
            marks.close()
        if lock is not None:
            lock.release(force=True)

    def after_fork_in_child(self) -> None:
        """Leave the parent's ownership to the parent: filelock closes the inherited descriptor unlocked."""
        _abandoned.append(self._lock)
        if self._marks is not None:
            self._marks.close()
        self._reset()

    def _path(self, owner: str, suffix: str = SUFFIX) -> str:
        return os.path.join(self.folder, owner.replace("/", "_") + suffix)


def owners_of(folder: str) -> Owners:
    """Return this process's view of the owners whose lock files are in *folder*, for one more store object."""
    with _owners_guard:
        owners = _owners.get(folder)
        if owners is None or owners.is_stale():
            owners = _owners[folder] = Owners(folder)
        owners.users += 1
    return owners


def _after_fork_in_child() -> None:
    global _owners_guard  # noqa: PLW0603 - another thread of the parent may have held it
    _owners_guard = threading.Lock()
    for owners in _owners.values():
        owners.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
