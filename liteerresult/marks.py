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
from binascii import crc32
from typing import NamedTuple, Self

__all__ = ["Mark", "Marks", "read_marks"]

_SLOT = struct.Struct("<qII")  # a row's number, which is never 0; the attempt; the CRC-32 of the task's id
_NOTHING = _SLOT.pack(0, 0, 0)


class Mark(NamedTuple):
    """
    A call that is, or was, being made.

    Attributes:
        number: Of the task's row.
        attempt: Which attempt it is.
        check: CRC-32 of the task's id: another task may have got the number.
    """

    number: int
    attempt: int
    check: int

    @classmethod
    def of(cls, task_id: str, number: int, attempt: int) -> Self:
        """Return the mark of a task's attempt."""
        return cls(number, attempt, crc32(task_id.encode()))


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

    def mark(self, slot: int, mark: Mark) -> None:
        """
        Note that a call is being made, in the caller's own *slot*.

        Raises:
            OSError: The disk is full, say.
        """
        os.pwrite(self._fd, _SLOT.pack(*mark), slot * _SLOT.size)

    def clear(self, slot: int) -> None:
        """Note that none is."""
        os.pwrite(self._fd, _NOTHING, slot * _SLOT.size)

    def close(self) -> None:
        """Close the file; what stands in it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_marks(path: str) -> list[Mark]:
    """Return the calls that a process noted; none if it has no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return []
    data = data[: len(data) // _SLOT.size * _SLOT.size]
    return [Mark(*fields) for fields in _SLOT.iter_unpack(data) if fields[0]]
