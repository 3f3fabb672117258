"""Migrating a fleet: every database exactly where it is to be, whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shardrepo import ConfigError, FleetError, ReadOnlyError, UnknownDatabaseError, fleet
from shardrepo.fleet import Progress, Report, Rollout, Selection, Share, Stage
from shardrepo.fleet.journal import read
from shardrepo.fleet.lock import KEY
from shardrepo.testing.servers import Servers

from ..conftest import LONG, await_, connections_of
from .conftest import AGE, USERS, Project
from .workers import workers

pytestmark = pytest.mark.fleet

# What a script does that notes where and when it ran.
NOTED = "op.execute(\"INSERT INTO noted (revision, database) VALUES ('{0}', current_database())\")"
NOTES = 'op.create_table("noted", sa.Column("revision", sa.Text()), sa.Column("database", sa.Text()))'


def failed(run: Callable[[], Report]) -> Report:
    """The report of a run that does not reach its goal."""
    with pytest.raises(FleetError) as caught:
        run()
    report: Report = caught.value.report
    return report


def test_all_databases_come_to_head(project: Project) -> None:
    """Those of every server, from nothing; and what is there already is left alone the second time."""
    report = fleet.upgrade(project.repo, source=project.source)
    assert (report.changed, report.unchanged, report.exit_code) == (6, 0, 0)
    assert project.revisions() == project.all_at("0001")
    again = fleet.upgrade(project.repo, source=project.source)
    assert (again.changed, again.unchanged, again.exit_code) == (0, 6, 0)


def test_many_workers_migrate_many_databases_exactly(make_project: Callable[..., Project]) -> None:
    """64 databases, 8 processes, 20 revisions one after the other: each is run once in each database, in its own."""
    runs = 20
    project = make_project(64)
    project.revise("r00", None, NOTES)
    for number in range(1, runs + 1):
        project.revise(f"r{number:02}", f"r{number - 1:02}", NOTED.format(f"r{number:02}"))
    with ExitStack() as stack:
        executor = None if LONG else stack.enter_context(ProcessPoolExecutor(8, multiprocessing.get_context("spawn")))
        how = Rollout(jobs=8, per_server=8, executor=executor)
        fleet.upgrade(project.repo, "r00", how=how, source=project.source)
        for _ in range(runs):
            assert fleet.upgrade(project.repo, "+1", how=how, source=project.source).changed == 64
    assert project.revisions() == project.all_at(f"r{runs:02}")
    expected = [(f"r{number:02}",) for number in range(1, runs + 1)]
    for name in project.names:
        assert project.sql(name, f"SELECT revision FROM noted WHERE database = '{name}' ORDER BY 1") == expected
        assert project.sql(name, "SELECT count(*) FROM noted") == [(runs,)]


def with_syntax_error(project: Project, name: str) -> Callable[[], Any]:
    project.sql(name, "CREATE TABLE marked ()")
    project.revise(
        "0002",
        "0001",
        f"""marked = op.get_bind().scalar(sa.text("SELECT to_regclass('marked')"))
op.execute("SELEC 1" if marked else "SELECT 1")
{AGE}""",
    )
    return lambda: project.sql(name, "DROP TABLE marked")


def with_constraint(project: Project, name: str) -> Callable[[], Any]:
    project.sql(name, "INSERT INTO users (name) VALUES ('Ada'), ('Ada')")
    project.revise("0002", "0001", f'{AGE}\nop.create_unique_constraint("one_name", "users", ["name"])')
    return lambda: project.sql(name, "DELETE FROM users")


def with_lock(project: Project, name: str) -> Callable[[], Any]:
    project.revise("0002", "0001", AGE)
    holder = project.where[name].connect(name, application_name="the report", autocommit=False)
    holder.execute("LOCK TABLE users IN ACCESS SHARE MODE")
    return holder.close


@pytest.mark.parametrize(
    ("spoil", "sqlstate"), [(with_syntax_error, "42601"), (with_constraint, "23505"), (with_lock, "55P03")]
)
def test_one_of_fifty_fails(
    make_project: Callable[..., Project], tmp_path: Path, spoil: Callable[..., Callable[[], Any]], sqlstate: str
) -> None:
    """49 are done, one is reported with its cause and left as it was; what the report says to retry does the rest."""
    project = make_project(50)
    project.revise("0001", None, USERS)
    how = Rollout(journal=tmp_path, lock_timeout=0.4, lock_retries=1)
    fleet.upgrade(project.repo, how=how, source=project.source)
    bad = project.names[17]
    mend = spoil(project, bad)
    try:
        report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    finally:
        mend()
    assert (report.changed, report.causes.count, report.left, report.exit_code) == (49, 1, 0, 1)
    (cause,) = report.causes
    assert (cause.names, cause.failure.sqlstate, cause.failure.revision) == ([bad], sqlstate, "0002")
    assert project.revisions() == {**project.all_at("0002"), bad: ["0001"]}
    assert any("the report" in blocker for blocker in cause.failure.blockers) is (sqlstate == "55P03")
    assert report.run is not None
    assert f"retry:  shardrepo upgrade head --failed {report.run}" in list(report.lines())

    again = Selection(names=tuple(read(tmp_path, report.run).failed))
    assert fleet.upgrade(project.repo, where=again, how=how, source=project.source).changed == 1
    assert project.revision(bad) == ["0002"]


def test_a_lock_that_goes_is_waited_for(make_project: Callable[..., Project]) -> None:
    """A migration that has waited too long for somebody's lock is tried again, and says how often."""
    project = make_project(1)
    project.revise("0001", None, USERS)
    fleet.upgrade(project.repo, source=project.source)
    project.revise("0002", "0001", AGE)
    migration, tries = migrated_at_the_second_try(project)
    assert migration.attempts == tries > 1


