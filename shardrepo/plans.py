"""What a query is as SQL, and how the server would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sqlalchemy import Dialect, Executable, Select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.compiler import SQLCompiler

from .errors import unknown
from .reading import selected
from .session import HomeSession

PlanFormat: TypeAlias = Literal["text", "json", "yaml", "xml"]

# Which of them are switches (https://www.postgresql.org/docs/current/sql-explain.html).
SWITCHES: Final = ("analyze", "verbose", "costs", "settings", "generic_plan", "buffers", "wal", "timing", "summary")


class Explained(Executable, ClauseElement):
    """A statement whose plan is asked for."""

    inherit_cache = False

    def __init__(self, statement: ClauseElement, settings: str) -> None:
        self.statement = statement
        self.settings = settings


@compiles(Explained)
def _explain(element: Explained, compiler: SQLCompiler, **kwargs: Any) -> str:
    sql = compiler.process(element.statement, **kwargs)
    # The result is the plan's, whatever the statement writes.
    compiler.isinsert = compiler.isupdate = compiler.isdelete = False
    return f"EXPLAIN ({element.settings}) {sql}"


def explain(
    session: HomeSession, query: Any, parameters: Any, format: PlanFormat, switches: Mapping[str, bool | None]
) -> Any:
    element = Explained(_statement(session, query), settings_of(format, switches))
    lines = session.connection().execute(element, parameters or {}).scalars().all()
    return "\n".join(lines) if all(isinstance(line, str) for line in lines) else lines[0]


def settings_of(format: str, switches: Mapping[str, bool | None]) -> str:
    """What EXPLAIN is told; raises `ValueError` for what it does not know."""
    if format not in get_args(PlanFormat):
        raise ValueError(unknown("format", str(format), get_args(PlanFormat)))
    for name in switches:
        if name not in SWITCHES:
            raise ValueError(unknown("option of explain()", name, SWITCHES))
    given = [f"{name} {'on' if value else 'off'}" for name, value in switches.items() if value is not None]
    return ", ".join([f"FORMAT {format}", *given])


def to_sql(session: HomeSession, query: Any, dialect: Dialect, *, literal_binds: bool) -> tuple[str, dict[str, Any]]:
    compiled = _statement(session, query).compile(
        dialect=dialect, compile_kwargs={"literal_binds": True} if literal_binds else {"render_postcompile": True}
    )
    return str(compiled), {} if literal_binds else dict(cast("Mapping[str, Any]", compiled.params))


def _statement(session: HomeSession, query: Any) -> ClauseElement:
    """What a verb would run; other statements, and text, as they are."""
    if isinstance(query, str):
        return text(query)
    if isinstance(query, ClauseElement) and not isinstance(query, Select):
        return query
    return selected(session, query)
