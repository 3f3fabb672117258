"""What helps to test an application's migrations, on real projects and servers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Thread

import pytest
from alembic import command
from alembic.util import CommandError
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DataError, OperationalError, ProgrammingError

from shardrepo import ConfigError, Database, ServerUnavailableError, UnknownDatabaseError
from shardrepo.demo.models import DemoRepo
from shardrepo.fleet.lock import KEY
from shardrepo.fleet.making import SCRATCH
from shardrepo.scripts import Source
from shardrepo.testing.migrations import MigrationError, Migrations, migrate
from shardrepo.testing.servers import Server, Servers

from ..conftest import await_, connections_of, run_sql
from ..fleet.conftest import AGE, ENV, USERS, Project

pytestmark = pytest.mark.testing

DROP_USERS = 'op.drop_table("users")'
DROP_AGE = 'op.drop_column("users", "age")'

SPLIT = """op.add_column("users", sa.Column("surname", sa.String()))
op.execute("UPDATE users SET surname = split_part(name, ' ', 2), name = split_part(name, ' ', 1)")"""
JOIN = """op.execute("UPDATE users SET name = name || ' ' || surname")
op.drop_column("users", "surname")"""

# Makes one table more each time, as the rows tell that it leaves behind.
COUNTED = """count = lambda: op.get_bind().scalar(sa.text("SELECT count(*) FROM users WHERE id < 1000"))
op.execute("INSERT INTO users (name) VALUES ('x')")
for number in range(count()):
    op.execute(f"CREATE TABLE t{number + 1} ()")"""

# A project's tests by pytest-alembic, as its users write them.
PYTEST_ALEMBIC = """
import pytest
from pytest_alembic.tests import (
    test_model_definitions_match_ddl, test_single_head_revision, test_up_down_consistency, test_upgrade
)

from {module} import MyRepo
from shardrepo.testing.migrations import Migrations

migrations = Migrations(MyRepo)


@pytest.fixture
def alembic_config():
    return migrations.config


@pytest.fixture
def alembic_engine():
    with migrations.engine() as engine:
        yield engine
"""


@pytest.fixture
def project(make_project: Callable[..., Project]) -> Project:
    """A project of two databases, with a first revision that makes the table of its models."""
    return begun(make_project(2))


def begun(project: Project) -> Project:
    project.revise("0001", None, USERS, DROP_USERS)
    return project


@pytest.fixture(autouse=True)
def _nothing_left(servers: Servers) -> Iterator[None]:
    """Every test leaves no scratch database behind, however it ends."""
    yield
    assert [name for server in servers for name in server.databases() if name.startswith(SCRATCH)] == []


def kit(project: Project) -> Migrations:
    return Migrations(project.repo, source=project.source)


def at(project: Project, name: str) -> Database:
    """One of its databases, as the repo sees it."""
    with project.repo.using(name):
        return project.repo.get_database()


def move(project: Project, name: str, revision: str = "head") -> list[str]:
    """Bring one of its databases to a revision; returns where it is then."""
    migrate(project.repo, at(project, name), revision, source=project.source)
    return project.revision(name)


def problems(project: Project, **options: Sequence[str]) -> tuple[str, ...]:
    """What going up and down finds."""
    with pytest.raises(MigrationError) as caught:
        kit(project).up_and_down(**options)
    return caught.value.problems


def test_a_database_is_brought_to_a_revision(project: Project) -> None:
    """Up or down, by its name or relative to where it is; nothing is done in one that is there, nor in any other."""
    project.revise("0002", "0001", AGE, DROP_AGE)
    one, other = project.names
    for revision, expected in [
        ("head", ["0002"]),
        ("0001", ["0001"]),
        ("+1", ["0002"]),
        ("-2", []),
        ("0002", ["0002"]),
        ("0002", ["0002"]),
        ("base", []),
    ]:
        assert move(project, one, revision) == expected
    assert project.revision(other) == []


def test_what_is_no_way_is_refused(project: Project) -> None:
    """A revision that does not exist, with the one that was meant; a step too far; a revision without a script."""
    project.revise("a1b2c3", "0001")
    name = project.names[0]
    for revision, said in [
        ("a1b2c4", "'a1b2c4' names no revision .* did you mean 'a1b2c3'"),
        ("+3", r"cannot be brought to '\+3'"),
        ("", "the revision is empty"),
    ]:
        with pytest.raises(ConfigError, match=said):
            move(project, name, revision)
    move(project, name)
    project.sql(name, "UPDATE alembic_version SET version_num = 'lost'")
    with pytest.raises(ConfigError, match=f"/{name} cannot be brought to 'head': it is at revision lost, of which"):
        move(project, name)


def test_what_a_script_raises_is_what_the_caller_gets(project: Project) -> None:
    """With a note that names the revision, its file and the database; what it had done is undone."""
    project.revise("0002", "0001", AGE + '\nop.execute("SELECT 1/0")')
    name = project.names[0]
    with pytest.raises(DataError, match="division by zero") as caught:
        move(project, name)
    (note,) = [each for each in caught.value.__notes__ if "revision" in each]
    assert note.startswith("upgrade of revision 0002 (")
    assert str(project.root / "migrations" / "versions" / "0002.py") in note
    assert note.endswith(f"in {at(project, name).home}")
    assert project.revision(name) == ["0001"]


def test_threads_migrate_one_after_the_other(make_project: Callable[..., Project]) -> None:
    """Alembic's globals are of the whole process, and still each database gets its own tables."""
    project = begun(make_project(9))
    project.revise("0002", "0001", "\n".join([AGE, *[f'op.execute("CREATE TABLE t{n} ()")' for n in range(20)]]))
    databases = [at(project, name) for name in project.names]
    together = Barrier(3)

    def run(mine: Sequence[Database]) -> None:
        together.wait()
        for database in mine:
            migrate(project.repo, database, source=project.source)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, [databases[:3], databases[3:6], databases[6:]]))
    assert project.revisions() == project.all_at("0002")
    assert all(project.sql(name, "SELECT count(*) FROM t19") == [(0,)] for name in project.names)


