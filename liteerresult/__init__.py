"""
An embedded result store: results of work on one host in one SQLite file, with no server.

Processes record what became of tasks, and wait for them, join groups of them and iterate them, woken
by the commit itself. ``schema.sql`` is the file's format, for any other language.
"""

from . import states
from .backend import Backend, set_default_backend
from .errors import (
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    IncompleteStream,
    LiteerresultError,
    NotAResultStore,
    RemoteError,
    SchemaMismatch,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    TaskRevokedError,
    TimeoutError,  # noqa: A004 - the field's name; it is also the builtin one
    TransitionError,
    WorkerLostError,
)
from .groups import GroupResult, ResultSet, TaskSetResult, result_from_tuple
from .results import AsyncResult, BaseAsyncResult, EagerResult, ResultBase
from .runner import Runner
from .serialization import register_type
from .store import ResultStore

__version__ = "0.1.0"

__all__ = [
    "AsyncResult",
    "Backend",
    "BaseAsyncResult",
    "ContentDisallowed",
    "DecodeError",
    "EagerResult",
    "EncodeError",
    "GroupResult",
    "ImproperlyConfigured",
    "IncompleteStream",
    "LiteerresultError",
    "NotAResultStore",
    "RemoteError",
    "ResultBase",
    "ResultSet",
    "ResultStore",
    "Runner",
    "SchemaMismatch",
    "StoreBusy",
    "StoreCorrupt",
    "StoreError",
    "TaskRevokedError",
    "TaskSetResult",
    "TimeoutError",
    "TransitionError",
    "WorkerLostError",
    "register_type",
    "result_from_tuple",
    "set_default_backend",
    "states",
]
