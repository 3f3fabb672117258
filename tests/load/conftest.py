"""The demo's databases, for the tests that put a load on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL

from shardrepo.demo.fleet import TEMPLATE, create
from shardrepo.testing.servers import Servers

DATABASES = 60


@pytest.fixture(scope="module")
def urls(servers: Servers) -> Iterator[list[URL]]:
    """Sixty databases over three servers, with the demo's table and rows."""
    made = create(servers, DATABASES, lambda _: None)
    yield made
    for server in servers:
        for name in [url.database for url in made if url.port == server.port]:
            server.drop_database(str(name))
        server.drop_database(TEMPLATE)
