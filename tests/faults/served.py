"""A WSGI application whose repo has connections as soon as it is imported; `test_forks` has gunicorn serve it.

`GET /database/label` stores the label and answers, in JSON, with the row, the processes and the backends it met.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from shardrepo import Repo
from tests.models import Tag


class Served(Repo, config={"url": os.environ["SERVED_URL"], "application_name": "served", "pool_size": 3}):
    """What the workers share the code of, and nothing else."""


def backend() -> int:
    """The server's process that answers here."""
    pid: int = Served.execute("SELECT pg_backend_pid()").scalar_one()
    return pid


def opened(name: str) -> int:
    """Open a connection and keep it, idle."""
    with Served.using(name):
        return backend()


IMPORTED = {"importer": os.getpid(), "inherited": [opened(name) for name in os.environ["SERVED_DATABASES"].split()]}


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    name, label = environ["PATH_INFO"].strip("/").split("/")
    with Served.using(name):
        backends = [backend()]
        with Served.transaction():
            tag = Served.insert(Tag(label=label))
            Served.execute("SELECT pg_sleep(0.005)")  # so that every worker gets its share
            backends.append(backend())
        stored = Served.get_one(Tag, tag.id)
        where = Served.execute("SELECT current_database()").scalar_one()
    answer = {"worker": os.getpid(), "backends": backends, "stored": [where, stored.label], **IMPORTED}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
