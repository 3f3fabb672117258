"""The revisions of a schema, read from real folders of scripts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.util import CommandError

from shardrepo.errors import ConfigError
from shardrepo.scripts import Move, Revisions, Scripts, Source, location_of
from tests.migrations import write_line, write_script


@pytest.fixture
def line(tmp_path: Path) -> Scripts:
    """Four revisions, one after the other."""
    return Scripts(Source(write_line(tmp_path / "line", "one", "two", "three", "four")))


@pytest.fixture
def branched(tmp_path: Path) -> Scripts:
    """Two bases that are merged, and two branches after that."""
    folder = tmp_path / "branched"
    write_script(folder, "a1", labels=["a"])
    write_script(folder, "a2", "a1")
    write_script(folder, "b1", labels=["b"])
    write_script(folder, "merged", "a2", "b1")
    write_script(folder, "x", "merged")
    write_script(folder, "y", "merged")
    return Scripts(Source(str(folder)))


@pytest.fixture
def dependent(tmp_path: Path) -> Scripts:
    """Two branches, of which the second needs what the first ends in."""
    folder = tmp_path / "dependent"
    write_script(folder, "a1", labels=["a"])
    write_script(folder, "a2", "a1")
    write_script(folder, "b1", labels=["b"], depends_on=["a2"])
    write_script(folder, "b2", "b1")
    return Scripts(Source(str(folder)))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


# Loading


def test_heads(line: Scripts, branched: Scripts, dependent: Scripts) -> None:
    """What no other revision comes after: one of each branch, sorted, whether others depend on it or not."""
    assert [scripts.heads for scripts in (line, branched, dependent)] == [("four",), ("x", "y"), ("a2", "b2")]


def test_no_revision_yet(tmp_path: Path) -> None:
    """A folder that was just made has no head, and no database is behind."""
    (tmp_path / "versions").mkdir()
    scripts = Scripts(Source(str(tmp_path)))
    assert (scripts.heads, scripts.standing((), scripts.heads), scripts.lacking(())) == ((), "at", 0)


@pytest.mark.parametrize("location", ["/no/such/folder", "shardrepo:nowhere"])
def test_a_folder_that_is_not_there(location: str) -> None:
    """The message names it, and how to make one."""
    message = refused(lambda: Scripts(Source(location)))
    assert f"no migrations in {location!r}" in message
    assert "`shardrepo init`" in message


def test_a_package_that_is_not_there() -> None:
    """The message names both."""
    message = refused(lambda: Scripts(Source("no_such_package:migrations")))
    assert "'no_such_package:migrations'" in message
    assert "ModuleNotFoundError: No module named 'no_such_package'" in message


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("def (", "SyntaxError"),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
        ("1 / 0", "ZeroDivisionError"),
        ("down_revision = 'later'", "CycleDetected"),
        ("down_revision = 'first'", "LoopDetected"),
        ("depends_on = 'nothing'", "KeyError: 'nothing'"),
        ("del revision", "revision"),
    ],
)
def test_a_script_that_cannot_be_loaded(tmp_path: Path, body: str, cause: str) -> None:
    """All are loaded at once, so that none fails later; the message says where they are, and the cause."""
    write_script(tmp_path, "first", body=body)
    write_script(tmp_path, "later", "first")
    message = refused(lambda: Scripts(Source(str(tmp_path))))
    assert str(tmp_path) in message
    assert cause in message


@pytest.mark.filterwarnings("ignore:Revision gone")
def test_a_revision_that_was_deleted(tmp_path: Path) -> None:
    """What comes after it is not taken for the whole."""
    write_script(tmp_path, "orphan", "gone")
    assert "'gone'" in refused(lambda: Scripts(Source(str(tmp_path))))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alembic.ini", "[alembic]\nscript_location = elsewhere\nversion_locations = {0}/more\npath_separator = os\n"),
        ("pyproject.toml", "[tool.alembic]\nscript_location = 'elsewhere'\nversion_locations = ['{0}/more']\n"),
    ],
)
def test_alembics_own_settings(tmp_path: Path, name: str, text: str) -> None:
    """They are taken from its file, where the scripts are from the source, whatever that is called."""
    folder = tmp_path / "50 % done"
    write_line(tmp_path / "more", "elsewhere")
    (tmp_path / "more" / "versions" / "elsewhere.py").rename(tmp_path / "more" / "elsewhere.py")
    write_line(folder, "here")
    config_file = tmp_path / name
    config_file.write_text(text.format(tmp_path))
    assert Scripts(Source(str(folder))).heads == ("here",)
    assert Scripts(Source(str(folder), str(config_file))).heads == ("elsewhere",)


def test_they_are_loaded_once(tmp_path: Path) -> None:
    """However many threads ask at the same time, each of them gets the same object."""
    count = tmp_path / "count"
    write_script(tmp_path, "one", body=f"with open({str(count)!r}, 'a') as file: file.write('x')")
    source = Source(str(tmp_path))
    barrier = threading.Barrier(4, timeout=30)

    def load(_: int) -> Scripts:
        barrier.wait()
        return Scripts.of(source)

    with ThreadPoolExecutor(4) as executor:
        found = set(executor.map(load, range(4)))
    assert len(found) == 1
    assert count.read_text() == "x"


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    """Scripts that are put right are loaded at the next try."""
    source = Source(str(tmp_path))
    script = write_script(tmp_path, "one", body="1 / 0")
    refused(lambda: Scripts.of(source))
    script.unlink()
    write_script(tmp_path, "two")
    assert Scripts.of(source).heads == ("two",)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_forked_meanwhile(tmp_path: Path) -> None:
    """A child that was forked while another thread was loading loads them itself."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    write_script(tmp_path / "slow", "one", body=f"open({str(fifo)!r}).close()")
    write_script(tmp_path / "fast", "two")
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(Scripts.of, Source(str(tmp_path / "slow")))
        writer = os.open(fifo, os.O_WRONLY)  # returns once the script has the other end, under the lock
        child = os.fork()
        if child == 0:
            os._exit(Scripts.of(Source(str(tmp_path / "fast"))).heads != ("two",))
        assert os.waitpid(child, 0)[1] == 0
        os.close(writer)
        assert future.result().heads == ("one",)


