"""Migrating a fleet: every database exactly where it is to be, whatever happens on the way."""

from __future__ import annotations

from shardrepo import fleet

from .conftest import Project

ONE_MORE = 'op.add_column("users", sa.Column("age", sa.Integer()))'


def test_all_databases_come_to_head(project: Project) -> None:
    """Those of every server, from nothing; and what is there already is left alone the second time."""
    report = fleet.upgrade(project.repo, source=project.source)
    assert (report.changed, report.unchanged, report.exit_code) == (6, 0, 0)
    assert project.revisions() == dict.fromkeys(project.names, ["0001"])
    again = fleet.upgrade(project.repo, source=project.source)
    assert (again.changed, again.unchanged, again.exit_code) == (0, 6, 0)