def test_a_second_try_goes_on_where_the_first_has_come_to(make_project: Callable[..., Project]) -> None:
    """What is reported is from where to where both have come."""
    project = make_project(1)
    project.revise("0001", None, USERS)
    fleet.upgrade(project.repo, source=project.source)
    project.revise("0002", "0001", NOTES)
    project.revise("0003", "0002", AGE)
    migration, _ = migrated_at_the_second_try(project)
    assert (migration.before, migration.after) == (("0001",), ("0003",))


def migrated_at_the_second_try(project: Project) -> tuple[fleet.Migration, int]:
    """What becomes of the only database of *project*, whose table of users is in use until the second try; and how
    many tries were seen to wait for it."""
    (name,) = project.names
    server = project.where[name]
    tried: set[int] = set()
    outcomes = []

    def observe(progress: Progress) -> None:
        with server.connect() as connection:
            waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
            tried.update(pid for (pid,) in connection.execute(waiting, (name,)))
        if len(tried) > 1:
            holder.close()
        outcomes.extend([progress.outcome] if progress.outcome else [])

    holder = server.connect(name, autocommit=False)
    holder.execute("LOCK TABLE users IN ACCESS SHARE MODE")
    how = Rollout(lock_timeout=1.0, lock_retries=20)
    fleet.upgrade(project.repo, how=how, source=project.source, observe=observe)
    (outcome,) = outcomes
    return outcome.result(), len(tried)


def test_what_is_half_committed_is_not_tried_again(make_project: Callable[..., Project]) -> None:
    """A script that waits too long for a lock after it has committed a part of what it does would do that twice."""
    project = make_project(1)
    project.revise("0001", None, f"{USERS}\n{NOTES}")
    fleet.upgrade(project.repo, source=project.source)
    project.revise(
        "0002",
        "0001",
        f"""{NOTED.format("0002")}
with op.get_context().autocommit_block():
    {AGE}""",
    )
    (name,) = project.names
    with project.where[name].connect(name, autocommit=False) as holder:
        holder.execute("LOCK TABLE users IN ACCESS SHARE MODE")
        how = Rollout(lock_timeout=0.1, lock_retries=2)
        report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    (cause,) = report.causes
    assert (cause.failure.sqlstate, cause.failure.revision) == ("55P03", "0002")
    assert project.sql(name, "SELECT revision FROM noted") == [("0002",)]
    assert project.revision(name) == ["0001"]


def test_a_database_that_somebody_else_migrates(make_project: Callable[..., Project]) -> None:
    """Its lock is waited for, and when that takes too long the report says who has it."""
    project = make_project(2)
    project.revise("0001", None, USERS)
    one, other = project.names
    with project.where[one].connect(one, application_name="another runner") as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", (KEY,))
        how = Rollout(patience=0.5)
        report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    (cause,) = report.causes
    assert (cause.names, cause.failure.kind) == ([one], "locked")
    assert [blocker.split(" (")[0] for blocker in cause.failure.blockers] == ["another runner"]
    assert project.revisions() == {one: [], other: ["0001"]}


