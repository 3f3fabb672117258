"""What a new connection is asked before anybody gets it: which database it leads to, and at which revision that is."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .config import Config, RequireHead
from .connection import DriverConnection
from .database import Database
from .entries import Kind
from .errors import DatabaseBehindError, WrongDatabaseError
from .listeners import Listeners

if TYPE_CHECKING:
    from .scripts import Scripts

logger: Final = logging.getLogger("shardrepo.checks")

# As the bytes that the server keeps: as text, the name of a database would depend on that database's encoding.
_NAME: Final = "SELECT pg_catalog.convert_to(pg_catalog.current_database(), pg_catalog.getdatabaseencoding())"

# A statement that names a table fails where there is none. Of the server's own functions that run a query only where
# they are called, ts_stat is the one that every server has: those that make XML are missing from some (decision 15).
_REVISIONS: Final = (
    "CASE WHEN pg_catalog.to_regclass(%s) IS NOT NULL "
    "THEN ARRAY(SELECT pg_catalog.convert_to(word, 'UTF8') FROM pg_catalog.ts_stat(%s)) END"
)
_QUERY: Final = "SELECT pg_catalog.array_to_tsvector(pg_catalog.array_agg(version_num::text)) FROM {}"


@dataclass(frozen=True, slots=True)
class Check:
    """What each new connection of one engine is asked, in one round trip.

    Attributes:
        database: Where it is to lead.
        settings: The repo's.
        listeners: Whose tags a warning carries.
        require_head: What becomes of it if its database is behind; always "off" if it is transient.
    """

    database: Database
    settings: Config
    listeners: Listeners
    require_head: RequireHead

    @classmethod
    def of(cls, database: Database, kind: Kind, settings: Config, listeners: Listeners) -> Check | None:
        """What connections of *kind* to *database* are asked; None for nothing."""
        # By way of transient ones a database is migrated.
        require_head = "off" if kind is Kind.TRANSIENT else settings.require_head
        if require_head == "off" and not settings.verify_database:
            return None
        return cls(database, settings, listeners, require_head)

    def prepare(self) -> None:
        """Load the application's migrations, unless that was done in this process: before a connect, of whose time it
        takes nothing then.

        Raises:
            ConfigError: They cannot be loaded.
        """
        if self.require_head != "off":
            self._scripts()

    def run(self, connection: DriverConnection) -> None:
        """Ask, and compare.

        Raises:
            WrongDatabaseError: It leads to a database of another name.
            DatabaseBehindError: Its database lacks too many revisions, and may not.
        """
        if self.require_head == "off":
            self._compare_name(*_ask(connection, _NAME))
            return
        table = _identifier(self.settings.version_table)
        name, revisions = _ask(connection, f"{_NAME}, {_REVISIONS}", table, _QUERY.format(table))
        if self.settings.verify_database:
            self._compare_name(name)
        self._compare_revisions(tuple(sorted(revision.decode() for revision in revisions or ())))

    def _scripts(self) -> Scripts:
        from .scripts import Scripts, Source, location_of  # here, so that nobody else loads Alembic

        assert self.settings.script_location is not None  # Config sees to that
        return Scripts.of(Source(location_of(self.settings.script_location)))

    def _compare_name(self, found: bytes) -> None:
        if found == self.database.name.encode():
            return
        name = found.decode(errors="replace")
        raise WrongDatabaseError(
            f"asked for {self.database.home}, connected to database {name!r}, as the server itself says: nothing else "
            "was sent to it; see what the directory, or a pooler's [databases], makes of the name",
            expected=self.database.home,
            found=f"{self.database.server}/{name}",
        )

    def _compare_revisions(self, found: tuple[str, ...]) -> None:
        scripts = self._scripts()
        missing = scripts.lacking(found)
        if missing == 0:
            return
        head = "head" if len(scripts.heads) == 1 else "heads"
        message = (
            f"{self.database.home} is {missing} revisions behind: it is at {', '.join(found) or 'no revision'}, and "
            f"this application's migrations end in {', '.join(scripts.heads)}; run "
            f"`shardrepo upgrade {head} -d {shlex.quote(self.database.name)}`"
        )
        if self.require_head == "warn":
            logger.warning("%s", message, extra=self.listeners.labels(self.database))
            return
        raise DatabaseBehindError(message, database=self.database, found=found, heads=scripts.heads, missing=missing)


def _ask(connection: DriverConnection, query: str, *parameters: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query.encode(), parameters, prepare=False).fetchone()
    assert row is not None
    return row


def _identifier(table: str) -> str:
    """A table, or a schema and its table, as SQL names it."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in table.split("."))
