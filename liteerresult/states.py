"""Statuses: the stored words of the first results document, Celery 5's words for them, and the legal changes.

The triggers in ``schema.sql`` enforce the same rules for every writer; tests hold the two together.
"""

from __future__ import annotations

import re

__all__ = [
    "DONE",
    "EXCEPTION_STATES",
    "FAILURE",
    "LOST",
    "PENDING",
    "PROPAGATE_STATES",
    "READY_STATES",
    "RETRY",
    "REVOKED",
    "STARTED",
    "SUCCESS",
    "UNREADY_STATES",
    "check_custom",
    "is_legal",
    "state_of",
    "status_of",
]

PENDING = "PENDING"
STARTED = "STARTED"
RETRY = "RETRY"
LOST = "LOST"
"""A custom state: the worker died; the submitter, which lives, decides. See schema.sql."""

DONE = "DONE"
FAILURE = "FAILURE"
REVOKED = "REVOKED"

SUCCESS = "SUCCESS"
"""Celery 5's word for DONE: what `state` answers; never stored."""

READY_STATES = frozenset({DONE, FAILURE, REVOKED})
"""Final: no report changes them."""

UNREADY_STATES = frozenset({PENDING, STARTED, RETRY})
"""Not final; every custom state is unready too."""

EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})
"""The result is an exception."""

PROPAGATE_STATES = frozenset({FAILURE, REVOKED})
"""``get()`` raises."""

_CUSTOM = re.compile(r"[A-Z][A-Z0-9_]*\Z", re.ASCII)


def state_of(status: str) -> str:
    """Return Celery 5's word for a stored status: SUCCESS for DONE, else the same."""
    return SUCCESS if status == DONE else status


def status_of(state: str) -> str:
    """Return the stored word for either vocabulary's: DONE for SUCCESS, else the same."""
    return DONE if state == SUCCESS else state


def is_legal(old: str | None, new: str, *, resubmit: bool = False) -> bool:
    """
    Tell whether a task may go from *old* to *new*.

    Args:
        old: The stored status; None if there is no row yet.
        new: The status to be stored.
        resubmit: True for the one explicit way back.
    """
    if resubmit:
        return old in PROPAGATE_STATES and new == PENDING
    if old is None:
        return True
    return old not in READY_STATES and (new != PENDING or old == PENDING) and not (new == old == STARTED)


def check_custom(state: str) -> str:
    """
    Return *state* if it can name a custom state: upper case, and none of the built-in words.

    Raises:
        TypeError: *state* is not a string.
        ValueError: It is not of that form, or its meaning is fixed.
    """
    if not isinstance(state, str):
        msg = f"a state is a str, not {type(state).__name__}"
        raise TypeError(msg)
    if state in READY_STATES or state in UNREADY_STATES or state in (SUCCESS, LOST):
        msg = (
            f"{state} is not a custom state: use mark_as_done, mark_as_failure, mark_as_started, mark_as_retry "
            "or mark_as_revoked"
        )
        raise ValueError(msg)
    if not _CUSTOM.match(state):
        msg = f"a custom state is an upper-case name (A-Z, 0-9, _) such as PROGRESS, not {state!r}"
        raise ValueError(msg)
    return state
