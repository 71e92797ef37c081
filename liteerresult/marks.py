"""
What a worker is at, in a file that outlives it.

Calls that take less than some milliseconds are recorded together, after the fact. Which of them a worker was
making when it was killed stands in ``<owner>.running``, beside the lock that tells of its death: a write of
some bytes for each call, kept by the kernel whatever becomes of the process.
"""

from __future__ import annotations

import os
import struct
import threading

__all__ = ["Marks", "read_marks"]

_SLOT = struct.Struct("<qq")  # a row's number, which is never 0, and the attempt
_NOTHING = _SLOT.pack(0, 0)


class Marks:
    """
    A worker process's own file: a slot for each call that it makes at a time.

    Args:
        path: The file, made anew.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._guard = threading.Lock()
        self._taken: set[int] = set()

    def take(self) -> int:
        """Return a slot that nobody else uses; `give_back` has to follow."""
        with self._guard:
            slot = next(number for number in range(len(self._taken) + 1) if number not in self._taken)
            self._taken.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Let others use the slot."""
        with self._guard:
            self._taken.discard(slot)

    def mark(self, slot: int, number: int, attempt: int) -> None:
        """
        Note that a call is being made.

        Args:
            slot: The caller's own.
            number: Of the task's row.
            attempt: Which attempt it is.

        Raises:
            OSError: The disk is full, say.
        """
        os.pwrite(self._fd, _SLOT.pack(number, attempt), slot * _SLOT.size)

    def clear(self, slot: int) -> None:
        """Note that none is."""
        os.pwrite(self._fd, _NOTHING, slot * _SLOT.size)

    def close(self) -> None:
        """Close the file; what stands in it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_marks(path: str) -> list[tuple[int, int]]:
    """Return (number, attempt) of the calls that a process was making; none if it has no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return []
    data = data[: len(data) // _SLOT.size * _SLOT.size]
    return [(number, attempt) for number, attempt in _SLOT.iter_unpack(data) if number]