def test_states_keep_no_migration_out(make_project: Callable[..., Project]) -> None:
    """What the application may not connect to, or not write to, is migrated all the same."""
    project = make_project(4)
    states = ("active", "read_only", "suspended", "migrating")
    project.write_directory(**{name: {"state": state} for name, state in zip(project.names, states, strict=True)})
    project.revise("0001", None, USERS)
    assert fleet.upgrade(project.repo, source=project.source).changed == 4
    assert project.revisions() == project.all_at("0001")


def test_the_template_comes_first(make_project: Callable[..., Project], servers: Servers) -> None:
    """Where it fails, nothing else is touched; where it does not, what is made from it is at head."""
    template = f"template{os.getpid()}"
    project = make_project(3, template_database=template)
    for server in servers:
        server.create_database(template)
    project.revise("0001", None, f'op.execute("SELECT 1 / 0")\n{USERS}')
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    assert (report.causes.count, report.left, report.ending, report.exit_code) == (3, 3, "budget", 3)
    assert project.revisions() == project.all_at()

    project.revise("0001", None, USERS)
    assert fleet.upgrade(project.repo, source=project.source).changed == 6
    for server in servers:
        with server.connect(template) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
        server.drop_database(template)


def test_a_database_that_is_made_meanwhile(project: Project) -> None:
    """One that appears during the run is migrated at its end."""
    born: list[str] = []

    def observe(progress: Progress) -> None:
        if progress.outcome is not None and not born:
            born.extend(project.add(1))

    report = fleet.upgrade(project.repo, source=project.source, observe=observe)
    assert report.changed == 7
    assert project.revision(born[0]) == ["0001"]


def test_breadth_runs_one_revision_everywhere_before_the_next(project: Project) -> None:
    """At no time are two databases more than one revision apart."""
    project.revise("0002", "0001", AGE)
    project.revise("0003", "0002", 'op.drop_column("users", "age")')
    fleet.upgrade(project.repo, "0001", where=Selection(names=(project.names[0],)), source=project.source)
    ended = []

    def observe(progress: Progress) -> None:
        if progress.outcome is not None:
            ended.append(progress.outcome.result().after)

    report = fleet.upgrade(project.repo, how=Rollout(breadth=True), source=project.source, observe=observe)
    assert ended == [("0001",)] * 5 + [("0002",)] * 6 + [("0003",)] * 6
    assert (report.changed, report.left) == (6, 0)


def test_the_rest_is_left_alone_when_a_canary_fails(project: Project) -> None:
    """Not one failure is let pass in the first stage, however many are allowed in all."""
    project.revise("0001", None, 'op.execute("SELECT 1 / 0")')
    stages = [fleet.canary(1), Stage.of("50%"), Stage.of("rest")]
    how = Rollout(stages=stages, max_failures=Share.of("", 100))
    report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    assert (report.causes.count, report.left, report.ending, report.exit_code) == (1, 5, "budget", 3)
    assert project.revisions() == project.all_at()


def test_a_budget_of_failures(project: Project) -> None:
    """When more fail than may, nothing more is begun, and what was under way is finished."""
    project.revise("0001", None, 'op.execute("SELECT 1 / 0")')
    how = Rollout(jobs=1, max_failures=Share.of("", 1))
    report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    assert (report.causes.count, report.left, report.exit_code) == (2, 4, 3)


def test_cached_connections_are_replaced(make_project: Callable[..., Project]) -> None:
    """What this process has connected to a database is closed when that has been migrated, and it alone."""
    project = make_project(2)
    project.revise("0001", None, USERS)
    fleet.upgrade(project.repo, source=project.source)
    user = vars(__import__(project.module))["User"]
    repo, (one, other) = project.repo, project.names
    for name in project.names:
        with repo.using(name):
            for _ in range(10):
                repo.all(user)
    before = {name: pid for server in project.servers for pid, name in connections_of(server, repo_name(repo))}
    project.revise("0002", "0001", "op.execute('ALTER TABLE users ALTER name TYPE varchar(40)')")
    fleet.upgrade(repo, where=Selection(names=(one,)), source=project.source)
    for name in project.names:
        with repo.using(name):
            assert repo.all(user) == []
    after = {name: pid for server in project.servers for pid, name in connections_of(server, repo_name(repo))}
    assert after[one] != before[one]
    assert after[other] == before[other]


