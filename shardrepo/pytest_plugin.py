"""The pytest plugin: servers, databases, the application's repo, and a sandbox around each test that asks for one.

It does nothing for a test that uses none of its fixtures and is not marked with ``shards``. Its options are described
in `shardrepo.testing.options`, and by ``pytest --help``.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from .errors import ConfigError
from .testing.options import OPTIONS, Lasting, Settings

# Not at import: what is loaded for every test run of every project that has this library installed stays small.
if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import MetaData
    from sqlalchemy.engine import URL

    from .repo import Repo
    from .sandbox import Sandbox
    from .scripts import Source
    from .testing.address import ServerAt
    from .testing.migrations import Migrations
    from .testing.stock import Stock

_SETTINGS: Final = pytest.StashKey[Settings]()
_MARKER: Final = (
    "shards(*names): run the test in a sandbox over exactly these databases, of those that the ini option "
    "shardrepo_databases lists"
)
_NO_REPO: Final = (
    "no repo: name it by the ini option shardrepo_repo, as myapp.db:MyRepo, or override the fixture shardrepo_repo"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("shardrepo", "shardrepo: tests against many PostgreSQL databases")
    for option in OPTIONS:
        option.add(parser, group)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and read the options, so that a wrong one is an error before anything runs."""
    config.addinivalue_line("markers", _MARKER)
    try:
        config.stash[_SETTINGS] = Settings.of(config)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def shardrepo_servers(pytestconfig: pytest.Config) -> Iterator[Sequence[ServerAt]]:
    """PostgreSQL servers: those that the option url gives, else embedded ones, which end with the run."""
    settings = pytestconfig.stash[_SETTINGS]
    if settings.url:
        yield _given(settings)
    else:
        from .testing.servers import ServerStartError, start_servers

        with _clearly(ServerStartError):
            servers = start_servers(settings.servers)
        with servers:
            yield servers


