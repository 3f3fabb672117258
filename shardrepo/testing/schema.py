"""What a database's schema is, in the catalog's own words, and how two of them differ.

Of every table, view, column, default, constraint, index, sequence, enum, domain, range, function, trigger, rule,
policy, extension, statistics object, comment, privilege and setting it is the whole definition; of anything else, as a
cast or a collation, that it is there. The order of columns is no part of it: one that is dropped and added again comes
last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Final, TypeAlias

from sqlalchemy import TextClause, text
from sqlalchemy.engine import Connection

from ..fleet.lines import line

# The definition of each thing, by what it is and is called.
Schema: TypeAlias = Mapping[str, str]

# Characters of a definition that are shown, and those before the first that differs.
_MAX_SHOWN: Final = 200
_CONTEXT: Final = 30

# The first that is given to what users make: FirstNormalObjectId in PostgreSQL's src/include/access/transam.h.
_FIRST_OID: Final = 16384

# By default these have some.
_PRIVILEGES: Final = tuple(f"privileges on {kind} " for kind in ("schema", "relation", "function", "type"))


def read_schema(connection: Connection, version_table: str) -> Schema:
    """The schema of the database that *connection* leads to, without Alembic's table, which may be a schema's."""
    schema, _, table = version_table.rpartition(".")
    rows = connection.execute(_query(), {"schema": schema or None, "table": table, "first": _FIRST_OID})
    return {f"{kind} {name}": definition or "" for kind, name, definition in rows}


@cache
def _query() -> TextClause:
    return text(Path(__file__).with_name("schema.sql").read_text("utf-8"))


def differences(expected: Schema, found: Schema) -> Iterator[str]:
    """What *found* has beyond *expected*, lacks of it, and defines otherwise: a line each."""
    for thing in _of_itself(found.keys() - expected.keys()):
        yield f"is there: {_shown(thing, found[thing])}"
    for thing in _of_itself(expected.keys() - found.keys()):
        yield f"is missing: {_shown(thing, expected[thing])}"
    for thing in sorted(expected.keys() & found.keys()):
        if expected[thing] != found[thing]:
            was, now = _told_apart(expected[thing], found[thing])
            yield f"differs: {thing}: was {was!r}, is {now!r}"


def _of_itself(things: Iterable[str]) -> list[str]:
    """*things*, in order, without the privileges that come and go with another of them."""
    return sorted(thing for thing in things if not thing.startswith(_PRIVILEGES))


def _shown(thing: str, definition: str) -> str:
    return f"{thing}: {line(definition, _MAX_SHOWN)}" if definition else thing


def _told_apart(one: str, other: str) -> tuple[str, str]:
    """Two definitions, from shortly before where they differ."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    begin = max(0, same - _CONTEXT)
    lead = "..." if begin else ""
    return lead + line(one[begin:], _MAX_SHOWN), lead + line(other[begin:], _MAX_SHOWN)