def test_cached_connections_are_replaced_where_a_part_was_done(make_project: Callable[..., Project]) -> None:
    """A database whose second revision failed is of another schema than before, too."""
    project = make_project(1)
    project.revise("0001", None, USERS)
    fleet.upgrade(project.repo, source=project.source)
    repo, (name,) = project.repo, project.names
    with repo.using(name):
        repo.execute("SELECT 1")
    (before,) = [pid for pid, of in connections_of(project.where[name], repo_name(repo)) if of == name]
    project.revise("0002", "0001", "op.execute('ALTER TABLE users ALTER name TYPE varchar(40)')")
    project.revise("0003", "0002", 'op.execute("SELECT 1 / 0")')
    failed(lambda: fleet.upgrade(repo, source=project.source))
    assert project.revision(name) == ["0002"]
    with repo.using(name):
        repo.execute("SELECT 1")
    assert before not in [pid for pid, _ in connections_of(project.where[name], repo_name(repo))]


def repo_name(repo: Any) -> str:
    """What its connections are called."""
    name: str = repo._router.databases.config.application_name
    return name


def test_an_index_is_made_concurrently_under_the_lock(make_project: Callable[..., Project]) -> None:
    """While another runner waits for the same lock: neither waits for ever, and the script is run once."""
    project = make_project(3)
    project.revise("0001", None, f"{USERS}\n{NOTES}")
    fleet.upgrade(project.repo, source=project.source)
    project.revise(
        "0002",
        "0001",
        f"""{NOTED.format("0002")}
op.execute("SELECT pg_sleep(0.3)")
with op.get_context().autocommit_block():
    op.create_index("by_name", "users", ["name"], postgresql_concurrently=True)""",
    )
    project.configure(jobs=3)
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: project.run("upgrade"), range(2)))
    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 2
    for name in project.names:
        assert project.sql(name, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_name'::regclass") == [(True,)]
        assert project.sql(name, "SELECT revision FROM noted") == [("0002",)]


def test_an_env_that_connects_by_itself_is_refused(project: Project, servers: Servers) -> None:
    """Nothing is run by an env.py that would migrate a database of its own choosing, in that one or another."""
    url = servers[0].url("postgres").render_as_string(hide_password=False)
    project.write_env(f"""
from alembic import context
from sqlalchemy import create_engine

with create_engine({url!r}).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
""")
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    (cause,) = report.causes
    assert (cause.count, cause.failure.kind) == (6, "ConfigError")
    assert "shardrepo.fleet.env.run(MyRepo, metadata)" in str(cause.failure)
    assert project.revisions() == project.all_at()
    with servers[0].connect() as connection:
        assert connection.execute("SELECT to_regclass('users')").fetchall() == [(None,)]
        connection.execute("DROP TABLE IF EXISTS alembic_version")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not run this fleet"),
        ("raise ZeroDivisionError('in env.py')", "in env.py"),
        (
            "from {0} import Base, MyRepo\nfrom shardrepo.fleet import env\nenv.run(MyRepo, Base.metadata, url='x')",
            "takes no url",
        ),
        (
            "from {0} import Base, CONFIG\nfrom shardrepo import Repo\nfrom shardrepo.fleet import env\n"
            "class Other(Repo, config=CONFIG): pass\nenv.run(Other, Base.metadata)",
            "this env.py runs Other",
        ),
    ],
)
def test_a_wrong_env(project: Project, text: str, said: str) -> None:
    """An env.py that does not run this fleet is named, and nothing is done."""
    project.write_env(text.format(project.module))
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    (cause,) = report.causes
    assert said in str(cause.failure)
    assert project.revisions() == project.all_at()


def test_a_worker_that_finds_a_database_elsewhere(make_project: Callable[..., Project], servers: Servers) -> None:
    """A process whose directory has another place for a name than the run was planned for does nothing there."""
    project = make_project(2, on=[servers[0]])
    project.revise("0001", None, USERS)
    for name in project.names:
        servers[1].create_database(name)
    file = project.root / f"{project.module}.py"
    file.write_text(
        file.read_text().replace(
            "class MyRepo(",
            "import multiprocessing\n\nif multiprocessing.parent_process() is not None:\n    "
            f'CONFIG["directory"] = Servers([{{"host": "127.0.0.1", "port": {servers[1].port}}}])\n\n\nclass MyRepo(',
        )
    )
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    for name in project.names:
        with servers[1].connect(name) as connection:
            assert connection.execute("SELECT to_regclass('users')").fetchall() == [(None,)]
        servers[1].drop_database(name)
    (cause,) = report.causes
    assert (cause.count, cause.failure.kind) == (2, "WrongDatabaseError")
    assert project.revisions() == project.all_at()