@pytest.mark.parametrize("given", ["package:folder", "/there"])
def test_a_location_that_means_the_same_everywhere(given: str) -> None:
    """A package's, or an absolute one, stays as it is."""
    assert location_of(given) == given


def test_a_relative_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where it was when it was given."""
    monkeypatch.chdir(tmp_path)
    assert location_of("migrations") == str(tmp_path / "migrations")


# What a name means


@pytest.mark.parametrize(
    ("target", "revisions"),
    [("head", ("four",)), ("heads", ("four",)), ("base", ()), ("two", ("two",)), ("thr", ("three",))],
)
def test_resolve(line: Scripts, target: str, revisions: Revisions) -> None:
    """A name of Alembic's, a revision, or the first characters of one."""
    assert line.resolve(target) == revisions


@pytest.mark.parametrize("target", ["nothing", "HEAD", " head", "one:two", "one,two"])
def test_a_name_of_nothing(line: Scripts, target: str) -> None:
    """The message repeats it."""
    assert f"{target!r} names no revision of these migrations" in refused(lambda: line.resolve(target))


def test_a_name_that_is_misspelt(line: Scripts) -> None:
    """The message has the one that was meant."""
    assert refused(lambda: line.resolve("tow")).endswith("; did you mean 'two'?")


def test_the_beginning_of_several_names(tmp_path: Path) -> None:
    """It names none of them."""
    scripts = Scripts(Source(write_line(tmp_path, "same1", "same2")))
    assert "'same' names no revision of these migrations" in refused(lambda: scripts.resolve("same"))


def test_an_empty_name(line: Scripts) -> None:
    """Alembic would take it for base."""
    assert "the revision is empty" in refused(lambda: line.resolve(""))


@pytest.mark.parametrize("target", ["+1", "-1", "head-1", "two+1"])
def test_a_relative_name(line: Scripts, target: str) -> None:
    """It names no revision until a database's own is known."""
    assert f"{target!r} is relative to where a database is" in refused(lambda: line.resolve(target))


def test_several_heads_where_one_is_meant(branched: Scripts) -> None:
    """The message has them; `heads`, or a branch's own, is what to say."""
    message = refused(lambda: branched.resolve("head"))
    assert "(heads: x, y); name one, or `heads`" in message
    assert branched.resolve("heads") == ("x", "y")
    assert branched.resolve("a") == ("a1",)


# How a database stands


