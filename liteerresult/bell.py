"""
Waking: writers ring a bell file after their commit, waiters watch it.

Ringing is writing one byte to a file; on Linux the kernel tells every watcher of it (inotify). Who
waits for one task is not to be woken for all others, so there are `SHARDS` files in
``<database>-bells/``, and a task's id says which is its. Who waits for any task watches that folder.
``<database>-bell`` is heard by all: it is for changes of many tasks, and for writers that keep it simple.

A process has one inotify instance, because a user may have only 128, shared by its threads: the
thread that waits first reads for all of them and hands over when it leaves. asyncio loops read the
same instance by ``add_reader``. Where there is no inotify, waiters poll with back-off.
"""

from __future__ import annotations

import atexit
import binascii
import contextlib
import errno
import os
import select
import struct
import sys
import threading
import time
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import asyncio  # at run time only those who have imported it come here
    from collections.abc import Callable, Collection, Iterable

__all__ = ["FALLBACK_TICK", "SHARDS", "Bell", "Watch", "notification_in_use"]

FALLBACK_TICK = 0.25
"""
A waiter looks this often, in seconds, whether or not the bell rang: for writers that don't ring (plain
SQL) or died between commit and bell.
"""

SHARDS = 128
"""
Files among which the tasks are spread: a waiter is woken for its own task and for one in 128 others. A writer
opens each at first need and keeps it open.
"""

SHARDS_AT_MOST = 8
"""A change that more of them would have to hear of rings the bell that all hear."""

# struct inotify_event, and the flags of it that concern the instance itself: see inotify(7).
_EVENT = struct.Struct("iIII")
_CLOSE_WRITE = 0x8

_PASSING = 1 << 62
"""Beside an event mask: remove the watch once nobody listens."""
_Q_OVERFLOW, _IGNORED = 0x4000, 0x8000
_READ_SIZE = 4096

POLL_FIRST, POLL_LONGEST, POLL_GROWTH = 0.001, 0.05, 1.5
"""Back-off where there are no file events, in seconds."""

LONGEST_SLEEP = 86_400.0
"""Longest single sleep in seconds: the system's calls take no more than some weeks."""


class Watch:
    """
    One waiter's ear. Made armed: what is rung from now on is heard by the next `wait`.

    Attributes:
        names: Names of files in watched folders whose writer closed them since they were last taken.
    """

    __slots__ = ("_delay", "_fired", "_future", "_gate", "_hub", "_loop", "_pid", "_wds", "names")

    def __init__(self, hub: _Hub, paths: Collection[tuple[str, int]]) -> None:
        self.names: set[str] = set()
        self._hub = hub
        self._pid = os.getpid()
        self._fired = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None
        self._delay = POLL_FIRST
        self._wds = hub.arm(self, paths)

    def wait(self, timeout: float | None) -> bool:
        """Block until something was heard, and return True; or return False after *timeout* seconds."""
        if self._hub.fd is None:
            time.sleep(self._next_delay(timeout))
            return False
        return self._hub.wait(self, timeout)

    async def wait_async(self, timeout: float | None) -> bool:
        """Do the same without blocking the running loop, and without a thread."""
        if self._hub.fd is None:
            import asyncio

            await asyncio.sleep(self._next_delay(timeout))
            return False
        return await self._hub.wait_async(self, timeout)

    def fire(self) -> None:
        """Make a `wait` that is under way, or the next one, return."""
        self._hub.fire([self])

    def close(self) -> None:
        """Stop listening."""
        if self._pid == os.getpid():
            self._hub.disarm(self, self._wds)
        self._wds = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _next_delay(self, timeout: float | None) -> float:
        delay, self._delay = self._delay, min(self._delay * POLL_GROWTH, POLL_LONGEST)
        return delay if timeout is None else max(0.0, min(delay, timeout))