def test_it_waits_for_whoever_migrates_the_database(project: Project) -> None:
    """By the lock that the fleet and Alembic itself take."""
    name = project.names[0]
    server = project.where[name]
    asking = "SELECT query FROM pg_stat_activity WHERE datname = %s AND application_name = 'shardrepo test'"
    with server.connect(name) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", (KEY,))
        waiting = Thread(target=move, args=(project, name))
        waiting.start()
        await_(lambda: any("pg_try_advisory_lock" in row[0] for row in run_sql(server, "postgres", asking, [name])))
        assert project.revision(name) == []
        holder.execute("SELECT pg_advisory_unlock(%s)", (KEY,))
        waiting.join()
    assert project.revision(name) == ["0001"]


def test_connections_are_replaced_after_a_migration(project: Project) -> None:
    """What the repo's own had prepared in the database is of the old schema."""
    name = project.names[0]
    server, application = project.where[name], project.repo._router.databases.config.application_name
    with project.repo.using(name):
        (pid,) = project.repo.execute("SELECT pg_backend_pid()").one()
        move(project, name)
        assert (pid, name) not in connections_of(server, application)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("pass", "does not run this fleet: it is to call shardrepo.fleet.env.run"),
        ("from shardrepo import Repo\nfrom shardrepo.fleet import env\n"
         "class Other(Repo, config='postgresql://db01/app'): ...\nenv.run(Other, None)",
         "this env.py runs Other, and the fleet to be migrated is of another repo: give env.run"),
        ("from shardrepo.fleet import env\nfrom {module} import MyRepo\nenv.run(MyRepo, None)",
         "there is nothing to compare with: give env.run.. the metadata of the models"),
    ],
    ids=["no-run", "other-repo", "no-metadata"],
)  # fmt: skip
def test_an_env_that_is_not_the_repos_is_refused(project: Project, env: str, said: str) -> None:
    """It is said what env.py is to do."""
    project.write_env(env.format(module=project.module))
    with pytest.raises(ConfigError, match=said):
        kit(project).check()