@pytest.mark.parametrize(
    ("found", "target", "missing", "standing"),
    [
        ((), (), 0, "at"),
        ((), ("four",), 4, "behind"),
        (("two",), ("four",), 2, "behind"),
        (("four",), ("four",), 0, "at"),
        (("four",), ("two",), 0, "ahead"),
        (("one",), (), 0, "ahead"),
    ],
)
def test_standing(line: Scripts, found: Revisions, target: Revisions, missing: int, standing: str) -> None:
    """Behind is what lacks a revision of the target's, ahead what lacks none and has more."""
    assert (line.missing(found, target), line.standing(found, target)) == (missing, standing)


@pytest.mark.parametrize(
    ("found", "target", "missing", "standing"),
    [
        (("a2",), ("merged",), 2, "behind"),
        (("a2", "b1"), ("merged",), 1, "behind"),
        (("x",), ("y",), 1, "behind"),
        (("x",), ("x", "y"), 1, "behind"),
        (("x", "y"), ("y",), 0, "ahead"),
        (("y", "x"), ("x", "y"), 0, "at"),
    ],
)
def test_standing_on_branches(
    branched: Scripts, found: Revisions, target: Revisions, missing: int, standing: str
) -> None:
    """What is ahead on one branch may be behind on another."""
    assert (branched.missing(found, target), branched.standing(found, target)) == (missing, standing)


@pytest.mark.parametrize(
    ("found", "missing"), [((), 4), (("a1",), 3), (("a2",), 2), (("b1",), 1), (("b2",), 0), (("a2", "b2"), 0)]
)
def test_standing_where_one_branch_depends_on_another(dependent: Scripts, found: Revisions, missing: int) -> None:
    """Who has a revision has what it depends on too, which Alembic does not note."""
    assert dependent.missing(found, dependent.heads) == missing


@pytest.mark.parametrize("revision", ["five", "fou", "head", "heads", "base", "", "@", "four+1"])
def test_a_revision_that_the_scripts_do_not_have(line: Scripts, revision: str) -> None:
    """Nothing but a revision's whole name is known, and a database that is at another is not compared."""
    assert not line.knows(revision)
    assert line.standing((revision,), ("four",)) == "unknown"
    assert line.standing(("four", revision), ("four",)) == "unknown"


@pytest.mark.parametrize(
    ("found", "lacking"),
    [(("four",), 0), (("three",), 0), (("two",), 2), ((), 4), (("five",), 0), (("one", "five"), 0)],
)
def test_lacking(line: Scripts, found: Revisions, lacking: int) -> None:
    """One revision behind is near enough, and what is newer than the scripts is not behind."""
    assert line.lacking(found) == lacking


# The way there


@pytest.mark.parametrize(
    ("move", "target", "heads", "steps"),
    [
        ("upgrade", "head", ("two",), ["three", "four"]),
        ("upgrade", "+1", (), ["one"]),
        ("upgrade", "head", ("four",), []),
        ("downgrade", "one", ("three",), ["three", "two"]),
        ("downgrade", "base", ("one",), ["one"]),
        ("downgrade", "-1", ("three",), ["three"]),
    ],
)
def test_steps(line: Scripts, move: Move, target: str, heads: Revisions, steps: list[str]) -> None:
    """What Alembic runs, in its order."""
    assert [step.revision.revision for step in line.steps(move, target, heads)] == steps


def test_a_stamp_is_one_step(line: Scripts) -> None:
    """It notes a revision and runs none."""
    assert [step.to_revisions_no_deps for step in line.steps("stamp", "three", ("one",))] == [("three",)]


@pytest.mark.parametrize("move", ["upgrade", "downgrade", "stamp"])
def test_steps_from_what_is_not_known(line: Scripts, move: Move) -> None:
    """Alembic's own error says that it cannot find the revision."""
    with pytest.raises(CommandError, match="'five'"):
        line.steps(move, "four", ("five",))


@pytest.mark.parametrize(
    ("move", "target", "heads", "destination"),
    [
        ("upgrade", "+1", (), "one"),
        ("upgrade", "+2", ("two",), "four"),
        ("upgrade", "one+2", ("one",), "three"),
        ("upgrade", "one+1", ("four",), "four"),
        ("upgrade", "head-1", ("one",), "three"),
        ("downgrade", "-1", ("four",), "three"),
        ("downgrade", "-4", ("four",), "base"),
        ("downgrade", "three-1", ("four",), "two"),
    ],
)
def test_destination(line: Scripts, move: Move, target: str, heads: Revisions, destination: str) -> None:
    """A relative target is the revision that it comes to from where a database is."""
    assert line.destination(move, target, heads) == destination