class _Hub:
    """The process's inotify instance and everybody who waits on it."""

    def __init__(self) -> None:
        self.fd: int | None = None
        self._mutex = threading.Lock()
        self._listeners: dict[int, set[Watch]] = {}
        self._paths: dict[str, int] = {}
        self._passing: set[str] = set()
        """Paths whose watch goes when nobody listens: their events are mostly for others."""
        self._leader: Watch | None = None
        self._followers: list[Watch] = []
        self._gone: deque[tuple[Watch | None, tuple[int, ...], tuple[str, ...]]] = deque()
        self._loops: dict[asyncio.AbstractEventLoop, int] = {}
        self._inotify: Any = None
        if sys.platform == "linux":
            self._open()

    def _open(self) -> None:
        import inotify_simple

        try:
            self._inotify = inotify_simple.INotify(nonblocking=True)
        except OSError as exc:
            warnings.warn(
                f"no file events ({exc.strerror}), so waiting polls: "
                "close other watchers, or raise fs.inotify.max_user_instances",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self.fd = self._inotify.fileno()
        self._poller = select.poll()
        self._poller.register(self.fd, select.POLLIN)
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller.register(self._kick, select.POLLIN)

    # Who listens to what

    def arm(self, watch: Watch, paths: Collection[tuple[str, int]]) -> tuple[int, ...]:
        if self.fd is None:
            return ()
        with self._mutex:
            self._drop_gone()
            if self._passing:
                self._drop_passing({path for path, _ in paths})
            self._read()  # what was heard before is not for the newcomer
            wds = []
            for path, mask in paths:
                wd = self._paths.get(path)
                if wd is None:
                    try:
                        wd = self._paths[path] = self._inotify.add_watch(path, mask & ~_PASSING)
                    except OSError:  # the limit of watches, or the file is gone: the tick remains
                        continue
                    if mask & _PASSING:
                        self._passing.add(path)
                self._listeners.setdefault(wd, set()).add(watch)
                wds.append(wd)
        return tuple(wds)

    def disarm(self, watch: Watch, wds: tuple[int, ...]) -> None:
        # The kernel's watch stays: adding and removing one costs more than an event nobody reads. Clearing up is
        # left to the next one that arms: who was woken has better things to do.
        self._gone.append((watch, wds, ()))

    def forget(self, paths: Iterable[str]) -> None:
        """Remove the kernel's watches of a store that is closed, unless someone still listens."""
        self._gone.append((None, (), tuple(paths)))
        self._clear_up()

    def _clear_up(self) -> None:
        # The garbage collector may come here while this very thread holds the mutex: then whoever takes it
        # next clears up.
        while self._gone and self._mutex.acquire(blocking=False):
            try:
                self._drop_gone()
            finally:
                self._mutex.release()

    def _drop_gone(self) -> None:
        while self._gone:
            watch, wds, paths = self._gone.popleft()
            for wd in wds:
                if watch is not None:
                    self._listeners.get(wd, set()).discard(watch)
            for path in paths:
                self._unwatch(path)

    def _drop_passing(self, wanted: set[str]) -> None:
        for path in self._passing - wanted:
            self._unwatch(path)

    def _unwatch(self, path: str) -> None:
        known = self._paths.get(path)
        if known is None:
            self._passing.discard(path)
        elif not self._listeners.get(known):
            del self._paths[path]
            self._passing.discard(path)
            self._listeners.pop(known, None)
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(known)

    # Hearing

    def _read(self) -> None:
        """Read what the kernel has for us and mark who is meant. Called with the mutex held."""
        try:
            data = os.read(self.fd, _READ_SIZE)  # type: ignore[arg-type]
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            wd, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = data[offset : offset + length].rstrip(b"\0").decode(errors="surrogateescape") if length else ""
            offset += length
            self._hear(wd, mask, name)
        if len(data) > _READ_SIZE // 2:
            self._read()  # there may be more

    def _hear(self, wd: int, mask: int, name: str) -> None:
        if mask & _Q_OVERFLOW:
            self._mark({watch for listeners in self._listeners.values() for watch in listeners})
            return
        if mask & _IGNORED:  # the file was removed; the next waiter arms anew
            self._paths = {path: known for path, known in self._paths.items() if known != wd}
        listeners = self._listeners.get(wd, ())
        if name and mask & _CLOSE_WRITE:
            for watch in listeners:
                watch.names.add(name)
        self._mark(listeners)

    def _mark(self, watches: Iterable[Watch]) -> None:
        for watch in watches:
            watch._fired = True
            if watch is self._leader:
                os.eventfd_write(self._kick, 1)  # it sits in poll(), and somebody else read its event
            if watch in self._followers:
                self._followers.remove(watch)
                watch._gate.release()
            if watch._loop is not None and watch._future is not None:
                with contextlib.suppress(RuntimeError):  # its loop was closed
                    watch._loop.call_soon_threadsafe(_resolve, watch._future)

    def fire(self, watches: Iterable[Watch]) -> None:
        with self._mutex:
            self._mark(watches)

    def wait(self, watch: Watch, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        leading = alone = False
        try:
            while True:
                with self._mutex:
                    if watch._fired:
                        watch._fired = False
                        return True
                    remaining = None if deadline is None else deadline - time.monotonic()
                    if remaining is not None and remaining <= 0:
                        return False
                    leading = self._leader is None
                    if leading:
                        self._leader = watch
                    else:
                        self._followers.append(watch)
                if leading:
                    longest = LONGEST_SLEEP if remaining is None else min(remaining, LONGEST_SLEEP)
                    polled = self._poller.poll(1000 * longest)
                    with self._mutex:
                        self._leader, leading = None, False
                        self._take(polled)
                        if watch._fired and not self._followers:
                            watch._fired = False
                            alone = True
                            return True
                else:
                    self._follow(watch, remaining)
        finally:
            if not alone:
                self._hand_over(leading=leading)

    def _hand_over(self, *, leading: bool) -> None:
        with self._mutex:
            if leading:
                self._leader = None
            if self._leader is None and self._followers:
                self._followers.pop()._gate.release()  # the next one leads

    def _take(self, polled: list[tuple[int, int]]) -> None:
        for fd, _ in polled:
            if fd == self.fd:
                self._read()
            else:
                os.eventfd_read(self._kick)

    def _follow(self, watch: Watch, timeout: float | None) -> None:
        try:
            woken = watch._gate.acquire(timeout=LONGEST_SLEEP if timeout is None else min(timeout, LONGEST_SLEEP))
        except BaseException:
            woken = False
            raise
        finally:
            if not woken:
                with self._mutex:
                    if watch in self._followers:
                        self._followers.remove(watch)
                    else:  # released just now
                        watch._gate.acquire(blocking=False)

    async def wait_async(self, watch: Watch, timeout: float | None) -> bool:
        import asyncio

        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._mutex:
            self._read()
            if watch._fired:
                watch._fired = False
                return True
            watch._loop, watch._future = loop, future
            self._loops[loop] = self._loops.get(loop, 0) + 1
            if self._loops[loop] == 1:
                loop.add_reader(self.fd, self._readable)  # type: ignore[arg-type]
        timer = None if timeout is None else loop.call_later(min(max(timeout, 0.0), LONGEST_SLEEP), _resolve, future)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            with self._mutex:
                watch._loop = watch._future = None
                fired, watch._fired = watch._fired, False
                self._loops[loop] -= 1
                if not self._loops[loop]:
                    del self._loops[loop]
                    loop.remove_reader(self.fd)  # type: ignore[arg-type]
        return fired

    def _readable(self) -> None:
        with self._mutex:
            self._read()

    def close(self) -> None:
        if self.fd is not None:
            self._inotify.close()
            os.close(self._kick)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_hub: _Hub | None = None
_hub_guard = threading.Lock()


def _the_hub() -> _Hub:
    global _hub  # noqa: PLW0603 - one per process is the point
    if _hub is None:
        with _hub_guard:
            if _hub is None:
                _hub = _Hub()
    return _hub


def _after_fork_in_child() -> None:
    # The inherited instance shares its queue with the parent: reading it would steal the parent's events.
    global _hub, _hub_guard
    if _hub is not None:
        _hub.close()
    _hub, _hub_guard = None, threading.Lock()


def _at_exit() -> None:
    if _hub is not None:
        _hub.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)


def notification_in_use() -> str:
    """Return how this process is woken: ``"inotify"`` or ``"polling"``."""
    return "polling" if _the_hub().fd is None else "inotify"


class Bell:
    """
    The bell of one store.

    Args:
        path: The database.
        open_file: Opens (creates) a file beside the database for writing, given what its name ends with.
        folder: A folder in which the closing of files is heard too, by their names.
    """

    def __init__(self, path: str, open_file: Callable[[str], int], folder: str) -> None:
        self._path = path
        self._open_file = open_file
        self._closed = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(path + _SHARDS)
        self._fds = {_EVERYBODY: open_file(_EVERYBODY)}
        everybody = path + _EVERYBODY
        self._folders = (path + _SHARDS, folder)
        self._channels: tuple[tuple[str, int], ...] = ()
        if sys.platform == "linux":
            # Imported here rather than when first needed: a fork in the midst of an import blocks the child.
            from inotify_simple import flags

            self._modify = int(flags.MODIFY)
            self._channels = ((everybody, self._modify), (folder, _CLOSE_WRITE))

    def ring(self, task_ids: Collection[str] | None = None) -> None:
        """
        Wake who waits for one of these tasks, or for any. What can't be rung is found by the fallback tick.

        Args:
            task_ids: The tasks; None wakes everybody who watches.
        """
        try:
            for name in self._names(task_ids):
                fd = self._fds.get(name)
                os.pwrite(self._open(name) if fd is None else fd, b"\n", 0)
        except OSError:  # no more files can be opened, say
            with contextlib.suppress(OSError):
                os.pwrite(self._fds.get(_EVERYBODY, -1), b"\n", 0)

    def _names(self, task_ids: Collection[str] | None) -> Collection[str]:
        if task_ids is None or not self._channels:
            return (_EVERYBODY,)
        if len(task_ids) == 1:
            (task_id,) = task_ids
            return (shard_of(task_id),)
        names = {shard_of(task_id) for task_id in task_ids}
        return names if len(names) <= SHARDS_AT_MOST else (_EVERYBODY,)

    def _open(self, name: str) -> int:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fd = self._open_file(name)
        known = self._fds.setdefault(name, fd)  # no lock: a child that was forked meanwhile would wait for it
        if known != fd:
            os.close(fd)
        return known

    def watch(self, task_id: str | None = None) -> Watch:
        """
        Return an armed watch: close it, or use it as a context manager.

        Args:
            task_id: The task that is waited for; None to hear of all.
        """
        if not self._channels:
            return Watch(_the_hub(), ())
        if task_id is None:
            return Watch(_the_hub(), (*self._channels, (self._path + _SHARDS, self._modify)))
        name = shard_of(task_id)
        if name not in self._fds:
            with contextlib.suppress(OSError):  # what can't be made can't be rung either: the tick remains
                self._open(name)
        return Watch(_the_hub(), (*self._channels, (self._path + name, self._modify | _PASSING)))

    def close(self) -> None:
        """Close the bell for good."""
        self._closed = True
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)
        if _hub is not None and _hub.fd is not None:
            _hub.forget((*self._folders, *(self._path + name for name in fds)))


_EVERYBODY = "-bell"
_SHARDS = "-bells"
_NAMES = tuple(f"{_SHARDS}/{number:02x}" for number in range(SHARDS))


def shard_of(task_id: str) -> str:
    """Return what the name of a task's bell file ends with."""
    return _NAMES[binascii.crc32(task_id.encode()) % SHARDS]