def test_a_project_without_scripts_is_refused(project: Project, tmp_path: Path) -> None:
    """One with none at all when it is asked for, one with no revision when that is tested."""
    with pytest.raises(ConfigError, match=r"no migrations in .*/nowhere'.*`shardrepo init` makes some"):
        Migrations(project.repo, source=Source(str(tmp_path / "nowhere")))
    (project.root / "migrations" / "versions" / "0001.py").unlink()
    for ask in (kit(project).up_and_down, kit(project).one_head):
        with pytest.raises(MigrationError, match=r"there are no revisions in .*: write one with `shardrepo revision`"):
            ask()


def test_a_server_that_is_down_is_named(project: Project) -> None:
    """In the error of whatever test needs a scratch database."""
    module = project.root / f"{project.module}.py"
    module.write_text(module.read_text().replace(f":{project.servers[0].port}/", ":1/"))
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1/"):
        kit(project).up_and_down()


def test_one_head_is_asked_for(project: Project) -> None:
    """It is returned; several are named with their files, and nothing is connected to."""
    assert kit(project).one_head() == "0001"
    project.revise("0002", "0001")
    project.revise("0003", "0001")
    with pytest.raises(MigrationError, match="2 heads: write one that follows all of them") as caught:
        kit(project).one_head()
    assert [problem.split()[1] for problem in caught.value.problems] == ["0002", "0003"]
    assert all(problem.endswith(".py)") for problem in caught.value.problems)
    assert project.repo.stats().attempts == 0


def test_all_kinds_of_graphs_go_up_and_down(project: Project) -> None:
    """Branches, a merge, a second base, one that depends on another branch, several heads, and parts that commit."""
    table = 'op.create_table("{0}", sa.Column("id", sa.Integer()))'
    for revision, down, needs in [
        ("b1", "0001", None),
        ("b2", "b1", None),
        ("c1", "0001", None),
        ("m1", ("b2", "c1"), None),
        ("d1", "0001", None),
        ("x1", None, None),
        ("x2", "x1", "d1"),
        ("e1", "d1", None),
    ]:
        project.revise(revision, down, table.format(revision), f'op.drop_table("{revision}")', depends_on=needs)
    project.revise(
        "x3",
        "x2",
        'with op.get_context().autocommit_block():\n    op.execute("CREATE INDEX CONCURRENTLY i ON x1 (id)")',
        'with op.get_context().autocommit_block():\n    op.execute("DROP INDEX CONCURRENTLY i")',
    )
    kit(project).up_and_down()


@pytest.mark.parametrize(
    ("upgrade", "downgrade", "differing"),
    [
        ("CREATE INDEX i ON users (name)", "", "is there: index public.i: CREATE INDEX i ON public.users"),
        ("CREATE TYPE mood AS ENUM ('sad')", "", "is there: enum public.mood: 'sad'"),
        ("CREATE SEQUENCE s", "", "is there: sequence public.s: bigint start 1"),
        ("ALTER TABLE users ADD CHECK (id > 0)", "", "is there: constraint users_id_check of public.users: CHECK"),
        ("CREATE SCHEMA s", "", "is there: schema s: owned by"),
        ("CREATE DOMAIN d AS text", "", "is there: domain public.d: text"),
        ("CREATE COLLATION c (locale = 'C')", "", "is there: collation public.c"),
        ("CREATE VIEW v AS SELECT 1", "", "is there: view public.v: owned by"),
        ("CREATE EXTENSION pg_trgm", "", "is there: extension pg_trgm: 1.6 in public"),
        ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "", "is there: function public.f()"),
        ("CREATE STATISTICS st ON id, name FROM users", "", "is there: statistics st of public.users"),
        ("CREATE POLICY p ON users USING (id > 0)", "", "is there: policy p of public.users: permissive"),
        ("CREATE RULE r AS ON DELETE TO users DO INSTEAD NOTHING", "", "is there: rule r of public.users"),
        ("COMMENT ON COLUMN users.name IS 'given'", "", "is there: comment on table column public.users.name: given"),
        ("GRANT SELECT ON users TO public", "", "differs: privileges on relation public.users: was"),
        ("ALTER TABLE users ENABLE ROW LEVEL SECURITY", "", "differs: table public.users: was"),
        ("ALTER TABLE users ALTER name SET DEFAULT 'x'", "", "is \"character varying not null default 'x'"),
        ("ALTER TABLE users ALTER name TYPE text", "", "is 'text not null'"),
        ("ALTER TABLE users ALTER name DROP NOT NULL", "", "was 'character varying not null', is 'character varying'"),
        ("ALTER SEQUENCE users_id_seq CACHE 9", "", "differs: sequence public.users_id_seq: was '..."),
        ("SELECT 1", "ALTER TABLE users DROP COLUMN name", "is missing: column public.users.name: character varying"),
        ("ALTER TABLE users RENAME name TO title", "", "is missing: column public.users.name"),
    ],
)  # fmt: skip
def test_what_a_downgrade_leaves_is_told(project: Project, upgrade: str, downgrade: str, differing: str) -> None:
    """Whatever it is: also what autogenerate would not see."""
    project.revise("0002", "0001", f'op.execute("""{upgrade}""")', f'op.execute("""{downgrade or "SELECT 1"}""")')
    (problem,) = problems(project)
    head, *lines = problem.splitlines()
    assert head.endswith("/0002.py): its downgrade does not undo it:")
    assert differing in "\n".join(lines)


