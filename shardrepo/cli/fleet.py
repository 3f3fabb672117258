"""The commands over a fleet: each reads its options, calls a function of `shardrepo.fleet`, shows what came of it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .. import fleet
from ..across import Outcome, Outcomes
from ..errors import ConfigError, FleetError
from ..fleet import Control, Operation, Report, Work
from ..fleet.crew import executor_of
from ..fleet.journal import read
from ..fleet.lines import some, unlisted
from ..fleet.looking import said
from ..fleet.making import ended_early
from ..fleet.scaffold import init as write_project
from .options import How, Opened, Project, Where, expanded
from .show import Format, Watcher, apart, facts_of, interrupts, is_agreed, print_json, print_lines, print_rows

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Lines of JSON on the standard output, and nothing else there.")]
Names = Annotated[list[str], typer.Argument(help="Names of databases.", show_default=False)]
Timeout = Annotated[float | None, typer.Option(help="Seconds for each database.")]
PerServer = Annotated[int, typer.Option(min=1, help="Databases of one server at a time.")]
Form = Annotated[Format, typer.Option(help="How the result is written.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what would be done, and do nothing.")]
Resume = Annotated[
    str | None, typer.Option(metavar="RUN", help="Go on with a run, 'last' for the last one.", show_default=False)
]
AsSql = Annotated[
    bool, typer.Option("--sql", help="Write the SQL instead: once for each revision that databases are at.")
]


def add_commands(app: typer.Typer) -> None:
    """Give *app* the commands."""
    for command in (
        *(init, upgrade, downgrade, stamp, check, status, current, history, heads, revision),
        *(databases, create, drop, ping),
    ):
        app.command()(expanded(command))
    app.command("exec")(expanded(execute))


def init(
    repo: Annotated[str, typer.Argument(help="The repo, as module:Class.")],
    models: Annotated[str, typer.Argument(help="Its models, a declarative base or a MetaData, as module:name.")],
) -> None:
    """Write migrations/ and the sections of pyproject.toml for a new project."""
    sys.path.insert(0, str(Path.cwd()))
    for path in write_project(Path.cwd(), repo, models):
        print(f"wrote {path.relative_to(Path.cwd())}")


def upgrade(
    revision: Annotated[
        str | None, typer.Argument(help="head, heads, a revision, or +N; head if none is named.")
    ] = None,
    *,
    project: Project,
    where: Where,
    how: How,
    breadth: Annotated[bool, typer.Option("--breadth", help="One revision everywhere before the next one.")] = False,
    plan: PlanOnly = False,
    resume: Resume = None,
    sql: AsSql = False,
    as_json: Json = False,
) -> None:
    """Bring databases to a revision, all of them to head if nothing is said."""
    target = revision if resume else revision or "head"
    _migrate(
        "upgrade", target, project, where, how, plan=plan, resume=resume, sql=sql, as_json=as_json, breadth=breadth
    )


def downgrade(
    revision: Annotated[
        str | None, typer.Argument(help="A revision, base, or -N (after --).", show_default=False)
    ] = None,
    *,
    project: Project,
    where: Where,
    how: How,
    plan: PlanOnly = False,
    resume: Resume = None,
    sql: AsSql = False,
    as_json: Json = False,
) -> None:
    """Take databases back to a revision."""
    _migrate("downgrade", revision, project, where, how, plan=plan, resume=resume, sql=sql, as_json=as_json)


def stamp(
    revision: Annotated[str | None, typer.Argument(help="A revision, head or base.", show_default=False)] = None,
    *,
    project: Project,
    where: Where,
    how: How,
    purge: Annotated[bool, typer.Option("--purge", help="Whatever the databases say that they are at.")] = False,
    plan: PlanOnly = False,
    resume: Resume = None,
    sql: AsSql = False,
    as_json: Json = False,
) -> None:
    """Note that databases are at a revision, and run nothing."""
    _migrate("stamp", revision, project, where, how, plan=plan, resume=resume, sql=sql, as_json=as_json, purge=purge)


def check(*, project: Project, where: Where, how: How, as_json: Json = False) -> None:
    """Compare databases with the models; exits with 1 if one differs."""
    _migrate("check", "heads", project, where, how, as_json=as_json)


def _migrate(
    work: Work,
    target: str | None,
    project: Project,
    where: Where,
    how: How,
    *,
    plan: bool = False,
    resume: str | None = None,
    sql: bool = False,
    as_json: bool = False,
    **more: Any,
) -> None:
    if resume is not None and (plan or sql or where != Where()):
        raise ConfigError("--resume goes on with a run as it was begun: it takes no selection, --plan or --sql")
    opened = project.open(**how.flags())
    target = _target(work, target, opened, resume)
    if work == "check":
        more["journal"] = None
    if sql:
        _print_sql(work, target, opened, where, how)
        return
    control = Control()
    with executor_of(how.executor) as executor, interrupts(control), Watcher(as_json=as_json) as observe:
        rollout = how.rollout(opened.settings, executor=executor, **more)
        if resume is not None:
            report = _ended(
                lambda: fleet.resume(
                    opened.repo, work, resume, rollout, opened.source, control=control, observe=observe
                )
            )
        else:
            operation = Operation(
                opened.repo, work, target, where.selection(opened), rollout, opened.source, observe, control
            )
            if plan:
                _print_plan(operation, as_json=as_json)
                return
            report = _ended(operation.run)
    if as_json:
        print_json({"report": report.as_dict()})
    else:
        print_lines(report.lines())
    raise typer.Exit(report.exit_code)


def _target(work: Work, given: str | None, opened: Opened, resume: str | None) -> str:
    """Where databases are to go: a run that is taken up, where it was to."""
    if resume is not None:
        was = str(read(opened.settings.journals, resume).head["target"])
        if given not in (None, was):
            raise ConfigError(f"run {resume} was to go to {was}, and not to {given}: that is how it is taken up")
        return was
    if given is None:
        raise ConfigError(f"{work} where to? Name a revision")
    return given


def _ended(run: Callable[[], Report]) -> Report:
    """The report of a run, whatever has become of it."""
    try:
        return run()
    except FleetError as error:
        report: Report = error.report
        return report


def _print_plan(operation: Operation, *, as_json: bool) -> None:
    plan = operation.plan()
    if as_json:
        parts = [{"title": part.title, "databases": [task.name for task in part.tasks]} for part in plan.parts]
        print_json({"plan": parts, "report": plan.report.as_dict()})
        return
    print_lines(plan.lines())


def _print_sql(work: Work, target: str, opened: Opened, where: Where, how: How) -> None:
    """The SQL, once for each revision that databases are at; or for a range, without asking any."""
    x = tuple(how.x or ())
    start, colon, end = target.partition(":")
    if colon:
        print(fleet.sql(opened.repo, work, end, found=(start,), source=opened.source, x=x))
        return
    at: dict[tuple[str, ...], list[str]] = {}
    for outcome in fleet.current(opened.repo, where=where.selection(opened)):
        at.setdefault(outcome.result(), []).append(outcome.name)
    for revisions, names in sorted(at.items()):
        print(f"-- {len(names)} databases at {said(revisions)}: {some(sorted(names))}")
        print(fleet.sql(opened.repo, work, target, found=revisions, source=opened.source, x=x))


def status(
    revision: Annotated[str, typer.Argument(help="What they are compared with.")] = "heads",
    *,
    project: Project,
    where: Where,
    per_server: PerServer = 4,
    as_json: Json = False,
) -> None:
    """Say how many databases are at which revisions; exits with 1 unless all are at the last one."""
    opened = project.open()
    found = fleet.status(
        opened.repo, revision, where=where.selection(opened), per_server=per_server, source=opened.source
    )
    if as_json:
        print_json(found.as_dict())
    else:
        print_lines(found.lines())
    raise typer.Exit(0 if found.is_level else 1)


def current(*, project: Project, where: Where, per_server: PerServer = 4, format: Form = "table") -> None:
    """Say at which revision each database is."""
    opened = project.open()
    outcomes = fleet.current(opened.repo, where=where.selection(opened), per_server=per_server)
    _print_outcomes(outcomes, lambda revisions: [{"revision": said(revisions)}], format)


def ping(
    *, project: Project, where: Where, per_server: PerServer = 4, timeout: Timeout = None, format: Form = "table"
) -> None:
    """Connect to each database and ask it one question."""
    opened = project.open()
    outcomes = fleet.ping(opened.repo, where=where.selection(opened), per_server=per_server, timeout=timeout)
    _print_outcomes(outcomes, lambda seconds: [{"seconds": round(seconds, 4)}], format)


def execute(
    sql: Annotated[str, typer.Argument(help="One statement.")],
    *,
    project: Project,
    where: Where,
    write: Annotated[bool, typer.Option("--write", help="Let it write: it is committed in each database.")] = False,
    per_server: PerServer = 4,
    timeout: Timeout = None,
    format: Form = "table",
) -> None:
    """Run SQL in each database, where it may only read unless told otherwise."""
    opened = project.open()
    outcomes = fleet.execute(
        opened.repo, sql, write=write, where=where.selection(opened), per_server=per_server, timeout=timeout
    )

    def rows(result: fleet.Rows) -> Iterable[dict[str, Any]]:
        if not result.columns:
            return [{"count": result.count}]
        names = apart(result.columns)
        return (dict(zip(names, row, strict=True)) for row in result.rows)

    _print_outcomes(outcomes, rows, format)


def _print_outcomes(
    outcomes: Iterable[Outcome[T]], rows_of: Callable[[T], Iterable[Mapping[str, Any]]], form: Format
) -> None:
    """The rows of each database, with its name, and what failed on the other output. Exits with 1 if any did."""
    failures = fleet.Causes()

    def rows() -> Iterator[Mapping[str, Any]]:
        for outcome in outcomes:
            if outcome.error is not None:
                _add(failures, outcome)
                continue
            for row in rows_of(outcome.result()):
                yield {"database": outcome.name, **row}

    print_rows(rows(), form)
    _tell(failures)


def history(*, project: Project, as_json: Json = False) -> None:
    """List all revisions, the newest first."""
    opened = project.open()
    _print_revisions(fleet.history(opened.repo, source=opened.source), as_json=as_json)


def heads(*, project: Project, as_json: Json = False) -> None:
    """List the revisions that nothing follows."""
    opened = project.open()
    _print_revisions(fleet.heads(opened.repo, source=opened.source), as_json=as_json)


def _print_revisions(revisions: Iterable[fleet.Revision], *, as_json: bool) -> None:
    for each in revisions:
        if as_json:
            print_json({"revision": each.id, "down": each.down, "message": each.message, "head": each.is_head})
        else:
            print(f"{' '.join(each.down) or '<base>'} -> {each.id}{' (head)' if each.is_head else ''}, {each.message}")


def revision(
    *,
    message: Annotated[str, typer.Option("-m", "--message", help="What it does.")],
    project: Project,
    autogenerate: Annotated[
        bool, typer.Option("--autogenerate", help="Write what the models have and the revisions so far have not.")
    ] = False,
    database: Annotated[
        str | None, typer.Option("-d", "--database", help="Compare the models with this one instead.")
    ] = None,
    head: Annotated[str, typer.Option(help="What it follows.")] = "head",
    splice: Annotated[bool, typer.Option("--splice", help="Let that be no head.")] = False,
    branch_label: Annotated[str | None, typer.Option(help="The name of a branch that it begins.")] = None,
    rev_id: Annotated[str | None, typer.Option(help="What it is called.")] = None,
    x: Annotated[list[str] | None, typer.Option("-x", help="An argument for env.py.")] = None,
) -> None:
    """Write a new revision."""
    opened = project.open()
    written = fleet.revision(
        opened.repo,
        message,
        autogenerate=autogenerate,
        database=database,
        source=opened.source,
        x=tuple(x or ()),
        head=head,
        splice=splice,
        branch_label=branch_label,
        rev_id=rev_id,
    )
    for path in written:
        print(f"wrote {path}")
    if not written:
        print("nothing was written: env.py's process_revision_directives has left nothing to do")


def databases(*, project: Project, where: Where, format: Form = "table") -> None:
    """List the databases, where they are, and what the directory says of them."""
    found = where.members(project.open())
    rows = (
        {
            "database": each.name,
            "server": each.database.server,
            "state": each.state,
            "tags": " ".join(sorted(each.tags)),
        }
        for each in found.found
    )
    print_rows(rows, format)
    for line in unlisted(found.failures):
        print(line, file=sys.stderr)
    raise typer.Exit(1 if found.failures else 0)


def create(
    names: Names,
    *,
    project: Project,
    server: Annotated[str | None, typer.Option(help="Where: host, or host:port.")] = None,
    owner: Annotated[str | None, typer.Option(help="The role that they are to belong to.")] = None,
    per_server: PerServer = 2,
    as_json: Json = False,
) -> None:
    """Make databases, with the schema at head."""
    opened = project.open()
    outcomes = fleet.create(opened.repo, names, server=server, owner=owner, source=opened.source, per_server=per_server)

    def told(made: fleet.Made) -> str:
        return f"at {said(made.revisions)}" + (f", from {made.template}" if made.template else "")

    _print_each(outcomes, "made", told, as_json=as_json)
    with suppress(ConfigError):  # a directory that lists nothing is asked for each by its name
        known = {member.name for member in fleet.members(opened.repo).found}
        if unknown := sorted(set(names) - known):
            print(
                f"the directory does not know {some(unknown)}: no command will find it until it does", file=sys.stderr
            )


def drop(
    names: Names,
    *,
    project: Project,
    force: Annotated[bool, typer.Option("--force", help="End whatever is connected to them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Drop databases, each of which is named."""
    opened = project.open()
    if not yes and not is_agreed(f"Drop {', '.join(names)}, and all that is in {'it' if len(names) == 1 else 'them'}?"):
        print("nothing was dropped", file=sys.stderr)
        raise typer.Exit(1)
    _print_each(fleet.drop(opened.repo, names, force=force), "dropped", lambda _: "", as_json=as_json)


def _print_each(outcomes: Outcomes[T], done: str, told: Callable[[T], str], *, as_json: bool) -> None:
    """A line for each database, as they come, and what failed on the other output. Exits with 1 if any did."""
    failures = fleet.Causes()
    with ended_early(outcomes):
        for outcome in outcomes:
            if outcome.error is not None:
                _add(failures, outcome)
            if as_json:
                print_json(facts_of(outcome))
            elif outcome.ok:
                print(f"{done} {outcome.home} {told(outcome.result())}".rstrip(), flush=True)
    _tell(failures)


def _add(failures: fleet.Causes, outcome: Outcome[Any]) -> None:
    assert outcome.error is not None
    failures.add(outcome.name, (outcome.home or outcome.name).partition("/")[0], outcome.error)


def _tell(failures: fleet.Causes) -> None:
    """Say what failed, on the other output. Exits with 1 if anything did."""
    if failures.count:
        print(f"{failures.count} failed:", *failures.lines(), sep="\n", file=sys.stderr)
        raise typer.Exit(1)
