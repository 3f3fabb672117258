"""The worker processes of a fleet's runner, as the system shows them."""

from __future__ import annotations

from contextlib import suppress

import psutil  # type: ignore[import-untyped]  # has no stubs of its own


def workers(of: int | None = None) -> list[psutil.Process]:
    """The worker processes of a process, by default this one: the forks of its fork server."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # as which one counts that has died and was not waited for yet
            parent = child.parent()
            found += [child] if parent is not None and "forkserver" in " ".join(parent.cmdline()) else []
    return found


def has_ended(worker: psutil.Process) -> bool:
    """Whether it is gone, or would be if somebody waited for it."""
    try:
        return not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