def test_what_cannot_be_told_from_before_is_the_same(project: Project) -> None:
    """The order of columns, which no downgrade can restore; privileges that were granted and taken away again."""
    project.revise("0002", "0001", AGE, DROP_AGE)
    project.revise(
        "0003", "0002", 'op.drop_column("users", "name")', 'op.execute("ALTER TABLE users ADD name varchar NOT NULL")'
    )
    grant, revoke = "GRANT SELECT ON users TO public", "REVOKE SELECT ON users FROM public"
    project.revise("0004", "0003", f'op.execute("{grant}")', f'op.execute("{revoke}")')
    kit(project).up_and_down()


def test_all_that_is_wrong_is_told_at_once(project: Project) -> None:
    """Each revision with its file; those after one are tried as if it were in order."""
    project.revise("0002", "0001", AGE, "pass")
    project.revise("0003", "0002", "pass", 'op.execute("SELECT 1/0")')
    project.revise("0004", "0003", "pass", "raise NotImplementedError")
    project.revise("0005", "0004", 'op.execute("CREATE TABLE IF NOT EXISTS t ()")', "pass")
    project.revise("0006", "0005", 'op.execute("CREATE INDEX ON users (age)")', 'op.drop_index("users_age_idx")')
    told = problems(project)
    assert [problem.split()[1] for problem in told] == ["0002", "0003", "0004", "0005"]
    assert all(f"({project.root}/migrations/versions/" in problem for problem in told)
    assert "is there: column public.users.age: integer" in told[0]
    assert "its downgrade fails: DataError: (psycopg.errors.DivisionByZero) division by zero" in told[1]
    assert "it is irreversible" in told[2]
    assert "is there: table public.t" in told[3]


def test_one_that_fails_ends_it(project: Project) -> None:
    """Nothing can be said of those after it."""
    project.revise("0002", "0001", 'op.execute("SELECT 1/0")')
    project.revise("0003", "0002", "pass", "raise NotImplementedError")
    (problem,) = problems(project)
    assert "/0002.py): its upgrade fails, so that nothing after it was tried: DataError: " in problem


def test_a_second_upgrade_has_to_be_like_the_first(project: Project) -> None:
    """One that cannot be run twice, or makes something else then, is told, though its downgrade is in order."""
    project.revise("0002", "0001", "op.execute(\"INSERT INTO users VALUES (1000, 'x')\")")
    project.revise("0003", "0002", COUNTED, 'op.execute("DROP TABLE t1")')
    twice, other = problems(project)
    assert "/0002.py): its upgrade fails after its downgrade: ConstraintError: " in twice
    assert "/0003.py): after its downgrade, its upgrade makes something else than before:" in other
    assert "is there: table public.t2: owned by" in other


