"""Making databases, at head from their first moment, and dropping them."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..across import Outcome, Outcomes, Target, fan_out
from ..catalog import Blueprint
from ..database import Choice, Database, checked, checked_name
from ..directory import Location, Servers
from ..errors import ConfigError, ListingError, ReadOnlyError, UnknownDatabaseError
from ..scripts import Revisions, Scripts, Source
from . import worker
from .members import Selection, members
from .outcomes import Failure
from .plan import Judge, Task
from .planning import source_of
from .sweep import sweep
from .worker import Manner, migrate

if TYPE_CHECKING:
    from ..databases import Databases
    from ..repo import Repo

# Databases of a server that are made or dropped at a time: the server does most of it one after the other.
PER_SERVER = 2

# What the databases are called that live for one comparison, or one test.
SCRATCH: Final = "shardrepo_scratch"


@dataclass(frozen=True, slots=True)
class Made:
    """A database that was made.

    Attributes:
        template: What it is a copy of; None if it was made empty and migrated.
        revisions: Those that it is at.
    """

    template: str | None
    revisions: Revisions


def create(
    repo: type[Repo],
    names: Iterable[str],
    *,
    server: str | None = None,
    owner: str | None = None,
    source: Source | None = None,
    per_server: int = PER_SERVER,
) -> Outcomes[Made]:
    """Make databases with the schema at head; what became of each, as they are ready, and are asked for.

    Copies of the server's ``template_database``, if the repo's config names one, which is itself made if it is missing
    and brought to head first; else each is made empty and migrated. One that fails is removed again; one that was there
    before is left as it is, and is a failure.

    Args:
        repo: The repo whose databases they will be.
        names: What they are called.
        server: Where, as ``host`` or ``host:port``. Without it, where the directory has the name already, else on the
            only server of the directory, else, if there is no directory, on the default's.
        owner: The role that they are to belong to; the user if not given.
        source: The scripts; those that the repo's config names if not given.
        per_server: How many at a time on one server.

    Raises:
        ConfigError: Nothing is named, a name is impossible or taken on another server, or nobody knows on which server
            it is to be. Nothing was made.
    """
    databases = repo._router.databases
    if databases.config.read_only:
        raise ReadOnlyError(f"create writes, and {repo.__name__}'s config says read_only=True: use another repo")
    targets = [Target(name, database) for name, database in places(databases, _named(names), server).items()]
    makers: dict[str, Maker] = {}
    for target in targets:
        if target.database.server not in makers:
            makers[target.database.server] = Maker(repo, source or source_of(repo), target.database, owner)

    def make(target: Target) -> Made:
        return makers[target.database.server].make(target.database)

    return fan_out(_with_templates(makers, targets), make, per_server=per_server)


@contextmanager
def ended_early(outcomes: Outcomes[Any]) -> Iterator[None]:
    """Have Ctrl-C in the block end what is being made, between two statements: it is removed again. Nothing runs when
    the block is left. For a program that ends then.
    """
    with outcomes:
        try:
            yield
        except KeyboardInterrupt:
            worker.is_stopped = lambda: True
            raise


def _with_templates(makers: Mapping[str, Maker], targets: Sequence[Target]) -> list[Target | Outcome[Made]]:
    """Have the template of each server ready; where that fails, so do those that were to be made there."""
    failures: dict[str, Exception] = {}
    for server, maker in makers.items():
        try:
            maker.prepare()
        except Exception as error:
            failures[server] = error
    return [
        Outcome(target.name, target.database.home, 0.0, error=failures[target.database.server])
        if target.database.server in failures
        else target
        for target in targets
    ]


class Maker:
    """Makes databases on one server.

    Args:
        repo: Whose they will be.
        source: The scripts.
        first: One of them, by which the server is found.
        owner: The role that they are to belong to.
    """

    def __init__(self, repo: type[Repo], source: Source, first: Database, owner: str | None) -> None:
        self._repo = repo
        self._scripts = Scripts.of(source)
        self._manner = Manner("", source, "upgrade", session="shardrepo create")
        self._owner = owner
        template = repo._router.databases.config.template_database
        self._template = None if template is None else first.neighbour(template)

    def prepare(self) -> None:
        """Make the template if there is none, and bring it to head.

        Raises:
            Failure: It could not be, or it is at a revision of which there is no script.
        """
        template = self._template
        if template is None:
            return
        try:
            self._make_ready(template)
        except Exception as error:
            failure = Failure.of(error)
            raise Failure(
                f"the template {template.home} could not be brought to head: {failure}",
                kind=failure.kind,
                sqlstate=failure.sqlstate,
                revision=failure.revision,
                blockers=failure.blockers,
            ) from error

    def _make_ready(self, template: Database) -> None:
        if self._build(template, if_not_exists=True) is not None:
            return
        verdict = Judge(self._scripts, "upgrade", "heads").judge(self._revisions(template))
        if verdict.problem is not None:
            raise Failure(verdict.problem, kind="revision")
        if verdict.target is not None:
            self._migrate(template)

    def make(self, database: Database) -> Made:
        """Make *database*; nothing is left of it if that fails."""
        if self._template is None:
            return Made(None, self._build(database) or ())
        blueprint = Blueprint(self._template.name, owner=self._owner)
        self._repo._router.create_database(database, blueprint, if_not_exists=False)
        with self._removed_again(database):
            revisions = self._revisions(database)
            if self._scripts.standing(revisions, self._scripts.heads) != "at":
                raise Failure(
                    f"it is a copy of {self._template.home}, which somebody has taken to "
                    f"{' '.join(revisions) or 'base'} meanwhile: make it again",
                    kind="revision",
                )
        return Made(self._template.name, revisions)

    def _revisions(self, database: Database) -> Revisions:
        (outcome,) = sweep(self._repo._router.databases, [Target(database.name, database)])
        return outcome.result()

    def _build(self, database: Database, *, if_not_exists: bool = False) -> Revisions | None:
        """Make it empty and migrate it; None if it was there, and might be, which is then left as it is."""
        router = self._repo._router
        if not router.create_database(database, Blueprint(owner=self._owner), if_not_exists=if_not_exists):
            return None
        with self._removed_again(database):
            return self._migrate(database)

    @contextmanager
    def _removed_again(self, database: Database) -> Iterator[None]:
        """Drop a database that was just made, if the block fails."""
        try:
            yield
        except BaseException as error:
            try:
                self._repo._router.drop_database(database, force=True, if_exists=True)
            except Exception as left:
                error.add_note(f"{database.home} was made, and could not be removed again: {left}")
            raise

    def _migrate(self, database: Database) -> Revisions:
        task = Task(database.name, database.home, database.server, "heads")
        return migrate(self._repo, database, self._manner, task).after


def _named(names: Iterable[str]) -> Sequence[str]:
    """*names*, each once."""
    named = tuple(dict.fromkeys(names))
    if isinstance(names, str) or not named:
        raise ConfigError(f"databases are made and dropped by their names, as in ['shard01'], not by {names!r}")
    return named


def places(databases: Databases, names: Sequence[str], server: str | None) -> Mapping[str, Database]:
    """Where databases that are to be made will be, by name.

    Raises:
        ConfigError: Nobody knows: no server is named, and the directory has several; or one of them is somewhere else.
    """
    known = _known(databases, set(names))
    return {name: _place(databases, name, server, known.get(name)) for name in names}


def _place(databases: Databases, name: str, server: str | None, known: Database | None) -> Database:
    if server is None:
        return known or _on_only(databases, name)
    database = _on_named(databases, server, name)
    if known is not None and known.server != database.server:
        raise ConfigError(
            f"{name!r} is on {known.server} already, and nobody could tell it from one on {database.server}: nothing "
            "was made. Choose another name"
        )
    return known or database


@contextmanager
def scratch(repo: type[Repo], template: Database | None = None) -> Iterator[Database]:
    """A database that is there for the block: empty, or a copy of *template* beside that. No directory knows it."""
    router, name = repo._router, f"{SCRATCH}_{secrets.token_hex(4)}"
    database = place_anywhere(router.databases, name) if template is None else template.neighbour(name)
    blueprint = Blueprint() if template is None else Blueprint(template.name)
    router.create_database(database, blueprint, if_not_exists=False)
    try:
        yield database
    finally:
        router.drop_database(database, force=True, if_exists=True)


def place_anywhere(databases: Databases, name: str) -> Database:
    """Where a database may be that nobody is to find: on the default's server, or the directory's first."""
    servers = _servers(databases)
    return _on(databases, {} if "host" in databases.config.address or not servers else servers[0], name)


def _known(databases: Databases, names: Collection[str]) -> Mapping[str, Database]:
    """Those of *names* of which the directory knows where they are, or are to be."""
    if databases.whereabouts is None:
        return {}
    try:
        listed: Iterable[Location] = databases.listed()
    except ListingError as error:
        listed = error.found
    except ConfigError:  # it lists nothing, and has to be asked one by one
        listed = filter(None, (_found(databases, name) for name in names))
    return {location.name: databases.tended(location) for location in listed if location.name in names}


def _found(databases: Databases, name: str) -> Location | None:
    with suppress(UnknownDatabaseError):
        return databases.location(name)
    return None


def _on_named(databases: Databases, server: str, name: str) -> Database:
    """On *server*, ``host`` or ``host:port``: one of the directory's, with what it says of that, if it has servers."""
    there = [_on(databases, options, name) for options in _servers(databases)]
    if not there:
        host, colon, port = server.rpartition(":")
        options = {"host": host.strip("[]"), "port": int(port)} if colon and port.isdecimal() else {"host": server}
        return _on(databases, dict(checked(options)), name)
    meant = [each for each in there if Selection(servers=(server.lower(),)).reaches(each.server)]
    if len(meant) != 1:
        raise ConfigError(
            f"{server!r} is {len(meant) or 'none'} of the directory's servers, and {name!r} can be made on one: name "
            f"one of {', '.join(each.server for each in meant or there)}"
        )
    return meant[0]


