"""Where a store may live: a file on a local file system."""

from __future__ import annotations

import os
import re

from .errors import StoreError

__all__ = ["check_path", "file_system_of"]

# SQLite's WAL needs memory shared by one kernel, and file events don't cross hosts.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "davfs", "fuse.ceph", "fuse.davfs2", "fuse.glusterfs", "fuse.gcsfuse",
        "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb2", "smb3",
        "smbfs", "virtiofs",
    }
)  # fmt: skip


def file_system_of(folder: str, mountinfo: str | None = None) -> str | None:
    """
    Return the kind of file system that *folder* is on, such as ``"ext4"``; None if the system doesn't tell.

    Args:
        folder: An existing folder.
        mountinfo: The text of Linux's ``/proc/self/mountinfo``; read from there if None.
    """
    if mountinfo is None:
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
                mountinfo = file.read()
        except OSError:
            return None
    real = os.path.realpath(folder)
    best, kind = -1, None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:  # noqa: PLR2004 - the fifth is the mount point
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:  # of two mounts on one point the later one is seen
            best, kind = len(mount), after.split()[0]
    return kind


def check_path(path: str | os.PathLike[str], mountinfo: str | None = None) -> str:
    """
    Return *path* as an absolute path that a store can be at.

    Raises:
        TypeError: It is not a path.
        ValueError: It names no file: empty, ``:memory:`` or a URI.
        StoreError: Its folder is not there, it is a folder itself, or it lies on a network file system.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        msg = f"the path of a store is a str or a Path, not {type(text).__name__}"
        raise TypeError(msg)
    if not text or "\0" in text:
        msg = "the path of a store is empty" if not text else "the path of a store holds a NUL character"
        raise ValueError(msg)
    if text == ":memory:" or text.startswith("file:"):
        msg = f"{text!r} is no file: processes share a store by its path, so give one such as results.db"
        raise ValueError(msg)
    absolute = os.path.realpath(text)
    folder = os.path.dirname(absolute)
    if os.path.isdir(absolute):
        msg = f"{absolute} is a folder; give the path of a file in it"
        raise StoreError(msg, path=absolute)
    if not os.path.isdir(folder):
        msg = f"{absolute}: the folder {folder} does not exist; make it first"
        raise StoreError(msg, path=absolute)
    kind = file_system_of(folder, mountinfo)
    if kind in NETWORK_FILE_SYSTEMS:
        msg = f"{absolute} is on a network file system ({kind}), where SQLite's WAL is not safe; use a local disk"
        raise StoreError(msg, path=absolute)
    return absolute