def test_what_one_database_leaves_for_another_is_told(project: Project) -> None:
    """A role is of the whole server, and is there already in the next database, which a fault has made necessary."""
    role = f"role_{project.prefix}"
    project.revise("0002", "0001", f'op.execute("CREATE ROLE {role}")', f'op.execute("DROP ROLE {role}")')
    project.revise("0003", "0002", AGE)
    project.revise("0004", "0003")
    try:
        left, rest = problems(project)
    finally:
        run_sql(project.servers[0], "postgres", f"DROP ROLE {role}")
    assert "is there: column public.users.age" in left
    assert rest.startswith("1 more were not tried: in a second database, those before them fail: ProgrammingError: ")
    assert "upgrade of revision 0002 (" in rest


def test_irreversible_revisions_are_excused_by_their_names(project: Project) -> None:
    """Then they are not taken back; a name that is none is refused, with the one that was meant."""
    project.revise("a1b2c3", "0001", AGE, "raise NotImplementedError")
    (problem,) = problems(project)
    assert "it is irreversible, its downgrade raises NotImplementedError" in problem
    assert problem.endswith("up_and_down(irreversible={'a1b2c3'})")
    kit(project).up_and_down(irreversible={"a1b2c3"})
    kit(project).up_and_down(irreversible=["a1b2"])
    with pytest.raises(ConfigError, match="did you mean 'a1b2c3'"):
        kit(project).up_and_down(irreversible={"a1b2c4"})
    with pytest.raises(ConfigError, match=r"irreversible is a set of revisions, as in \{'a1b2c3'\}"):
        kit(project).up_and_down(irreversible="a1b2c3")


def test_a_test_may_make_the_databases_itself(project: Project) -> None:
    """They have to be empty: in one that is migrated already nothing would be tested."""
    made: list[str] = []

    @contextmanager
    def scratch() -> Iterator[Database]:
        made.extend(project.add(1))
        yield at(project, made[-1])

    Migrations(project.repo, scratch=scratch, source=project.source).up_and_down()
    assert project.revision(made[0]) == ["0001"]

    @contextmanager
    def migrated() -> Iterator[Database]:
        yield at(project, made[0])

    with pytest.raises(ConfigError, match=f"scratch has made .*/{made[0]}, which is at 0001: .* an empty database"):
        Migrations(project.repo, scratch=migrated, source=project.source).up_and_down()


def test_models_that_the_revisions_do_not_make_are_told(project: Project) -> None:
    """By what autogenerate would write; where they agree, nothing is."""
    kit(project).check()
    project.revise("0002", "0001", AGE, DROP_AGE)
    with pytest.raises(MigrationError, match="`shardrepo revision --autogenerate`") as caught:
        kit(project).check()
    assert caught.value.problems == ("op.drop_column('users', 'age')",)


def test_the_metadata_of_other_models_is_told(project: Project) -> None:
    """It is said what to look at."""
    other = "from sqlalchemy import MetaData, Table\nBase.metadata = MetaData()\nTable('orders', Base.metadata)\n"
    project.write_env(ENV.format(module=project.module).replace("\nenv.run", f"\nclass Base: ...\n{other}\nenv.run"))
    with pytest.raises(MigrationError, match=r"or see that env.run.. is given the metadata of these models") as caught:
        kit(project).check()
    assert any("op.drop_table('users')" in problem for problem in caught.value.problems)


def test_a_data_migration_is_tried_on_several_databases(project: Project) -> None:
    """Each with rows of its own, at the revision before, after the upgrade, and after the downgrade."""
    project.revise("0002", "0001", SPLIT, JOIN)
    project.revise("0003", "0002", 'op.drop_table("users")')
    repo = project.repo
    names = ["Ada Lovelace", "Alan Turing", "Grace Hopper"]
    with kit(project).before("0002", 3) as sample:
        for database, name in zip(sample.databases, names, strict=True):
            with repo.using(database):
                repo.execute("INSERT INTO users (name) VALUES (:name)", {"name": name})
        sample.upgrade()
        for database, name in zip(sample.databases, names, strict=True):
            with repo.using(database):
                assert repo.execute("SELECT name || '+' || surname FROM users").scalar_one() == name.replace(" ", "+")
        sample.downgrade()
        for database, name in zip(sample.databases, names, strict=True):
            with repo.using(database):
                assert repo.execute("SELECT name FROM users").scalar_one() == name
        sample.downgrade()
    assert project.revisions() == project.all_at()


