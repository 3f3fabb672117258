"""Tests of web_app.py, on real databases. Run them: pytest examples/test_app.py

pytest.ini says what is tested: the repo, its migrations, and the databases that last as long as the run. The servers
are started for it. Each test that is marked with `shards` is in a sandbox over these databases: nothing that it writes
is there afterwards, whether the application commits it or not.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from factory.declarations import Sequence
from sqlalchemy import select
from web_app import MyRepo, Note, ask

from shardrepo import Repo, Sandbox
from shardrepo.testing.assertions import assert_databases_touched, assert_no_leaks
from shardrepo.testing.factories import RepoFactory
from shardrepo.testing.migrations import Migrations
from shardrepo.testing.statements import count_statements

ACME, BOLT = "acme.example.com", "bolt.example.com"


class NoteFactory(RepoFactory[Note]):
    class Meta:
        model = Note
        repo = MyRepo

    text = Sequence(lambda number: f"note {number}")


# A request runs in tasks and threads of its own, which are in the test's sandbox without a word.


@pytest.mark.shards("tenant_acme", "tenant_bolt")
def test_tenants_never_see_each_others_notes() -> None:
    status, _ = asyncio.run(ask("POST", ACME, "/notes", "Buy rockets"))
    assert status == 201
    assert asyncio.run(ask("GET", ACME, "/notes")) == (200, ["Buy rockets"])
    assert asyncio.run(ask("GET", BOLT, "/notes")) == (200, [])


@pytest.mark.shards("tenant_acme", "tenant_bolt")
def test_each_test_begins_with_nothing() -> None:
    assert MyRepo.across(["tenant_acme", "tenant_bolt"]).count(Note).collect() == {"tenant_acme": 0, "tenant_bolt": 0}


# What a test needs is made by factories, in the database that is chosen, a hundred by one statement.


@pytest.mark.shards("tenant_acme")
def test_a_request_is_one_statement_in_the_tenants_database() -> None:
    NoteFactory.on("tenant_acme").create_batch(100)
    with assert_databases_touched(MyRepo, ["tenant_acme"]), assert_no_leaks(MyRepo), count_statements(MyRepo) as sent:
        status, notes = asyncio.run(ask("GET", ACME, "/notes"))
    assert status == 200
    assert notes == MyRepo.across(["tenant_acme"]).all(select(Note.text).order_by(Note.id)).collect()["tenant_acme"]
    assert len(sent) == 1


# A thread that the test did not start has to be allowed; else it is refused, rather than let into the database itself.


@pytest.mark.shards("tenant_bolt")
def test_a_worker_of_the_applications_own(shardrepo_sandbox: Sandbox) -> None:
    def count() -> int:
        with MyRepo.using("tenant_bolt"):
            return MyRepo.count(Note)

    NoteFactory.on("tenant_bolt").create()
    with ThreadPoolExecutor() as workers:
        shardrepo_sandbox.allow(workers)
        assert workers.submit(count).result() == 1


# What cannot be in a transaction is done outside, and undone by hand.


def test_a_tenant_signs_up(shardrepo_sandbox: Sandbox) -> None:
    crux = "crux.example.com"
    assert asyncio.run(ask("GET", crux, "/notes")) == (404, {"error": "no such tenant"})
    with shardrepo_sandbox.unboxed("tenant_crux"):
        MyRepo.create_database("tenant_crux")
        try:
            MyRepo.execute("CREATE TABLE notes (id serial PRIMARY KEY, text varchar NOT NULL)")
            assert asyncio.run(ask("POST", crux, "/notes", "Hello")) == (201, {"id": 1, "text": "Hello"})
        finally:
            MyRepo.drop_database("tenant_crux", force=True)


# Or in a database of its own, with the schema and nothing else, which is dropped afterwards.


def test_in_a_fresh_database(shardrepo_repo: type[Repo], shardrepo_database: str) -> None:
    with shardrepo_repo.using(shardrepo_database):
        MyRepo.insert(Note(text="committed"))
        MyRepo.execute("VACUUM notes")
        assert MyRepo.all(select(Note.text)) == ["committed"]


# The migrations: each goes up, down and up again, they end where the models are, and they do to rows what they should.


def test_migrations(shardrepo_migrations: Migrations) -> None:
    shardrepo_migrations.one_head()
    shardrepo_migrations.up_and_down()
    shardrepo_migrations.check()


def test_blanks_are_cut_off(shardrepo_migrations: Migrations) -> None:
    with shardrepo_migrations.before("0002", count=3) as sample:
        for database in sample.databases:
            with MyRepo.using(database):
                MyRepo.insert_all(Note, [{"text": "  Buy rockets "}, {"text": "Sell shoes"}])
        sample.upgrade()
        for database in sample.databases:
            with MyRepo.using(database):
                assert MyRepo.all(select(Note.text).order_by(Note.id)) == ["Buy rockets", "Sell shoes"]