def test_threads_of_one_process_take_turns(make_project: Callable[..., Project]) -> None:
    """An executor of threads, in which Alembic by itself would go wrong, does each database exactly once."""
    project = make_project(16)
    project.revise("0001", None, f"{USERS}\n{NOTES}\n{NOTED.format('0001')}")
    with ThreadPoolExecutor(8) as threads:
        how = Rollout(jobs=8, per_server=8, executor=threads)
        assert fleet.upgrade(project.repo, how=how, source=project.source).changed == 16
    for name in project.names:
        assert project.sql(name, "SELECT * FROM noted") == [("0001", name)]


def test_one_of_three_servers_is_dead(make_project: Callable[..., Project], servers: Servers) -> None:
    """The databases of the others are migrated, and it is reported once, however many it has; by either directory."""
    project = make_project(12)
    project.revise("0001", None, USERS)
    dead = servers[2]
    lost = [name for name, server in project.where.items() if server is dead]
    dead.stop()
    try:
        asked = failed(lambda: fleet.upgrade(project.repo, source=project.source))
        again = make_project(0)
        again.where = project.where
        again.write_directory()
        written = failed(lambda: fleet.upgrade(again.repo, source=project.source))
    finally:
        dead.start()
    assert (asked.changed, asked.causes.count, list(asked.unlisted)) == (8, 0, [f"127.0.0.1:{dead.port}"])
    (cause,) = written.causes
    assert (written.unchanged, cause.count, cause.failure.kind) == (8, len(lost), "ServerUnavailableError")
    for report in (asked, written):
        assert report.exit_code == 1
        assert sum(str(dead.port) in line for line in report.lines()) == 1
    assert project.revisions() == {name: [] if name in lost else ["0001"] for name in project.names}


def test_a_revision_without_a_script(project: Project) -> None:
    """A database at one is named and left alone, and the others are migrated."""
    fleet.upgrade(project.repo, source=project.source)
    strange = project.names[3]
    project.sql(strange, "UPDATE alembic_version SET version_num = 'abcd'")
    project.revise("0002", "0001", AGE)
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    (cause,) = report.causes
    assert (report.changed, cause.names) == (5, [strange])
    assert "revision abcd, of which these migrations have no script" in str(cause.failure)
    assert project.revision(strange) == ["abcd"]

    status = fleet.status(project.repo, source=project.source)
    assert {standing: sorted(names) for standing, names in status.standings.items() if names} == {
        "at": [name for name in project.names if name != strange],
        "unknown": [strange],
    }
    fleet.stamp(project.repo, "0001", where=Selection(names=(strange,)), how=Rollout(purge=True), source=project.source)
    assert fleet.upgrade(project.repo, source=project.source).changed == 1


def test_downgrading_by_one(project: Project) -> None:
    """Each goes back from where it is; one that has nothing to go back to is reported."""
    project.revise("0002", "0001", AGE, 'op.drop_column("users", "age")')
    fleet.upgrade(project.repo, source=project.source)
    one = project.names[0]
    fleet.downgrade(project.repo, "base", where=Selection(names=(one,)), source=project.source)
    assert project.revision(one) == []
    report = failed(lambda: fleet.downgrade(project.repo, "-1", source=project.source))
    assert (report.changed, report.causes.count) == (5, 1)
    assert project.revisions() == {**project.all_at("0001"), one: []}


def test_databases_are_compared_with_the_models(project: Project) -> None:
    """One that somebody has changed by hand is named, with what differs; the others are not."""
    fleet.upgrade(project.repo, source=project.source)
    assert fleet.check(project.repo, source=project.source).unchanged == 6
    one, other = project.names[:2]
    project.sql(one, "ALTER TABLE users ADD COLUMN shoe_size integer")
    project.sql(other, "UPDATE alembic_version SET version_num = '0000'")
    report = failed(lambda: fleet.check(project.repo, source=project.source))
    assert {name: "shoe_size" in " ".join(drift) for name, drift in report.drifted.items()} == {one: True}
    assert [cause.names for cause in report.causes] == [[other]]
    assert report.exit_code == 1