def test_a_data_migration_is_tried_on_copies(project: Project) -> None:
    """Of databases by their names, wherever they are and at whatever revision; those stay as they are."""
    project.revise("0002", "0001", SPLIT, JOIN)
    behind, ahead = project.names
    move(project, behind, "0001")
    project.sql(behind, "INSERT INTO users (name) VALUES ('Ada Lovelace')")
    move(project, ahead, "0002")
    project.sql(ahead, "INSERT INTO users (name, surname) VALUES ('Alan', 'Turing')")
    with kit(project).before("head", templates=[behind, ahead]) as sample:
        one, other = sample.databases
        assert (one.server, other.server) == (at(project, behind).server, at(project, ahead).server)
        for database, name in [(one, "Ada Lovelace"), (other, "Alan Turing")]:
            with sample.connect(database) as connection:
                assert connection.scalar(text("SELECT name FROM users")) == name
        sample.upgrade()
        with sample.connect(one) as connection:
            assert connection.scalar(text("SELECT surname FROM users")) == "Lovelace"
    assert project.revisions() == {behind: ["0001"], ahead: ["0002"]}
    assert project.sql(behind, "SELECT name FROM users") == [("Ada Lovelace",)]


def test_the_revision_before_a_merge_is_both_of_its_parents(project: Project) -> None:
    """A sample has all that the revision needs, and takes back just that."""
    project.revise("b1", "0001", 'op.create_table("b1")', 'op.drop_table("b1")')
    project.revise("c1", "0001", 'op.create_table("c1")', 'op.drop_table("c1")')
    project.revise("m1", ("b1", "c1"), 'op.create_table("m1")', 'op.drop_table("m1")')
    tables = text("SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relname ~ '^[bcm]1$'")
    with kit(project).before("m1") as sample:
        found = []
        for step in (lambda: None, sample.upgrade, sample.downgrade):
            step()
            with sample.connect(sample.databases[0]) as connection:
                found.append(connection.scalar(tables))
    assert found == ["b1 c1", "b1 c1 m1", "b1 c1"]


def test_what_a_data_migration_raises_is_what_the_test_gets(project: Project) -> None:
    """With a note of where that was; a first revision can be tried too."""
    project.revise("0002", "0001", SPLIT, "raise NotImplementedError")
    with kit(project).before("0002", 2) as sample:
        with sample.connect(sample.databases[1]) as connection:
            connection.execute(text("ALTER TABLE users ADD surname text"))
        with pytest.raises(ProgrammingError, match=r'column "surname" .* already exists') as caught:
            sample.upgrade()
        assert any(sample.databases[1].home in note for note in caught.value.__notes__)
    with kit(project).before("0001") as sample:
        sample.upgrade()


def test_who_blocks_a_migration_is_told(project: Project) -> None:
    """A transaction that the test has left open, say."""
    project.revise("0002", "0001", AGE, DROP_AGE)
    with kit(project).before("0002") as sample, sample.connect(sample.databases[0]) as connection:
        connection.execute(text("SELECT * FROM users"))
        with pytest.raises(OperationalError, match="lock timeout") as caught:
            sample.upgrade()
    assert any("blocked by " in note and "SELECT * FROM users" in note for note in caught.value.__notes__)


def test_a_sample_that_cannot_be_is_refused(project: Project) -> None:
    """An unknown revision or template, one that means several revisions, an original that somebody uses."""
    for revision, said in [("0009", "did you mean '0001'"), ("base", "'base' is no revisions, and one is meant")]:
        with pytest.raises(ConfigError, match=said), kit(project).before(revision):
            raise AssertionError
    for options, said in [
        ({"count": 0}, "a sample of 0 databases shows nothing"),
        ({"templates": "shard01"}, r"by their names, as in \['shard01'\]"),
    ]:
        with pytest.raises(ConfigError, match=said), kit(project).before("0001", **options):
            raise AssertionError
    with pytest.raises(UnknownDatabaseError, match="'nobody'"), kit(project).before("0001", templates=["nobody"]):
        raise AssertionError
    name = project.names[0]
    with (
        project.where[name].connect(name),
        pytest.raises(OperationalError, match="is being accessed by other") as caught,
    ):
        with kit(project).before("0001", templates=[name]):
            raise AssertionError
    assert any("nobody may be connected to a template" in note for note in caught.value.__notes__)


