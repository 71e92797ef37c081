"""Time and ids, handed in by the constructor so that tests own them."""

from __future__ import annotations

import os
import time
from typing import Protocol

__all__ = ["Clock", "SystemClock", "uuid7"]


class Clock(Protocol):
    """What a store asks of time."""

    def time(self) -> float:
        """Return Unix seconds: what is stored; deadlines are on the machine's monotonic clock."""
        ...


class SystemClock:
    """The machine's clock."""

    def time(self) -> float:
        """Return Unix seconds."""
        return time.time()


def uuid7() -> str:
    """
    Return a new UUID, version 7, as text: time first, so that rows made together lie together.

    Source:
        RFC 9562, section 5.7.
    """
    milliseconds = time.time_ns() // 1_000_000
    noise = int.from_bytes(os.urandom(10), "big")
    value = milliseconds << 80 | 0x7 << 76 | (noise >> 68) << 64 | 0x2 << 62 | noise & (1 << 62) - 1
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
