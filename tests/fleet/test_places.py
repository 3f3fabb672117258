"""Nothing is migrated anywhere else than where it was planned, nor further, whatever changes meanwhile."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardrepo import ConfigError, fleet
from shardrepo.fleet import Control, Progress, Rollout, Selection, worker
from shardrepo.fleet.journal import read
from shardrepo.fleet.lock import KEY
from shardrepo.testing.servers import Servers

from ..conftest import await_
from ..proxy import Proxy
from .conftest import USERS, Project
from .test_upgrade import failed

# Ahead of a project's repo: the directory that its worker processes have in place of its own.
ELSEWHERE = """
import multiprocessing

if multiprocessing.parent_process() is not None:
    CONFIG["directory"] = {directory!r}


class MyRepo("""


def mislead_workers(project: Project, directory: dict[str, Any]) -> None:
    """Give the worker processes of *project* another directory."""
    file = project.root / f"{project.module}.py"
    file.write_text(file.read_text().replace("class MyRepo(", ELSEWHERE.format(directory=directory)))


def has_users(servers: Servers, number: int, name: str) -> bool:
    with servers[number].connect(name) as connection:
        row = connection.execute("SELECT to_regclass('users')").fetchone()
    assert row is not None
    return row[0] is not None


@pytest.mark.parametrize("place", ["server", "name"])
def test_an_id_does_not_stand_for_a_place(make_project: Callable[..., Project], servers: Servers, place: str) -> None:
    """A database whose id a worker finds on another server, or by another name there, is not migrated by it."""
    project = make_project(1, on=[servers[0]])
    project.revise("0001", None, USERS)
    (name,) = project.names
    project.write_directory(**{name: {"id": "tenant-1"}})
    number, other = (1, name) if place == "server" else (0, f"{project.prefix}other")
    servers[number].create_database(other)
    there = {"host": servers[number].host, "port": servers[number].port, "database": other, "id": "tenant-1"}
    mislead_workers(project, {name: there})
    try:
        report = failed(lambda: fleet.upgrade(project.repo, source=project.source))
        assert not has_users(servers, number, other)
    finally:
        servers[number].drop_database(other)
    (cause,) = report.causes
    assert cause.failure.kind == "WrongDatabaseError"
    assert f"to be migrated in {project.home(name)}" in str(cause.failure)
    assert project.revision(name) == []


def test_names_users_and_passwords_of_each(make_project: Callable[..., Project], tmp_path: Path) -> None:
    """What the directory says of each database is where, and as whom, it is migrated; no password is left anywhere."""
    project = make_project(2)
    project.revise("0001", None, USERS)
    facts: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(project.names):
        role, server = f"{project.prefix}role{number}", project.where[name]
        with server.connect() as connection:
            connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'sesame{number}'")
            connection.execute(f"ALTER DATABASE {name} OWNER TO {role}")
        facts[f"tenant {number}"] = {
            "host": server.host,
            "port": server.port,
            "database": name,
            "id": f"id-{number}",
            "username": role,
            "password": f"sesame{number}",
        }
    (project.root / "directory.json").write_text(json.dumps(facts))
    how = Rollout(journal=tmp_path)
    try:
        assert fleet.upgrade(project.repo, how=how, source=project.source).changed == 2
        owner = "SELECT tableowner FROM pg_tables WHERE tablename = 'users'"
        assert [project.sql(name, owner) for name in project.names] == [
            [(facts[each]["username"],)] for each in sorted(facts)
        ]
        (journal,) = tmp_path.glob("*.jsonl")
        assert "sesame" not in journal.read_text()
        assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    finally:
        for number, name in enumerate(project.names):
            server = project.where[name]
            with server.connect() as connection:
                connection.execute(f"ALTER DATABASE {name} OWNER TO {server.username}")
            with server.connect(name) as connection:
                connection.execute(f"DROP OWNED BY {project.prefix}role{number}")
                connection.execute(f"DROP ROLE {project.prefix}role{number}")


def test_a_name_that_is_listed_twice(make_project: Callable[..., Project]) -> None:
    """Nobody knows which place is meant: neither is touched."""
    project = make_project(2)
    project.revise("0001", None, USERS)
    file = project.root / f"{project.module}.py"
    places = [
        {"host": project.where[each].host, "port": project.where[each].port, "database": each} for each in project.names
    ]
    listing = f"[Location.of('shard', place) for place in {places!r}]"
    file.write_text(
        file.read_text().replace(
            "class MyRepo(",
            "from shardrepo.directory import Called, Location\n\n"
            f"CONFIG['directory'] = Called(lambda name: {listing}[0], lambda: {listing})\n\n\nclass MyRepo(",
        )
    )
    with pytest.raises(ConfigError, match="lists 'shard' twice"):
        fleet.upgrade(project.repo, source=project.source)
    assert project.revisions() == project.all_at()


def test_a_script_that_comes_after_the_plan(project: Project) -> None:
    """A head is what it was when the run was planned, also for workers who know of more."""

    def observe(progress: Progress) -> None:
        if progress.part == "reading revisions" and progress.done == 1:
            project.revise("0002", "0001", 'op.execute("SELECT 1 / 0")')

    assert fleet.upgrade(project.repo, source=project.source, observe=observe).changed == 6
    assert project.revisions() == project.all_at("0001")


@pytest.mark.parametrize("target", ["head", "heads"])
def test_a_script_that_workers_lack(project: Project, target: str) -> None:
    """A database is not counted as being at head because it is at that of a worker's older scripts."""
    project.revise("0002", "0001")
    if target == "heads":
        project.revise("0003", "0001")

    def observe(progress: Progress) -> None:
        if progress.part == "reading revisions":
            (project.root / "migrations" / "versions" / "0002.py").unlink(missing_ok=True)

    report = failed(lambda: fleet.upgrade(project.repo, target, source=project.source, observe=observe))
    assert (report.changed, report.causes.count, report.exit_code) == (0, 6, 1)
    assert project.revisions() == project.all_at()


def test_a_run_is_not_taken_up_with_other_scripts(project: Project, tmp_path: Path) -> None:
    """What it has done would not be at their head, and it would end as if it was."""
    project.revise("0001", None, 'op.execute("SELECT 1 / 0")')
    how = Rollout(journal=tmp_path)
    report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    assert report.run is not None
    project.revise("0001", None, USERS)
    project.revise("0002", "0001")
    with pytest.raises(ConfigError, match="was 0001 for that run, and is 0002"):
        fleet.resume(project.repo, "upgrade", report.run, how, project.source)
    (project.root / "migrations" / "versions" / "0002.py").unlink()
    project.revise("0001", None, USERS)
    assert fleet.resume(project.repo, "upgrade", report.run, how, project.source).changed == 6
    assert project.revisions() == project.all_at("0001")


@pytest.mark.parametrize(("work", "target"), [("upgrade", "+1"), ("downgrade", "-1"), ("stamp", "0003")])
def test_what_is_made_meanwhile_is_not_where_the_others_were(project: Project, work: str, target: str) -> None:
    """A copy of a database that is done already takes no step of its own, and nothing is said of an empty one."""
    project.revise("0002", "0001", "pass")
    project.revise("0003", "0002", "pass")
    fleet.upgrade(project.repo, "0001" if work != "downgrade" else "0003", source=project.source)
    born = f"{project.prefix}born"

    def observe(progress: Progress) -> None:
        if progress.outcome is not None and born not in project.where:
            done = progress.outcome.name
            project.where[born] = project.where[done]
            with project.where[done].connect() as connection:
                connection.execute(f"CREATE DATABASE {born} {'' if work == 'stamp' else f'TEMPLATE {done}'}")

    run = getattr(fleet, work)
    assert run(project.repo, target, how=Rollout(jobs=1), source=project.source, observe=observe).changed == 6
    assert project.revision(born) == ([] if work == "stamp" else ["0002"])


def test_a_plan_that_is_not_whole_is_not_taken_up(project: Project, tmp_path: Path) -> None:
    """A run that is interrupted while it asks where the databases are has no plan, whatever it knows already."""
    *strange, good = project.names
    fleet.stamp(project.repo, "0001", where=Selection(names=tuple(strange)), source=project.source)
    for name in strange:
        project.sql(name, "UPDATE alembic_version SET version_num = 'abcd'")
    control = Control()

    def observe(progress: Progress) -> None:
        if progress.failed:
            control.interrupt()

    where = Selection(names=tuple(project.names))
    how = Rollout(journal=tmp_path)
    report = failed(
        lambda: fleet.upgrade(
            project.repo, where=where, how=how, source=project.source, observe=observe, control=control
        )
    )
    assert (report.ending, report.run, report.exit_code) == ("interrupted", None, 130)
    assert fleet.runs(tmp_path) == []
    assert project.revision(good) == []


def test_a_server_that_goes_is_not_forgotten(make_project: Callable[..., Project], servers: Servers) -> None:
    """If nobody can say what was made meanwhile, the report says so, and has what was done."""
    project = make_project(3)
    project.revise("0001", None, USERS)
    ended: list[str] = []

    def observe(progress: Progress) -> None:
        if progress.outcome is not None:
            ended.append(progress.outcome.name)
            if len(ended) == 3:
                servers[2].stop()

    try:
        report = failed(lambda: fleet.upgrade(project.repo, source=project.source, observe=observe))
    finally:
        servers[2].start()
    assert (report.changed, report.left, list(report.unlisted)) == (3, 0, [f"127.0.0.1:{servers[2].port}"])


def test_a_directory_that_fails_at_the_end(make_project: Callable[..., Project]) -> None:
    """What was done is in the report all the same."""
    project = make_project(2)
    project.revise("0001", None, USERS)
    project.write_directory()
    file, gone = project.root / f"{project.module}.py", project.root / "gone"
    file.write_text(
        file.read_text().replace(
            "class MyRepo(",
            "from shardrepo.directory import Static\n\n\nclass Failing(Static):\n"
            "    def list_databases(self, connect):\n"
            f"        assert not Path({str(gone)!r}).exists(), 'the catalogue is down'\n"
            "        return super().list_databases(connect)\n\n\n"
            "CONFIG['directory'] = Failing(DIRECTORY)\n\n\nclass MyRepo(",
        )
    )

    def observe(progress: Progress) -> None:
        if progress.outcome is not None:
            gone.touch()

    report = failed(lambda: fleet.upgrade(project.repo, source=project.source, observe=observe))
    assert (report.changed, report.exit_code) == (2, 1)
    assert "the catalogue is down" in "\n".join(report.lines())


def test_a_run_is_taken_up_while_a_server_is_down(
    make_project: Callable[..., Project], servers: Servers, tmp_path: Path
) -> None:
    """Its databases fail by themselves; those of the others are done."""
    project = make_project(6)
    project.revise("0001", None, 'op.execute("SELECT 1 / 0")')
    how = Rollout(journal=tmp_path)
    report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source))
    assert report.run is not None
    project.revise("0001", None, USERS)
    project.configure(journal=str(tmp_path))
    servers[2].stop()
    try:
        again = project.run("upgrade", "--resume", report.run)
    finally:
        servers[2].start()
    assert again.returncode == 1
    assert again.stdout.startswith("upgrade head: 4 changed, 2 failed"), again.stdout
    assert sorted(read(tmp_path, report.run).failed) == sorted(
        name for name, server in project.where.items() if server is servers[2]
    )


