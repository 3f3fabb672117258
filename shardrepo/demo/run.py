"""The demo from its beginning to its end."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL

from ..testing.servers import roomy_memory, start_servers
from .drivers import Way
from .fleet import audit, create
from .load import Plan
from .picture import draw
from .report import Audit, Outcome, Report, Settings
from .sampler import Sampler
from .show import Show, View
from .worker import Message, Rested, Worker, prepare

WAYS: Final[tuple[Way, ...]] = ("repo", "by hand")

# Seconds after the end of a load until its connections are counted at rest.
_SETTLE: Final = 0.5


def run(settings: Settings, show: Show) -> Report:
    """Start the servers, run both loads, draw them, stop the servers. Leaves the picture behind, nothing else."""
    show.say(f"Starting {settings.servers} PostgreSQL servers")
    memory = roomy_memory(settings.databases, servers=settings.servers)
    with start_servers(settings.servers, directory=memory) as servers:
        with show.building(settings.databases) as progress:
            urls = create(servers, settings.databases, progress)
        doors = [server.url() for server in servers]
        outcomes: dict[Way, Outcome] = {way: measure(way, doors, urls, settings, show) for way in WAYS}
    picture = draw(settings, outcomes, _folder() / "shardrepo-demo.png")
    return Report(settings, outcomes, picture)


def measure(way: Way, doors: Sequence[URL], urls: Sequence[URL], settings: Settings, show: Show) -> Outcome:
    """Run the load one way, in a process of its own, while another samples the servers."""
    name = f"demo {way}"
    plan = Plan(settings.threads, settings.think_ms / 1000, settings.seconds, seed=settings.seed)
    prepared = partial(prepare, way, name, settings.pool_size)
    with Sampler(doors, name) as sampler, Worker(prepared, urls, plan) as worker:
        load = _watch(worker, sampler, View(way, settings), show)
        sampler.drain_after(load.ended + _SETTLE)
    samples = [sample for sample in sampler.samples if sample.start >= load.started]
    return Outcome(load, samples, way, _audited(urls, load.inserted))


def _watch(worker: Worker, sampler: Sampler, view: View, show: Show) -> Rested:
    """Show the load until it has ended."""
    with show.watching(view):
        while True:
            ready = wait([worker.pipe, sampler.pipe])
            sampler.drain()
            view.sample = sampler.samples[-1]
            if worker.pipe in ready:
                report: Message = worker.pipe.recv()
                if isinstance(report, Rested):
                    return report
                view.take(report)


def _audited(urls: Sequence[URL], inserted: Mapping[str, int]) -> Audit:
    strays, lost = 0, Counter(inserted)
    for name, found, added in audit(urls):
        strays += found
        lost[name] -= added
    return Audit(strays, sum((+lost).values()))


def _folder() -> Path:
    """Where the picture goes: here, if that can be written to."""
    here = Path.cwd()
    return here if os.access(here, os.W_OK) else Path(tempfile.gettempdir())
