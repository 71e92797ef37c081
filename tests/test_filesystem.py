"""Where a store may live."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from liteerresult import ResultStore, StoreError
from liteerresult.filesystem import NETWORK_FILE_SYSTEMS, check_path, file_system_of

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
40 22 0:40 / /data rw,relatime shared:20 master:3 - nfs4 server:/export rw,vers=4.2
41 40 254:1 / /data/local rw - xfs /dev/vdb1 rw
42 22 0:42 / /mnt/with\\040space rw - cifs //server/share rw
43 22 0:43 / /over rw - nfs server:/a rw
44 22 0:44 / /over rw - tmpfs tmpfs rw
45 22 0:45 / /mnt/h\\040äuser rw - fuse.sshfs host: rw
a line of another form
46 22 0:46
"""


class TestFileSystemOf:
    @pytest.mark.parametrize(
        ("folder", "kind"),
        [
            ("/", "ext4"),
            ("/home/me", "ext4"),
            ("/data", "nfs4"),
            ("/data/jobs/7", "nfs4"),
            ("/data/local", "xfs"),
            ("/data/local/x", "xfs"),
            ("/data/localhost", "nfs4"),
            ("/database", "ext4"),
            ("/mnt/with space/x", "cifs"),
            ("/over/x", "tmpfs"),
            ("/mnt/h äuser/x", "fuse.sshfs"),
        ],
    )
    def test_the_innermost_and_latest_mount_counts(self, folder: str, kind: str) -> None:
        assert file_system_of(folder, MOUNTS) == kind

    def test_none_if_nothing_tells(self) -> None:
        assert file_system_of("/x", "") is None

    def test_a_link_counts_for_where_it_leads(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        mounts = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path.resolve()}/real rw - nfs x rw\n"
        assert file_system_of(str(tmp_path / "link"), mounts) == "nfs"

    @pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux tells by /proc")
    def test_this_machine(self, tmp_path: Path) -> None:
        kind = file_system_of(str(tmp_path))
        assert kind
        assert file_system_of("/proc") == "proc"


class TestCheckPath:
    @pytest.mark.parametrize(
        ("path", "error", "reason"),
        [
            ("", ValueError, "is empty"),
            (":memory:", ValueError, "no file.*by its path.*results.db"),
            ("file:x", ValueError, "no file"),
            ("file:x.db?mode=memory", ValueError, "no file"),
            ("a\0b", ValueError, "NUL"),
            (b"results.db", TypeError, "not bytes"),
            (None, TypeError, "NoneType"),
            (7, TypeError, "int"),
        ],
    )
    @pytest.mark.parametrize("door", [check_path, ResultStore])
    def test_what_is_no_path_of_a_file(
        self, door: Any, path: Any, error: type[Exception], reason: str, tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=reason):
            door(path)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="is a folder") as caught:
            ResultStore(tmp_path)
        assert caught.value.path == str(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"none does not exist; make it first") as caught:
            ResultStore(tmp_path / "none" / "results.db")
        assert caught.value.path == str(tmp_path / "none" / "results.db")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_as_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StoreError):
            ResultStore(tmp_path / "file" / "results.db")

    @pytest.mark.parametrize("kind", sorted(NETWORK_FILE_SYSTEMS))
    def test_network_file_systems(self, tmp_path: Path, kind: str) -> None:
        mounts = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {tmp_path.resolve()} rw - {kind} host:/x rw\n"
        with pytest.raises(StoreError, match=rf"network file system \({kind}\).*local disk") as caught:
            check_path(tmp_path / "results.db", mounts)
        assert caught.value.path == str(tmp_path / "results.db")

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuseblk"])
    def test_local_ones(self, tmp_path: Path, kind: str) -> None:
        mounts = f"2 1 0:2 / {tmp_path.resolve()} rw - {kind} x rw\n"
        assert check_path(tmp_path / "results.db", mounts) == str(tmp_path.resolve() / "results.db")

    def test_a_link_to_a_network_file_system(self, tmp_path: Path) -> None:
        """The file counts, not the name: a link on a local disk leads elsewhere."""
        local, remote = tmp_path / "local", tmp_path / "remote"
        local.mkdir()
        remote.mkdir()
        (local / "results.db").symlink_to(remote / "results.db")
        mounts = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / {remote.resolve()} rw - nfs4 host:/x rw\n"
        with pytest.raises(StoreError, match="network file system"):
            check_path(local / "results.db", mounts)

    def test_a_link_that_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "results.db").symlink_to(tmp_path / "none" / "results.db")
        with pytest.raises(StoreError, match="does not exist"):
            check_path(tmp_path / "results.db")

    def test_a_link_to_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "results.db").symlink_to(tmp_path / "folder")
        with pytest.raises(StoreError, match="is a folder"):
            check_path(tmp_path / "results.db")

    def test_relative_paths_stay_where_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with ResultStore("results.db") as store:
            store.mark_as_done("a", 1)
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")
            store.mark_as_done("b", 2)
            assert store.path == str(tmp_path.resolve() / "results.db")
        assert list((tmp_path / "elsewhere").iterdir()) == []

    @pytest.mark.parametrize("way", ["file", "folder"])
    def test_links_give_the_same_store(self, tmp_path: Path, way: str) -> None:
        """Side files lie beside the real file: else two names would have two bells and two queues."""
        real = tmp_path / "real"
        real.mkdir()
        if way == "file":
            (tmp_path / "link.db").symlink_to(real / "results.db")
            link = tmp_path / "link.db"
        else:
            (tmp_path / "link").symlink_to(real)
            link = tmp_path / "link" / "results.db"
        with ResultStore(real / "results.db") as store, ResultStore(link) as same:
            assert same.path == store.path
            store.mark_as_done("a", 1)
            assert same.get_task_meta("a").result == 1
            names = {path.name for path in tmp_path.iterdir()}
        assert names == {"real", "link.db" if way == "file" else "link"}

    @pytest.mark.parametrize(
        "name", ["50% of?.db", "a#b.db", "ü ö.db", "with 'quotes\".db", "x" * 200, "-wal", "new\nline.db"]
    )
    def test_any_name_will_do(self, tmp_path: Path, name: str) -> None:
        for _ in range(2):
            with ResultStore(tmp_path / name) as store:
                if not store.exists("a"):
                    store.mark_as_done("a", 1)
                assert store.get_task_meta("a").result == 1
        assert os.path.exists(tmp_path / name)

    def test_a_name_that_is_not_utf_8(self, tmp_path: Path) -> None:
        """Such a name works, or is refused in this package's words."""
        path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.db")
        try:
            store = ResultStore(path)
        except (StoreError, ValueError):
            return
        with store:
            store.mark_as_done("a", 1)
            assert store.get_task_meta("a").result == 1
