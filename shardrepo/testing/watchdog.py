"""The watchdog: a process that removes a set of servers when the process that started them dies.

This file is also that process's program, which is why it imports the standard library alone: it must be
running before there is anything to watch over, and start fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

POLL = 0.005
STOP_TIMEOUT = 30.0

_IPC_RMID = 0
_NULL = subprocess.DEVNULL


class Watchdog:
    """A process that removes the servers when this one dies, however it dies.

    It holds the read end of a pipe whose write end is ours alone: not inherited over exec, closed in
    forked children. The kernel closes it when we are gone.
    """

    def __init__(self, root: Path) -> None:
        read_end, write_end = os.pipe()
        self._write_end: int | None = write_end
        # In a session of its own, and with no output that a caller could wait for the end of.
        command = [sys.executable, "-I", "-S", __file__, str(root)]
        self._process = subprocess.Popen(
            command, stdin=read_end, stdout=_NULL, stderr=_NULL, cwd="/", start_new_session=True
        )
        os.close(read_end)
        _watchdogs.add(self)

    def dismiss(self) -> None:
        """End the watchdog, which finds nothing left to do."""
        if self._write_end is not None:
            # A word, not only the end of the file: a child forked by foreign code may hold the pipe open.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._write_end, b".")
            self.forget()
            self._process.wait()

    def forget(self) -> None:
        """Close our end of the pipe."""
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None


_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def _forget_watchdogs() -> None:
    for watchdog in list(_watchdogs):
        watchdog.forget()


os.register_at_fork(after_in_child=_forget_watchdogs)


def _watch(root: Path) -> None:
    """Be the watchdog: wait for the parent's word or death, then remove its servers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    remove(root)


def remove(root: Path) -> None:
    """End every server whose data lies below *root*, and delete it."""
    end_processes(root)
    for file in root.glob("*/data/postmaster.pid"):
        _free_shared_memory(file)
    shutil.rmtree(root, ignore_errors=True)


def end_processes(folder: Path) -> None:
    """End all processes of the servers below *folder*: as `immediate` does, by force after a while."""
    deadline = time.monotonic() + STOP_TIMEOUT
    asked: set[int] = set()
    while pids := set(_processes(folder)):
        late = time.monotonic() > deadline
        for pid in pids if late else pids - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGQUIT)
        asked |= pids
        time.sleep(POLL)


def _processes(folder: Path) -> Iterator[int]:
    """Yield the pids of the programs that work below *folder*, as their command lines say.

    Their working directories would say it too, but in a container root may not read those of another user.
    """
    for pid, program, command in _all_processes():
        if program in ("postgres", "initdb", "cp") and title_of(folder) in command:
            yield pid


def title_of(folder: Path) -> str:
    """Return what tells a server's processes apart: the end of the data directory's path.

    As `cluster_name` it is in the title of each of them; on the postmaster's command line it is anyway.
    """
    return "/".join(folder.parts[-3:]) if folder.name == "data" else f"{folder.name}/"


def _all_processes() -> Iterator[tuple[int, str, str]]:
    """Yield pid, program and command line of every process of this machine that we may see."""
    if not Path("/proc/self/cmdline").exists():
        for line in output_of("ps", "-axo", "pid=,ucomm=,command=").splitlines():
            pid, program, command = line.split(None, 2)
            yield int(pid), program, command
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_text(errors="replace")
                yield int(entry.name), (entry / "comm").read_text().strip(), command


def _free_shared_memory(pid_file: Path) -> None:
    """Remove the System V segment of a postmaster that was killed: nobody else will.

    The file outlives only a postmaster that could not clean up; its line 7 is the segment's key and id.
    """
    lines = lines_of(pid_file)
    if len(lines) >= 7:
        _key, segment = map(int, lines[6].split())
        ctypes.CDLL(None).shmctl(segment, _IPC_RMID, None)


def lines_of(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def output_of(*command: str) -> str:
    """Return what a program prints, nothing if it fails: to ask is not to insist."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