def test_a_template_that_cannot_be_migrated_is_no_success(
    make_project: Callable[..., Project], servers: Servers
) -> None:
    """One at a revision without a script is reported, and nothing else is touched."""
    template = f"template{os.getpid()}"
    project = make_project(2, on=[servers[0]], template_database=template)
    project.revise("0001", None, USERS)
    servers[0].create_database(template)
    try:
        with servers[0].connect(template) as connection:
            connection.execute("CREATE TABLE alembic_version (version_num text)")
            connection.execute("INSERT INTO alembic_version VALUES ('abcd')")
        with pytest.raises(ConfigError, match=f"the template .*/{template} cannot be migrated: it is at revision abcd"):
            fleet.upgrade(project.repo, source=project.source)
    finally:
        servers[0].drop_database(template)
    assert project.revisions() == project.all_at()


def test_two_runs_of_one_process_keep_their_arguments(make_project: Callable[..., Project]) -> None:
    """What is given as -x is that of the run, also where another one waits for Alembic with its own."""
    project = make_project(2)
    project.revise(
        "0001",
        None,
        f"""from alembic import context
{USERS}
op.execute("COMMENT ON TABLE users IS '" + context.get_x_argument(as_dictionary=True)["who"] + "'")""",
    )
    repo = project.repo
    members = {each.name: each.database for each in fleet.members(repo).found}

    def run(name: str) -> None:
        manner = worker.Manner("", project.source, "upgrade", x=(f"who={name}",))
        database = members[name]
        worker.migrate(repo, database, manner, fleet.Task(name, database.home, database.server, "head"))

    threads = [threading.Thread(target=run, args=(name,)) for name in project.names]
    with worker.alembic_in_use:
        for thread in threads:
            thread.start()
        # Both have their databases' locks, and nothing more to ask before they have Alembic.
        waiting = (
            "SELECT count(*) FROM pg_stat_activity JOIN pg_locks USING (pid) "
            "WHERE datname = current_database() AND state = 'idle' AND locktype = 'advisory'"
        )
        await_(lambda: all(project.sql(name, waiting) == [(1,)] for name in project.names))
    for thread in threads:
        thread.join()
    comment = "SELECT obj_description('users'::regclass)"
    assert [project.sql(name, comment) for name in project.names] == [[(name,)] for name in project.names]