def _on_only(databases: Databases, name: str) -> Database:
    """On the server that is the only one."""
    if databases.whereabouts is None:
        return _on(databases, {}, name)
    servers = _servers(databases)
    if len(servers) == 1:
        return _on(databases, servers[0], name)
    raise ConfigError(
        f"on which server is {name!r} to be? The directory does not know it yet: name one (--server HOST), or make it "
        "known there first"
    )


def _on(databases: Databases, options: Mapping[str, Any], name: str) -> Database:
    return databases.config.locate(
        Choice(tuple(sorted({**options, "database": checked_name("database", name)}.items())))
    )


def _servers(databases: Databases) -> Sequence[Mapping[str, Any]]:
    directory = databases.directory
    return directory.servers if isinstance(directory, Servers) else ()


def drop(
    repo: type[Repo], names: Iterable[str], *, force: bool = False, per_server: int = PER_SERVER
) -> Outcomes[bool]:
    """Drop databases, each of which is named; what became of each, as they are gone, and are asked for.

    Args:
        repo: The repo whose databases they are.
        names: By which they are chosen.
        force: Have the servers end whatever is connected to them.
        per_server: How many at a time on one server.

    Raises:
        ConfigError: Nothing is named.
        UnknownDatabaseError: One of them is none that the directory knows. Nothing was dropped.
    """
    wanted = Selection(names=tuple(_named(names)))
    router = repo._router

    def remove(target: Target) -> bool:
        return router.drop_database(target.database, force=force, if_exists=False)

    return fan_out(members(repo, wanted).targets(), remove, per_server=per_server)