@pytest.mark.parametrize("target", ["head", "heads", "base", "two", "nothing", "a@head"])
def test_a_destination_that_is_the_same_everywhere(line: Scripts, target: str) -> None:
    """Any other target stays what it is."""
    assert line.destination("upgrade", target, ("one",)) == target


@pytest.mark.parametrize(
    ("move", "target", "heads"),
    [
        ("upgrade", "+5", ()),
        ("upgrade", "+1", ("four",)),
        ("upgrade", "-1", ("four",)),
        ("upgrade", "+1", ("five",)),
        ("downgrade", "-2", ("one",)),
        ("downgrade", "-1", ()),
        ("downgrade", "+1", ("one",)),
        ("stamp", "+1", ("one",)),
    ],
)
def test_a_destination_beyond_the_end(line: Scripts, move: Move, target: str, heads: Revisions) -> None:
    """Nothing is done halfway: the message says from where there is no way."""
    message = refused(lambda: line.destination(move, target, heads))
    assert f"{move} {target!r} leads nowhere from {' '.join(heads) or 'base'}: " in message


@pytest.mark.parametrize(
    ("move", "target", "heads", "destination"),
    [
        ("upgrade", "a@+1", (), "a1"),
        ("upgrade", "x@+1", ("merged",), "x"),
        ("downgrade", "a@-1", ("a2", "b1"), "a1"),
    ],
)
def test_a_destination_on_a_branch(
    branched: Scripts, move: Move, target: str, heads: Revisions, destination: str
) -> None:
    """A branch's name says which way to go where there are several."""
    assert branched.destination(move, target, heads) == destination


@pytest.mark.parametrize(("move", "heads"), [("upgrade", ("merged",)), ("upgrade", ()), ("downgrade", ("merged",))])
def test_an_ambiguous_destination(branched: Scripts, move: Move, heads: Revisions) -> None:
    """Without one there is no answer."""
    target = "+1" if move == "upgrade" else "-1"
    assert "leads nowhere from" in refused(lambda: branched.destination(move, target, heads))


@pytest.mark.filterwarnings("ignore:downgrade -1 from multiple heads is ambiguous")
@pytest.mark.parametrize(("target", "heads", "end"), [("-1", ("x", "y"), "merged"), ("a@-1", ("a1", "b1"), "base")])
def test_a_destination_that_other_branches_would_reach_too(
    branched: Scripts, target: str, heads: Revisions, end: str
) -> None:
    """One step back on one branch is not the way to that revision, by which all would go: it is refused."""
    message = refused(lambda: branched.destination("downgrade", target, heads))
    assert f"leads from {' '.join(heads)} to {end} on one branch of several" in message


# One by one


def test_the_order_of_all(line: Scripts, branched: Scripts, dependent: Scripts) -> None:
    """Each comes after those that it follows or depends on, on whatever branch."""
    assert line.order == ("one", "two", "three", "four")
    for scripts, pairs in [
        (branched, [("a1", "a2"), ("a2", "merged"), ("b1", "merged"), ("merged", "x"), ("merged", "y")]),
        (dependent, [("a1", "a2"), ("a2", "b1"), ("b1", "b2")]),
    ]:
        assert len(set(scripts.order)) == len(scripts.order)
        assert all(scripts.order.index(first) < scripts.order.index(then) for first, then in pairs)


def test_where_a_database_is_before_a_revision(line: Scripts, branched: Scripts, dependent: Scripts) -> None:
    """It has all that the revision needs, in as few words as the table of versions has."""
    assert (line.before("one"), line.before("four")) == ((), ("three",))
    assert sorted(branched.before("merged")) == ["a2", "b1"]
    assert (branched.before("y"), dependent.before("b1")) == (("merged",), ("a2",))


@pytest.mark.parametrize(("revision", "heads"), [("a1", ("a1", "b1")), ("merged", ("merged",)), ("y", ("x", "y"))])
def test_the_way_back_of_one(branched: Scripts, revision: str, heads: Revisions) -> None:
    """It undoes just that, and leaves the other branches where they are."""
    steps = branched.steps("downgrade", branched.way_back(revision), heads)
    assert [step.revision.revision for step in steps] == [revision]


def test_where_a_script_is(line: Scripts) -> None:
    """Its file, which messages name."""
    assert Path(line.path("two")).name == "two.py"