def test_require_head_keeps_no_test_out(make_project: Callable[..., Project]) -> None:
    """A sample of an old revision is migrated and asked all the same, as is the database of an engine."""
    folder = make_project().root / "migrations"
    project = make_project(require_head="raise", script_location=str(folder))
    project.root = folder.parent
    (folder / "env.py").write_text(ENV.format(module=project.module))
    begun(project)
    for revision, down in [("0002", "0001"), ("0003", "0002"), ("0004", "0003")]:
        project.revise(revision, down)
    migrations = Migrations(project.repo)
    with migrations.before("0002") as sample, sample.connect(sample.databases[0]) as connection:
        assert connection.scalar(text("SELECT count(*) FROM users")) == 0
    with migrations.engine() as engine, engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def run_pytest(project: Project, *arguments: str) -> str:
    """Run a project's own tests with pytest-alembic; returns what pytest says."""
    (project.root / "test_migrations.py").write_text(PYTEST_ALEMBIC.format(module=project.module))
    program = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-rA", *arguments]
    done = subprocess.run(program, cwd=project.root, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_tests_of_pytest_alembic_pass(project: Project) -> None:
    """All four, in one process, on databases of their own; the repo's are left alone."""
    project.revise("0002", "0001", AGE, DROP_AGE)
    module = project.root / f"{project.module}.py"
    module.write_text(module.read_text().replace("name: Mapped[str]", "name: Mapped[str]\n    age: Mapped[int | None]"))
    assert "4 passed" in (said := run_pytest(project)), said
    assert project.revisions() == project.all_at()


def test_the_tests_of_pytest_alembic_find_what_they_should(project: Project) -> None:
    """Models without a revision, two heads, a downgrade that fails."""
    project.revise("0002", "0001", AGE, 'op.drop_table("nothing")')
    project.revise("0003", "0001")
    said = run_pytest(project)
    assert "3 failed, 1 passed" in said
    assert "PASSED test_migrations.py::test_upgrade" in said


def test_alembic_may_be_given_an_engine_of_the_repos(project: Project) -> None:
    """By a program that runs it, for whatever database: up, down and up again in one process."""
    project.revise("0002", "0001", AGE, DROP_AGE)
    one, other = project.names
    config = kit(project).config
    with project.repo.using(one):
        config.attributes["connection"] = project.repo.engine()
    command.upgrade(config, "head")
    command.downgrade(config, "-1")
    assert project.revisions() == {one: ["0001"], other: []}
    command.upgrade(config, "head")
    assert project.revisions() == {one: ["0002"], other: []}


def test_alembic_may_be_given_no_other(project: Project, make_project: Callable[..., Project], server: Server) -> None:
    """Not one by URL, of another repo, or a connection; nor a name beside it. Nothing is migrated then."""
    (name,) = project.add(1, on=server)
    config = kit(project).config
    by_url = create_engine(server.url(name))
    another = make_project().repo
    with project.repo.using(name), project.repo.engine().connect() as connection, another.using(at(project, name)):
        for given in (by_url, another.engine(), connection, create_engine("sqlite://")):
            config.attributes["connection"] = given
            with pytest.raises(
                CommandError, match=r"no engine of MyRepo, and nothing was sent there: hand over"
            ) as caught:
                command.upgrade(config, "head")
            assert server.password not in str(caught.value)
        config.attributes["connection"] = project.repo.engine()
    config.cmd_opts = type("Options", (), {"x": [f"database={name}"]})
    with pytest.raises(CommandError, match=f"named twice, by -x database={name} and by Engine"):
        command.upgrade(config, "head")
    by_url.dispose()
    assert project.revision(name) == []


def test_the_demos_own_migrations_are_in_order(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have one head, go up and down, and make what its models say."""
    monkeypatch.setenv("DATABASE_URL", server.url("postgres").render_as_string(hide_password=False))
    migrations = Migrations(DemoRepo, source=Source(str(Path(__file__).parents[2] / "migrations")))
    try:
        migrations.one_head()
        migrations.up_and_down()
        migrations.check()
    finally:
        DemoRepo.dispose()
