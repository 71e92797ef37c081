"""
Forks: nobody is inside SQLite while the process forks, and no connection is open.

SQLite keeps track of a process's file locks in its memory. A child would inherit that record without
the locks, so its own connections would take none, and its commits could vanish. So every Python-level
fork first waits for the threads that are inside, then closes all connections; parent and child open new
ones when they next need them. ``subprocess`` does not come here: what it starts shares no memory.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import weakref

__all__ = ["FORK_TIMEOUT", "ForkGate", "Forked"]

FORK_TIMEOUT = 30.0
"""How long a fork waits for other threads to leave SQLite, in seconds."""


class Forked(Protocol):
    """What has to prepare for a fork."""

    def before_fork(self) -> None:
        """Close what a child must not inherit."""
        ...

    def after_fork_in_child(self, *, clean: bool) -> None:
        """Start anew in the child; *clean* is False if the fork could not wait for all threads."""
        ...


class ForkGate:
    """
    Lets threads in and out, and holds them out while the process forks.

    Args:
        members: What to prepare.
    """

    def __init__(self, members: weakref.WeakSet[Forked]) -> None:
        self._members = members
        self.inside: set[int] = set()
        """Idents of the threads that are inside."""
        self.is_shut = False
        """True while it is shut."""
        self._reset()
        os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def _reset(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._shutting = threading.Lock()
        self._shutter: int | None = None
        self._clean = True

    def wait(self, ident: int) -> None:
        """
        Wait while it is shut, for a thread that has put itself `inside`.

        Going in and out is spelt out where it is done, without a call, so that Ctrl-C finds no gap in it.
        """
        while self.is_shut and self._shutter != ident:
            self.inside.discard(ident)
            self._open.wait()
            self.inside.add(ident)

    def shut(self) -> None:
        """Let nobody in, and wait until this thread is alone. `reopen` has to follow."""
        self._shutting.acquire()
        try:
            me = self._shutter = threading.get_ident()
            self._open.clear()
            self.is_shut = True
            deadline = time.monotonic() + FORK_TIMEOUT
            while self.inside - {me} and time.monotonic() < deadline:
                time.sleep(0.0002)
        except BaseException:
            self.reopen()
            raise

    def reopen(self) -> None:
        """Let everybody in again."""
        self.is_shut = False
        self._shutter = None
        self._open.set()
        self._shutting.release()

    def _before(self) -> None:
        self._clean = False  # until all is done: Python forks on even if this raises
        self.shut()
        if not self.inside:
            for member in list(self._members):
                member.before_fork()
            self._clean = True

    def _in_parent(self) -> None:
        if self._shutter == threading.get_ident():  # else shut() failed
            self.reopen()

    def _in_child(self) -> None:
        clean = self._clean
        self.inside.clear()
        self.is_shut = False
        self._reset()
        for member in list(self._members):
            member.after_fork_in_child(clean=clean)
