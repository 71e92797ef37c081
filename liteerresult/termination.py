"""Signals, to a process that is proven to be the one meant."""

from __future__ import annotations

import os
import signal as signals
from typing import TYPE_CHECKING

from .liveness import host_name, parse_owner

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["send_to_owner"]


def send_to_owner(owner: str, signal: int, is_alive: Callable[[str], bool]) -> bool:
    """
    Send *signal* to the process that is *owner*, and to no other that may have got its process id.

    Args:
        owner: The owner's id.
        signal: The signal's number.
        is_alive: Tells whether the owner holds its lock.

    Returns:
        Whether the signal was sent.
    """
    pid, host = parse_owner(owner)
    if pid is None or host != host_name() or not hasattr(signals, "pidfd_send_signal"):
        return False
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Whoever had the pid when it was opened still had it at this later moment, and the owner lives:
        # they are the same process.
        if not is_alive(owner):
            return False
        signals.pidfd_send_signal(process, signal)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True
