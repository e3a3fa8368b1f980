"""For the tests: a disk that loses what was never synced, as a power cut may."""

import os
from pathlib import Path


class Disk:
    """Records, for everything under ``root``, what fsync has made durable; `after_power_cut` writes that elsewhere.

    The strictest reading of POSIX: a file's bytes are durable as they were at its last fsync, a name is durable as of
    its folder's last fsync, and nothing else is.
    """

    def __init__(self, root: Path, monkeypatch):
        self.root, self.files, self.folders = root.resolve(), {}, {}
        self._take(self.root, deep=True)
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _take(self, path: Path, deep: bool) -> None:
        status = path.stat()
        if path.is_file():
            self.files[status.st_ino] = path.read_bytes()
            return
        self.folders[status.st_ino] = {entry.name: (entry.stat().st_ino, entry.is_dir()) for entry in path.iterdir()}
        for entry in path.iterdir() if deep else ():
            self._take(entry, deep=True)

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.root):
            self._take(path, deep=False)

    def after_power_cut(self, target: Path) -> Path:
        """Write what is durable to ``target``; return it."""
        self._restore(self.root.stat().st_ino, target)
        return target

    def _restore(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, (entry, is_folder) in self.folders.get(inode, {}).items():
            if is_folder:
                self._restore(entry, target / name)
            else:
                (target / name).write_bytes(self.files.get(entry, b""))
