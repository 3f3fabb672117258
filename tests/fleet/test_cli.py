"""The command, run as its users run it: what it prints where, what it exits with, and what it has done then."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import await_
from .conftest import AGE, Project

SELECTED: list[tuple[list[str], list[int]]] = [
    ([], [0, 1, 2, 3, 4, 5]),
    (["-d", "{0}", "-d", "{4}"], [0, 4]),
    (["--match", "*3", "--match", "*5"], [3, 5]),
    (["--server", "{server}"], [0, 3]),
    (["--server", "{server}", "--match", "*3"], [3]),
    (["--from", "names.txt"], [1, 2]),
    (["--from", "-"], [5]),
]


def lines_of_json(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_fleet_is_brought_to_head_and_back(configured: Project) -> None:
    """Upgrade, status, current, stamp and downgrade say in a few lines what they find and do."""
    before = configured.run("status")
    assert (before.returncode, before.stderr) == (1, "")
    assert before.stdout.splitlines()[:2] == ["6 databases, 6 behind; 0001 is meant", "       6  base"]
    upgraded = configured.run("upgrade")
    assert (upgraded.returncode, upgraded.stderr) == (0, "")
    assert upgraded.stdout.startswith("upgrade head: 6 changed, in ")
    assert configured.revisions() == {name: ["0001"] for name in configured.names}
    after = configured.run("status")
    assert (after.returncode, after.stdout) == (0, "6 databases, 6 at; 0001 is meant\n       6  0001\n")
    current = configured.run("current", "--format", "csv")
    assert sorted(csv.reader(current.stdout.splitlines()[1:])) == [[name, "0001"] for name in configured.names]
    assert configured.run("downgrade", "base", "-d", configured.names[0]).returncode == 0
    assert configured.run("stamp", "head").returncode == 0
    assert configured.revisions() == {name: ["0001"] for name in configured.names}
    assert configured.sql(configured.names[0], "SELECT to_regclass('users') IS NULL") == [(True,)]


def test_json_is_alone_on_the_standard_output(configured: Project) -> None:
    """Each line of --json can be parsed by itself: an outcome for every database, and the report."""
    done = configured.run("upgrade", "--json")
    *outcomes, last = lines_of_json(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(each["database"] for each in outcomes) == configured.names
    assert {each["home"] for each in outcomes} == {configured.home(name) for name in configured.names}
    assert all(each["ok"] and each["after"] == ["0001"] for each in outcomes)
    assert (last["report"]["changed"], last["report"]["exit_code"]) == (6, 0)
    for command in (["status"], ["history"], ["heads"], ["upgrade", "--plan"], ["check"]):
        assert lines_of_json(configured.run(*command, "--json"))


def test_a_plan_does_nothing(configured: Project) -> None:
    """With --plan, the stages are shown, with what may fail in each, and no database is touched."""
    done = configured.run("upgrade", "--plan", "--canary", "1", "--then", "50%", "--max-failures", "1")
    first = configured.names[0]
    assert done.returncode == 0
    assert done.stdout.splitlines()[:2] == [
        "upgrade head: 6 databases to do; they are 6 behind",
        f"  stage 1: 1 ({first}), 0 may fail",
    ]
    assert [line.split(" (")[0] for line in done.stdout.splitlines()[2:]] == ["  stage 2: 3", "  stage 3: 2"]
    assert not any(configured.revisions().values())
    assert not (configured.root / ".shardrepo").exists()


def test_a_canary_that_fails_ends_it(configured: Project) -> None:
    """Nothing is begun after it, the exit code is 3, and the command that is printed goes on where it was."""
    for name in configured.names:
        configured.sql(name, "CREATE TABLE users (id int)")
    done = configured.run("upgrade", "--canary", "1", "--then", "rest")
    assert done.returncode == 3
    assert "1 failed, 5 not begun" in done.stdout
    assert 'relation "users" already exists' in done.stdout
    assert not any(configured.revisions().values())
    (printed,) = [line for line in done.stdout.splitlines() if line.startswith("go on:")]
    for name in configured.names:
        configured.sql(name, "DROP TABLE users")
    resumed = configured.run(*printed.split()[3:])
    assert resumed.returncode == 0
    assert configured.revisions() == {name: ["0001"] for name in configured.names}


def test_a_run_is_taken_up_as_it_was(configured: Project) -> None:
    """Where it was to go need not be said again, and cannot be changed; what is no such run is refused."""
    broken = configured.names[5]
    configured.run("upgrade")
    configured.sql(broken, "DROP TABLE users")
    assert configured.run("downgrade", "base").returncode == 1
    assert "was to go to base, and not to 0001" in configured.refused("downgrade", "0001", "--resume", "last")
    assert "that is how it is taken up" in configured.refused("upgrade", "--resume", "last")
    configured.sql(broken, "CREATE TABLE users ()")
    assert configured.run("downgrade", "--resume", "last").returncode == 0
    assert configured.revisions() == configured.all_at()
    assert "downgrade where to? Name a revision" in configured.refused("downgrade")


def test_the_budget_ends_it_too(configured: Project) -> None:
    """When more fail than --max-failures, the exit code is 3; the setting in the environment holds without a flag."""
    for name in configured.names:
        configured.sql(name, "CREATE TABLE users (id int)")
    assert configured.run("upgrade", "--max-failures", "1", "-j", "1").returncode == 3
    assert configured.run("upgrade", "-j", "1", SHARDREPO_MAX_FAILURES="0").returncode == 3
    assert configured.run("upgrade", SHARDREPO_MAX_FAILURES="0", SHARDREPO_STAGES="1,rest").returncode == 3
    assert configured.run("upgrade", "--max-failures", "6", SHARDREPO_MAX_FAILURES="0").returncode == 1


def test_one_that_fails_can_be_tried_again_by_itself(configured: Project) -> None:
    """The others are done; the failure is told with its cause; the printed command retries that one, and then none."""
    broken = configured.names[2]
    configured.sql(broken, "CREATE TABLE users (id int)")
    done = configured.run("upgrade")
    assert done.returncode == 1
    assert "5 changed, 1 failed" in done.stdout
    assert (
        f'1 x DuplicateTable (42P07) in revision 0001: relation "users" already exists\n      {broken}' in done.stdout
    )
    (printed,) = [line for line in done.stdout.splitlines() if line.startswith("retry:")]
    configured.sql(broken, "DROP TABLE users")
    again = configured.run(*printed.split()[2:])
    assert (again.returncode, again.stdout.split(",")[0]) == (0, "upgrade head: 1 changed")
    nothing = configured.run("upgrade", "--failed", "last")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert nothing.stderr == "no database failed in run last: nothing to do\n"


def test_breadth_first(configured: Project) -> None:
    """With --breadth, one revision is a part of its own, over all databases, before the next one."""
    configured.revise("0002", "0001", AGE)
    plan = configured.run("upgrade", "--breadth", "--plan")
    assert [line.split(":")[0].strip() for line in plan.stdout.splitlines()[1:]] == ["0001, stage 1", "0002, stage 1"]
    assert configured.run("upgrade", "--breadth").returncode == 0
    assert configured.revisions() == {name: ["0002"] for name in configured.names}


def test_what_differs_from_the_models_is_shown(configured: Project) -> None:
    """The check exits with 1 and names the operation that is missing; it keeps no journal."""
    configured.run("upgrade")
    assert configured.run("check").returncode == 0
    changed = configured.names[1]
    configured.sql(changed, "ALTER TABLE users DROP COLUMN name")
    done = configured.run("check")
    assert done.returncode == 1
    assert f"{changed} differs from the models: op.add_column('users'" in done.stdout
    assert len(list((configured.root / ".shardrepo").glob("*.jsonl"))) == 1


def test_sql_is_written_for_each_revision_that_databases_are_at(configured: Project) -> None:
    """With --sql nothing is run: it is written once for each, or for the range that is named, asking no database."""
    configured.run("upgrade", "-d", configured.names[0])
    configured.revise("0002", "0001", AGE)
    done = configured.run("upgrade", "--sql")
    assert done.returncode == 0
    assert f"-- 1 databases at 0001: {configured.names[0]}\n" in done.stdout
    assert "-- 5 databases at base: " in done.stdout
    assert (done.stdout.count("CREATE TABLE users"), done.stdout.count("ADD COLUMN age")) == (1, 2)
    ranged = configured.run("upgrade", "--sql", "0001:0002")
    assert (ranged.stdout.count("CREATE TABLE users"), ranged.stdout.count("ADD COLUMN age")) == (0, 1)
    assert configured.run("downgrade", "--sql", "0001:base").stdout.count("DROP TABLE users") == 1
    assert configured.revisions() == {
        name: ["0001"] if name == configured.names[0] else [] for name in configured.names
    }


@pytest.mark.parametrize(("flags", "selected"), SELECTED, ids=lambda given: " ".join(map(str, given)) or "all")
def test_databases_are_selected(configured: Project, flags: list[str], selected: list[int]) -> None:
    """By name, pattern, server, a file of names or the standard input; each further kind of flag narrows it down."""
    names, server = configured.names, configured.servers[0]
    (configured.root / "names.txt").write_text(f"{names[2]}\n\n# not this one\n  {names[1]} # this one\n")
    given = [flag.format(*names, server=f"{server.host}:{server.port}") for flag in flags]
    done = configured.run("databases", *given, "--format", "csv", stdin=f"{names[5]}\n")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(row["database"] for row in rows) == [names[number] for number in selected]
    assert all(row["server"].endswith(str(configured.where[row["database"]].port)) for row in rows)


def test_databases_are_selected_by_tag(make_project: Callable[..., Project]) -> None:
    """With every tag that is named; a tag that none has is an error, with the one that was probably meant."""
    project = make_project(
        directory={"one": {"host": "db01", "tags": "paid eu"}, "two": {"host": "db01", "tags": "paid"}, "six": "db02"}
    )
    project.configure()
    assert [
        row["database"] for row in lines_of_json(project.run("databases", "--tag", "paid", "--format", "json"))
    ] == [
        "one",
        "two",
    ]
    assert "one" in project.run("databases", "--tag", "paid", "--tag", "eu").stdout
    wrong = project.run("databases", "--tag", "payed")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean 'paid'?" in wrong.stderr


def test_those_behind_are_selected(configured: Project) -> None:
    """With --behind, those that lack revisions; with none of them there is nothing to do, which is no failure."""
    configured.run("upgrade", "--match", "*[0-3]")
    done = configured.run("databases", "--behind", "--format", "csv")
    assert sorted(line.split(",")[0] for line in done.stdout.splitlines()[1:]) == configured.names[4:]
    assert configured.run("upgrade", "--behind").returncode == 0
    nothing = configured.run("upgrade", "--behind")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert nothing.stderr == "none of the selected databases is behind: nothing to do\n"


def test_sql_is_run_in_every_database(configured: Project) -> None:
    """Rows come with the name of their database, as a table, CSV or JSON; columns of one name are told apart."""
    query = "SELECT 1 AS n, '[b] 10%'::text AS n, current_database() AS database"
    table = configured.run("exec", query)
    assert (table.returncode, table.stderr) == (0, "")
    assert all(name in table.stdout for name in ["database", "n_2", "[b] 10%", *configured.names])
    rows = list(csv.DictReader(configured.run("exec", query, "--format", "csv").stdout.splitlines()))
    assert sorted(row["database"] for row in rows) == configured.names
    assert all(row["database_2"] == row["database"] and (row["n"], row["n_2"]) == ("1", "[b] 10%") for row in rows)
    assert sorted(row["database"] for row in lines_of_json(configured.run("exec", query, "--format", "json"))) == (
        configured.names
    )


def test_sql_may_only_read_unless_it_is_told_otherwise(configured: Project) -> None:
    """What writes fails in every database, once in the report; with --write it is committed in each."""
    refused = configured.run("exec", "CREATE TABLE made ()")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.splitlines()[:2] == [
        "6 failed:",
        "  6 x ReadOnlySqlTransaction (25006): cannot execute CREATE TABLE in a read-only transaction",
    ]
    assert configured.run("exec", "--write", "CREATE TABLE made ()").returncode == 0
    assert configured.run("exec", "--write", "VACUUM made").returncode == 0
    assert all(configured.sql(name, "SELECT count(*) FROM made") == [(0,)] for name in configured.names)


def test_one_failure_hides_no_other_databases_rows(configured: Project) -> None:
    """Those rows are on the standard output, the failure is on the other, and the exit code is 1."""
    configured.run("upgrade", "-d", configured.names[0])
    done = configured.run("exec", "SELECT count(*) FROM users", "--format", "json")
    assert done.returncode == 1
    assert lines_of_json(done) == [{"database": configured.names[0], "count": 0}]
    assert '5 x UndefinedTable (42P01): relation "users" does not exist' in done.stderr


def test_csv_never_puts_a_value_under_another_columns_name(configured: Project) -> None:
    """Rows of a database with other columns are refused in CSV; a table has a place for each column."""
    first, second = configured.names[:2]
    configured.sql(first, "CREATE TABLE t AS SELECT 1 AS a, 2 AS b")
    configured.sql(second, "CREATE TABLE t AS SELECT 3 AS b")
    only = ("-d", first, "-d", second)
    refused = configured.run("exec", "SELECT * FROM t", *only, "--format", "csv")
    assert refused.returncode == 2
    assert "name the columns that are wanted" in refused.stderr
    assert configured.run("exec", "SELECT * FROM t", *only).returncode == 0


def test_every_database_is_pinged(configured: Project) -> None:
    """With the seconds that each took to answer."""
    rows = lines_of_json(configured.run("ping", "--format", "json"))
    assert sorted(row["database"] for row in rows) == configured.names
    assert all(row["seconds"] > 0 for row in rows)


def test_one_that_the_directory_does_not_know_is_told_of(configured: Project) -> None:
    """It is made where it was asked for, and no selection finds it."""
    server, name = configured.servers[0], f"other_{configured.prefix}"
    done = configured.run("create", name, "--server", f"{server.host}:{server.port}")
    server.drop_database(name)
    assert (done.returncode, done.stdout) == (0, f"made {server.host}:{server.port}/{name} at 0001\n")
    assert done.stderr == f"the directory does not know {name}: no command will find it until it does\n"


def test_a_revision_is_written(configured: Project) -> None:
    """By comparing, it is named; where the revisions so far cannot be run, it says which one, and writes none."""
    versions = configured.root / "migrations" / "versions"
    template = "revision = ${repr(up_revision)}\ndown_revision = ${repr(down_revision)}\n"
    (configured.root / "migrations" / "script.py.mako").write_text(template)
    done = configured.run("revision", "-m", "more", "--autogenerate", "--rev-id", "0002")
    assert (done.returncode, done.stdout) == (0, f"wrote {versions / '0002_more.py'}\n")
    (versions / "0002_more.py").unlink()
    configured.revise("0002", "0001", 'op.execute("SELECT 1/0")')
    failed = configured.run("revision", "-m", "more", "--autogenerate")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "shardrepo: revision 0002: division by zero\n"
    configured.revise("0003", "0001")
    assert "Multiple heads are present" in configured.refused("revision", "-m", "more")
    assert len(list(versions.glob("*.py"))) == 3


def test_revisions_are_listed(configured: Project) -> None:
    """The newest first, each with what it follows; those that nothing follows are the heads."""
    configured.revise("0002", "0001")
    configured.revise("0003", "0001")
    history = configured.run("history").stdout.splitlines()
    assert history[-1] == "<base> -> 0001, revision 0001"
    assert sorted(history[:2]) == ["0001 -> 0002 (head), revision 0002", "0001 -> 0003 (head), revision 0003"]
    heads = lines_of_json(configured.run("heads", "--json"))
    assert sorted(each["revision"] for each in heads) == ["0002", "0003"]


def test_databases_are_made_and_dropped(configured: Project) -> None:
    """Each is told as it is there or gone; one that exists fails alone; a drop asks, and does nothing without a yes."""
    name, server = f"{configured.prefix}made", configured.servers[1]
    on = ("--server", f"{server.host}:{server.port}")
    made = configured.run("create", name, configured.names[1], *on)
    assert made.returncode == 1
    assert made.stdout == f"made {server.host}:{server.port}/{name} at 0001\n"
    assert f'database "{configured.names[1]}" already exists' in made.stderr
    assert configured.run("current", "-d", name, "--format", "csv").stdout.splitlines()[1] == f"{name},0001"
    for answer in ("", "n\n"):
        unsure = configured.run("drop", name, "--json", stdin=answer)
        assert (unsure.returncode, unsure.stdout) == (1, "")
    assert name in server.databases()
    dropped = configured.run("drop", name, stdin="y\n")
    assert (dropped.returncode, dropped.stdout) == (0, f"dropped {server.host}:{server.port}/{name}\n")
    (told,) = lines_of_json(configured.run("create", name, *on, "--json"))
    assert (told["database"], told["ok"], told["revisions"]) == (name, True, ["0001"])
    assert configured.run("drop", "--yes", name).returncode == 0


# On the way


def test_how_far_it_is_goes_to_the_other_output(configured: Project) -> None:
    """A line now and then where nobody looks on, beside the result."""
    program = "import shardrepo.cli.show as show; show.INTERVAL = 0; from shardrepo.cli import main; main()"
    command = [sys.executable, "-c", program, "upgrade"]
    done = subprocess.run(command, cwd=configured.root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("upgrade head: 6 changed")
    assert "stage 1: 6 of 6" in done.stderr


@pytest.fixture
def begun(configured: Project) -> Iterator[subprocess.Popen[str]]:
    """An upgrade of three databases, one at a time, that has begun its first one, where it waits for a file."""
    waiting = 'open("begun", "w").close()\nimport os\nwhile not os.path.exists("go_on"): op.execute("SELECT 1")'
    configured.revise("0001", None, waiting)
    command = [sys.executable, "-m", "shardrepo", "upgrade", "-j", "1", "--match", "*[0-2]"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=configured.root, stdout=pipe, stderr=pipe, text=True) as process:
        await_((configured.root / "begun").exists)
        yield process
        (configured.root / "go_on").touch()


def test_terminated_it_finishes_what_it_has_begun(configured: Project, begun: subprocess.Popen[str]) -> None:
    """It says so at once, begins nothing more, exits with 130, and can be taken up where it was."""
    begun.send_signal(signal.SIGTERM)
    assert begun.stderr is not None
    assert "finishing what is under way" in begun.stderr.readline()
    (configured.root / "go_on").touch()
    out, _ = begun.communicate()
    assert begun.returncode == 130
    assert "1 changed, 2 not begun" in out
    assert sum(map(bool, configured.revisions().values())) == 1
    assert configured.run("upgrade", "--resume", "last").returncode == 0
    assert sum(map(bool, configured.revisions().values())) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_create_that_is_interrupted_leaves_nothing_half_made(configured: Project, number: signal.Signals) -> None:
    """The database that is being migrated is stopped between two statements and removed again; the exit code is 130."""
    waiting = 'open("begun", "w").close()\nwhile True: op.execute("SELECT 1")'
    configured.revise("0001", None, waiting)
    server, name = configured.servers[0], f"{configured.prefix}half"
    # A shell has its background jobs ignore Ctrl-C, and these tests may be one.
    program = (
        f"import signal; signal.signal({number:d}, signal.default_int_handler); from shardrepo.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "create", name, "--server", f"{server.host}:{server.port}"]
    with subprocess.Popen(command, cwd=configured.root, env=os.environ, stderr=subprocess.PIPE) as process:
        await_((configured.root / "begun").exists)
        assert name in server.databases()
        process.send_signal(number)
        process.communicate()
    assert process.returncode == 130
    assert name not in server.databases()


def test_the_command_is_installed_under_its_name(configured: Project) -> None:
    """As a program of its own, which finds the project from a folder within it too."""
    program = Path(sys.executable).with_name("shardrepo")
    done = subprocess.run(
        [str(program), "history"], cwd=configured.root / "migrations", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "<base> -> 0001 (head), revision 0001\n")