@pytest.fixture(scope="session")
def _shardrepo_environment(pytestconfig: pytest.Config, shardrepo_servers: Sequence[ServerAt]) -> Iterator[None]:
    """Say in the environment where the first server is, before the application is imported for the tests."""
    url = shardrepo_servers[0].url().render_as_string(hide_password=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(pytestconfig.stash[_SETTINGS].url_variable, url)
        yield


@pytest.fixture(scope="session")
def shardrepo_repo(
    pytestconfig: pytest.Config, shardrepo_servers: Sequence[ServerAt], _shardrepo_environment: None
) -> Iterator[type[Repo]]:
    """The repo that the option repo names, held to the tests' servers; disposed at the end of the run."""
    from .fleet.worker import repo_of
    from .testing.given import confine

    path = pytestconfig.stash[_SETTINGS].repo
    if path is None:
        pytest.fail(_NO_REPO, pytrace=False)
    with _clearly(ConfigError):
        repo = repo_of(path)
        confine(repo, shardrepo_servers)
    yield repo
    repo.dispose()


@pytest.fixture(scope="session")
def shardrepo_schema(request: pytest.FixtureRequest, _shardrepo_environment: None) -> Callable[[URL], None]:
    """What makes the schema in an empty database, given its URL; override it to make yours in another way.

    By the metadata of the option metadata, else by Alembic, where the repo or an option says where its scripts are,
    else none.
    """
    settings = request.config.stash[_SETTINGS]
    if settings.metadata is not None:
        with _clearly(ConfigError):
            return partial(_create_all, _metadata_of(settings.metadata))
    try:
        repo: type[Repo] = request.getfixturevalue("shardrepo_repo")
    except pytest.fail.Exception as error:
        if error.msg != _NO_REPO or settings.script_location is not None:
            raise
        return _leave_empty
    if settings.script_location is None and repo._router.databases.config.script_location is None:
        return _leave_empty
    return partial(_upgrade, repo, settings.script_location, request.config.rootpath)


@pytest.fixture(scope="session")
def _shardrepo_stock(
    pytestconfig: pytest.Config, shardrepo_schema: Callable[[URL], None]
) -> Iterator[Callable[[ServerAt], Stock]]:
    """The databases that this run makes on a server."""
    from .testing.stock import Stock

    # Each process of pytest-xdist has a name, and all of them one run.
    xdist: dict[str, Any] = getattr(pytestconfig, "workerinput", {})
    run = str(xdist.get("testrunuid") or uuid.uuid4().hex)[:12]
    stocks: dict[ServerAt, Stock] = {}

    def stock_of(server: ServerAt) -> Stock:
        if server not in stocks:
            stocks[server] = Stock(server, shardrepo_schema, run, str(xdist.get("workerid", "main")))
        return stocks[server]

    yield stock_of
    with ExitStack() as stack:
        for stock in stocks.values():
            stack.callback(stock.close)


@pytest.fixture
def shardrepo_databases(
    shardrepo_servers: Sequence[ServerAt], _shardrepo_stock: Callable[[ServerAt], Stock]
) -> Iterator[Callable[..., list[str]]]:
    """Make fresh databases with the schema: ``(count=1, *, on=server)`` gives their names; dropped after the test."""
    from .testing.stock import StockError

    made: list[tuple[Stock, list[str]]] = []

    def make(count: int = 1, *, on: ServerAt = shardrepo_servers[0]) -> list[str]:
        stock = _shardrepo_stock(on)
        with _clearly(StockError):
            names = stock.fresh(count)
        made.append((stock, names))
        return names

    yield make
    for stock, names in made:
        stock.drop(names)


@pytest.fixture
def shardrepo_database(shardrepo_databases: Callable[..., list[str]]) -> str:
    """The name of a fresh database on the first server."""
    return shardrepo_databases()[0]


@pytest.fixture
def shardrepo_sandbox(
    request: pytest.FixtureRequest,
    shardrepo_servers: Sequence[ServerAt],
    _shardrepo_environment: None,  # before the repo, which may be another fixture than ours
    shardrepo_repo: type[Repo],
    _shardrepo_stock: Callable[[ServerAt], Stock],
) -> Iterator[Sandbox]:
    """The repo's sandbox, around the test: over the databases that it is marked with, else over all that it uses."""
    from .testing.stock import StockError

    settings = request.config.stash[_SETTINGS]
    marker = request.node.get_closest_marker("shards")
    with _clearly(ConfigError):
        marked = None if marker is None else settings.choose(_arguments(marker))
    with _clearly(StockError):
        for lasting in settings.databases.values() if marked is None else marked:
            _shardrepo_stock(shardrepo_servers[lasting.server - 1]).last([lasting.name])
    if "shardrepo_databases" in request.fixturenames:
        # First, so that they are dropped when the sandbox has left them; a schema could not be made in it.
        request.getfixturevalue("shardrepo_databases")
        for server in shardrepo_servers:
            _shardrepo_stock(server).template()
    with shardrepo_repo.sandbox(
        databases=None if marked is None else [_choice(shardrepo_repo, shardrepo_servers, each) for each in marked],
        shared=settings.shared,
        check_deferred=settings.check_deferred,
    ) as sandbox:
        yield sandbox


@pytest.fixture
def shardrepo_migrations(
    pytestconfig: pytest.Config, _shardrepo_environment: None, shardrepo_repo: type[Repo]
) -> Migrations:
    """The repo's migrations, tested in databases that are made for it: up and down, drift, what they do to rows."""
    from .testing.migrations import Migrations

    settings = pytestconfig.stash[_SETTINGS]
    with _clearly(ConfigError):
        return Migrations(shardrepo_repo, source=_source(settings.script_location, pytestconfig.rootpath))


@pytest.fixture(autouse=True)
def _shardrepo_marked(request: pytest.FixtureRequest) -> None:
    """Give a test that is marked with ``shards`` its sandbox, whether it asks for that or not."""
    if request.node.get_closest_marker("shards") is not None:
        request.getfixturevalue("shardrepo_sandbox")


@contextmanager
def _clearly(*expected: type[Exception]) -> Iterator[None]:
    """Fail with what an expected error says: where in this library it was raised tells nobody anything."""
    try:
        yield
    except expected as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _given(settings: Settings) -> Sequence[ServerAt]:
    from .testing.given import server_at

    with _clearly(ConfigError):
        return [server_at(database) for database in settings.url]


def _metadata_of(path: str) -> MetaData:
    from sqlalchemy import MetaData

    from .fleet.worker import object_of

    found = object_of(path, "the metadata", "myapp.models:Base.metadata")
    if not isinstance(found, MetaData):
        raise ConfigError(f"the metadata {path!r} is {found!r}, no MetaData: name one, as myapp.models:Base.metadata")
    return found


def _create_all(metadata: MetaData, url: URL) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    metadata.create_all(create_engine(url, poolclass=NullPool))


def _upgrade(repo: type[Repo], script_location: str | None, root: Path, url: URL) -> None:
    from .database import Database
    from .testing.migrations import migrate

    migrate(repo, Database.from_url(url), source=_source(script_location, root))


def _source(script_location: str | None, root: Path) -> Source | None:
    """The scripts that the option script_location names; None where it leaves that to the repo."""
    from .fleet.settings import Settings as Project

    if script_location is None:
        return None
    # From where pytest's ini file is, which need not be where the project of the command begins.
    absolute = script_location if ":" in script_location else str(root / script_location)
    return Project.load({"script_location": absolute}, root).source


def _leave_empty(url: URL) -> None:
    """Make no schema."""


def _arguments(marker: pytest.Mark) -> Sequence[object]:
    if marker.kwargs:
        raise ConfigError(f"shards() takes names alone, no keywords: {', '.join(marker.kwargs)} is one")
    return marker.args


def _choice(repo: type[Repo], servers: Sequence[ServerAt], lasting: Lasting) -> str | URL:
    """How *repo* chooses a lasting database: by its name, unless nothing says that it is on another server."""
    if lasting.server == 1 or repo._router.databases.directory is not None:
        return lasting.name
    return servers[lasting.server - 1].url(lasting.name)
