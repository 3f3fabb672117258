"""Making databases, at head from their first moment, and dropping them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..across import Outcome, Outcomes, Target, fan_out
from ..catalog import Blueprint
from ..database import DEFAULT_PORT, Choice, Database, checked
from ..directory import Servers
from ..errors import ConfigError, ReadOnlyError, UnknownDatabaseError
from ..scripts import Revisions, Scripts, Source
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
    """Make databases with the schema at head; what became of each, as they are ready.

    Copies of the server's ``template_database``, if the repo's config names one, which is itself made if it is missing
    and brought to head first; else each is made empty and migrated. One that fails is removed again.

    Args:
        repo: The repo whose databases they will be.
        names: What they are called.
        server: Where, as ``host`` or ``host:port``. Without it, where the directory has the name already, else on the
            default's server, if there is no directory or it knows no other.
        owner: The role that they are to belong to; the user if not given.
        source: The scripts; those that the repo's config names if not given.
        per_server: How many at a time on one server.

    Raises:
        ConfigError: A name is impossible, or nobody knows on which server it is to be.
    """
    databases = repo._router.databases
    if databases.config.read_only:
        raise ReadOnlyError(f"create writes, and {repo.__name__}'s config says read_only=True: use another repo")
    makers: dict[str, Maker] = {}
    targets = []
    for name in dict.fromkeys(names):
        database = place(databases, name, server)
        if database.server not in makers:
            makers[database.server] = Maker(repo, source or source_of(repo), database, owner)
        targets.append(Target(name, database))

    def make(target: Target) -> Made:
        return makers[target.database.server].make(target.database)

    return fan_out(_with_templates(makers, targets), make, per_server=per_server)


def _with_templates(makers: Mapping[str, Maker], targets: Sequence[Target]) -> list[Target | Outcome[Made]]:
    """Have the template of each server ready; where that fails, so do those that were to be made there."""
    failures: dict[str, Exception] = {}
    for server, maker in makers.items():
        try:
            maker.prepare()
        except Exception as error:
            failures[server] = error
    return [
        Outcome[Made](target.name, target.database.home, 0.0, error=failures[target.database.server])
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
            Failure: It is at a revision of which there is no script.
        """
        template = self._template
        if template is None:
            return
        router = self._repo._router
        if not router.database_exists(template):
            self._build(template)
            return
        (outcome,) = sweep(router.databases, [Target(template.name, template)])
        verdict = Judge(self._scripts, "upgrade", "heads").judge(outcome.result())
        if verdict.problem is not None or verdict.standing == "ahead":
            raise Failure(f"nothing can be copied from {template.home}: {verdict.problem}", kind="revision")
        if verdict.target is not None:
            self._migrate(template)

    def make(self, database: Database) -> Made:
        """Make *database*; nothing is left of it if that fails."""
        router = self._repo._router
        if self._template is None:
            revisions = self._build(database)
        else:
            blueprint = Blueprint(self._template.name, owner=self._owner)
            router.create_database(database, blueprint, if_not_exists=False)
            revisions = self._scripts.heads
        return Made(None if self._template is None else self._template.name, revisions)

    def _build(self, database: Database) -> Revisions:
        router = self._repo._router
        router.create_database(database, Blueprint(owner=self._owner), if_not_exists=False)
        try:
            return self._migrate(database)
        except BaseException as error:
            try:
                router.drop_database(database, force=True, if_exists=True)
            except Exception as left:
                error.add_note(f"{database.home} was made, and could not be removed again: {left}")
            raise

    def _migrate(self, database: Database) -> Revisions:
        task = Task(database.name, database.home, database.server, "heads")
        return migrate(self._repo, database, self._manner, task).after


def place(databases: Databases, name: str, server: str | None) -> Database:
    """Where a database that is to be made will be.

    Raises:
        ConfigError: Nobody knows: no server is named, and the directory has several, or another than the default.
    """
    if server is not None:
        return _on(databases, _options_of(databases, server), name)
    if databases.whereabouts is None:
        return _on(databases, {}, name)
    with suppress(UnknownDatabaseError):
        return databases.tended(databases.location(name))
    servers = _servers(databases)
    if len(servers) == 1:
        return _on(databases, servers[0], name)
    raise ConfigError(
        f"on which server is {name!r} to be? The directory does not know it yet: name one (--server HOST), or make it "
        "known there first"
    )


def place_anywhere(databases: Databases, name: str) -> Database:
    """Where a database may be that nobody is to find: on the default's server, or the directory's first."""
    servers = _servers(databases)
    return _on(databases, {} if "host" in databases.config.address or not servers else servers[0], name)


def _on(databases: Databases, options: Mapping[str, Any], name: str) -> Database:
    return databases.config.locate(Choice(checked({**options, "database": name})))


def _servers(databases: Databases) -> Sequence[Mapping[str, Any]]:
    directory = databases.directory
    return directory.servers if isinstance(directory, Servers) else ()


def _options_of(databases: Databases, server: str) -> Mapping[str, Any]:
    """The options of *server*, ``host`` or ``host:port``: as the directory has them, with its user, if it does."""
    host, colon, port = server.rpartition(":")
    if not colon or not port.isdecimal():
        host, port = server, ""
    host = host.strip("[]").lower()
    for options in _servers(databases):
        if options["host"] == host and (not port or options.get("port", DEFAULT_PORT) == int(port)):
            return options
    return {"host": host, **({"port": int(port)} if port else {})}


def drop(
    repo: type[Repo], names: Iterable[str], *, force: bool = False, per_server: int = PER_SERVER
) -> Outcomes[bool]:
    """Drop databases, each of which is named; what became of each, as they are gone.

    Args:
        repo: The repo whose databases they are.
        names: By which they are chosen.
        force: Have the servers end whatever is connected to them.
        per_server: How many at a time on one server.

    Raises:
        ConfigError: Nothing is named.
        UnknownDatabaseError: One of them is none that the directory knows. Nothing was dropped.
    """
    wanted = Selection(names=tuple(names))
    if not wanted.names:
        raise ConfigError("no database is named, and none is dropped unless it is")
    router = repo._router

    def remove(target: Target) -> bool:
        return router.drop_database(target.database, force=force, if_exists=False)

    return fan_out(members(repo, wanted).targets(), remove, per_server=per_server)