def test_a_server_that_falls_silent_while_a_lock_is_waited_for(
    make_project: Callable[..., Project], servers: Servers
) -> None:
    """The database is reported, and nobody waits for an answer without end."""
    project = make_project(1, on=[servers[0]])
    project.revise("0001", None, USERS)
    (name,) = project.names
    with Proxy(servers[0]) as proxy, servers[0].connect(name) as holder:
        project.write_directory(**{name: {"host": proxy.host, "port": proxy.port}})
        holder.execute("SELECT pg_advisory_lock(%s)", (KEY,))
        polling = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shardrepo upgrade'"

        def observe(_: Progress) -> None:
            if holder.execute(polling).fetchone() == (1,):
                proxy.deafen()

        how = Rollout(patience=1.0)
        report = failed(lambda: fleet.upgrade(project.repo, how=how, source=project.source, observe=observe))
    (cause,) = report.causes
    assert cause.failure.kind == "NoAnswer"


def test_a_locked_version_table_is_not_waited_for_without_end(make_project: Callable[..., Project]) -> None:
    """The database is reported, and the others are asked."""
    project = make_project(3, connect_timeout=0.5)
    project.revise("0001", None, USERS)
    fleet.upgrade(project.repo, source=project.source)
    name = project.names[0]
    with project.where[name].connect(name, autocommit=False) as holder:
        holder.execute("LOCK TABLE alembic_version")
        status = fleet.status(project.repo, source=project.source)
    assert (len(status.standings["at"]), [cause.names for cause in status.causes]) == (2, [[name]])


def test_many_names_are_one_question_to_each_server(project: Project) -> None:
    """Those that are selected by their names are found by one listing, and not each by itself."""
    found = fleet.members(project.repo, Selection(names=tuple(project.names))).found
    assert [member.database.home for member in found] == [project.home(name) for name in project.names]
    assert project.repo.stats().attempts == len(project.servers)