def test_a_stamp_that_purges_mends_a_table_of_versions(make_project: Callable[..., Project]) -> None:
    """Also where it has one revision too many, of which the other has all."""
    project = make_project(1)
    project.revise("0001", None, USERS)
    project.revise("0002", "0001", AGE)
    fleet.upgrade(project.repo, source=project.source)
    (name,) = project.names
    project.sql(name, "INSERT INTO alembic_version VALUES ('0001')")
    fleet.stamp(project.repo, "head", how=Rollout(purge=True), source=project.source)
    assert project.revision(name) == ["0002"]


def test_a_stamp_that_does_not_arrive(make_project: Callable[..., Project]) -> None:
    """A database that lacks one of several heads afterwards is reported, and not counted as being there."""
    project = make_project(1)
    project.revise("a1", None, NOTES)
    project.revise("a2", "a1")
    project.revise("b1", None)
    project.revise("b2", "b1", depends_on="a1")
    fleet.upgrade(project.repo, "a2", source=project.source)
    fleet.upgrade(project.repo, "b1", source=project.source)
    report = failed(lambda: fleet.stamp(project.repo, "heads", source=project.source))
    assert (report.changed, report.causes.count) == (0, 1)
    fleet.stamp(project.repo, "heads", source=project.source)
    assert project.revisions() == project.all_at("a2", "b2")


def test_a_script_that_ends_its_process(make_project: Callable[..., Project]) -> None:
    """It is run once, and reported by what it raises."""
    project = make_project(1)
    project.revise("0001", None, f"{USERS}\nraise SystemExit('enough')")
    report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
    (cause,) = report.causes
    assert (cause.failure.kind, cause.failure.revision, str(cause.failure)) == ("SystemExit", "0001", "enough")


def test_arguments_reach_the_scripts(project: Project) -> None:
    """What is given as -x is what a script asks its context for."""
    project.revise(
        "0002",
        "0001",
        """from alembic import context
op.execute("COMMENT ON TABLE users IS '" + context.get_x_argument(as_dictionary=True)["why"] + "'")""",
    )
    fleet.upgrade(project.repo, how=Rollout(x=("why=because",)), source=project.source)
    comment = "SELECT obj_description('users'::regclass)"
    assert [project.sql(name, comment) for name in project.names] == [[("because",)]] * 6


def test_what_cannot_be_migrated_by(make_project: Callable[..., Project], make_repo: Callable[..., Any]) -> None:
    """A repo that workers cannot import, that only reads or goes through a pooler is refused, and nothing is done."""
    project = make_project(1)
    project.revise("0001", None, USERS)
    with pytest.raises(ConfigError, match="cannot be imported by worker processes"):
        fleet.upgrade(type("Local", (project.repo,), {"__qualname__": "f.<locals>.Local"}), source=project.source)
    with pytest.raises(ReadOnlyError, match="use another repo"):
        fleet.upgrade(make_project(0, read_only=True).repo, source=project.source)
    with pytest.raises(ConfigError, match="goes through PgBouncer"):
        fleet.upgrade(make_project(0, pgbouncer=True).repo, source=project.source)
    with pytest.raises(UnknownDatabaseError, match="'nobody'"):
        fleet.upgrade(project.repo, where=Selection(names=("nobody",)), source=project.source)
    with pytest.raises(ConfigError, match="names no revision"):
        fleet.upgrade(project.repo, "0007", source=project.source)
    with pytest.raises(ConfigError, match="no migrations in"):
        fleet.upgrade(project.repo, source=fleet_source(project, "nowhere"))
    assert project.revision(project.names[0]) == []


def fleet_source(project: Project, folder: str) -> Any:
    return type(project.source)(str(project.root / folder))


def test_several_heads(project: Project) -> None:
    """`head` names none of them and is refused; `heads` brings every database to all."""
    project.revise("0002", "0001", AGE)
    project.revise("0003", "0001", 'op.create_table("side", sa.Column("id", sa.Integer()))')
    with pytest.raises(ConfigError, match=r"heads: 0002, 0003.*or `heads`"):
        fleet.upgrade(project.repo, source=project.source)
    assert fleet.upgrade(project.repo, "heads", source=project.source).changed == 6
    assert project.revisions() == project.all_at("0002", "0003")


def test_nothing_is_left_running(project: Project) -> None:
    """When a run has ended, its processes and its connections are gone."""
    fleet.upgrade(project.repo, source=project.source)
    assert workers() == []
    open_now = "SELECT count(*) FROM pg_stat_activity WHERE datname LIKE %s"
    for server in project.servers:
        with server.connect() as connection:
            await_(lambda: connection.execute(open_now, (f"{project.prefix}%",)).fetchone() == (0,))
    assert threading.active_count() < 30
