"""Options that several commands have: dataclasses, one of which is a command's parameter, and its fields options."""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import ConfigError, ListingError
from ..fleet import Members, Rollout, Selection, Stage, behind, canary, members
from ..fleet.journal import read
from ..fleet.settings import Settings
from ..fleet.worker import repo_of
from ..repo import Repo
from ..scripts import Source

_WHICH = "Which databases"
_HOW = "How"


@dataclass(frozen=True)
class Project:
    """What the command works with."""

    repo: Annotated[str | None, typer.Option(help="The repo, as module:Class.", show_default=False)] = None
    script_location: Annotated[
        str | None, typer.Option(help="Alembic's scripts, a folder or package:folder.", show_default=False)
    ] = None
    journal: Annotated[
        str | None, typer.Option(help="The folder of the journals, .shardrepo if not set.", show_default=False)
    ] = None

    def settings(self, **flags: Any) -> Settings:
        """What is set, with these flags over it; the project's folder is where modules are imported from."""
        settings = Settings.load({**vars(self), **flags})
        if str(settings.root) not in sys.path:
            sys.path.insert(0, str(settings.root))
        return settings

    def open(self, **flags: Any) -> "Opened":
        """The repo and its scripts, with what is set."""
        settings = self.settings(**flags)
        if settings.repo is None:
            raise ConfigError(
                'no repo is configured: write repo = "app.repo:MyRepo" under [tool.shardrepo] in pyproject.toml, set '
                "SHARDREPO_REPO, or give --repo"
            )
        repo = repo_of(settings.repo)
        if settings.script_location is None:
            settings = replace(settings, script_location=repo._router.databases.config.script_location)
        return Opened(settings, repo, settings.source)


@dataclass(frozen=True)
class Opened:
    """A project's repo.

    Attributes:
        settings: What is set.
        repo: The repo.
        source: Its scripts, where something but its own config says where they are.
    """

    settings: Settings
    repo: type[Repo]
    source: Source | None


@dataclass(frozen=True)
class Where:
    """Which databases."""

    database: Annotated[
        list[str] | None,
        typer.Option("-d", "--database", help="One of this name; may be repeated.", rich_help_panel=_WHICH),
    ] = None
    match: Annotated[
        list[str] | None, typer.Option(help="Those whose names fit, like 'shard0*'.", rich_help_panel=_WHICH)
    ] = None
    server: Annotated[list[str] | None, typer.Option(help="Those on a host, or host:port.", rich_help_panel=_WHICH)] = (
        None
    )
    tag: Annotated[list[str] | None, typer.Option(help="Those that have a tag.", rich_help_panel=_WHICH)] = None
    behind: Annotated[bool, typer.Option("--behind", help="Those that lack revisions.", rich_help_panel=_WHICH)] = False
    failed: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Those that failed in a run, 'last' for the last one.", rich_help_panel=_WHICH
        ),
    ] = None
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FILE", help="Those named in a file, a line each; - to read them.", rich_help_panel=_WHICH
        ),
    ] = None

    def selection(self, opened: Opened) -> Selection:
        """What is selected; one that is to be asked first, by its names."""
        names = [*(self.database or ()), *self._failed(opened), *self._listed()]
        where = Selection(tuple(names), tuple(self.match or ()), tuple(self.server or ()), tuple(self.tag or ()))
        return self._behind(opened, where) if self.behind else where

    def _behind(self, opened: Opened, where: Selection) -> Selection:
        lacking = behind(opened.repo, members(opened.repo, where), opened.source)
        if lacking.failures:
            raise ListingError(
                f"nobody knows which databases of {', '.join(lacking.failures)} are behind, as they cannot be listed: "
                "nothing was done. Name the other servers (--server), or leave --behind out",
                found=(),
                failures=lacking.failures,
            )
        if not lacking.found:
            _nothing_to_do("none of the selected databases is behind")
        return Selection(tuple(member.name for member in lacking.found))

    def members(self, opened: Opened) -> Members:
        """Those that are selected."""
        return members(opened.repo, self.selection(opened))

    def _failed(self, opened: Opened) -> Sequence[str]:
        if self.failed is None:
            return ()
        failed = read(opened.settings.journals, self.failed).failed
        if not failed:
            _nothing_to_do(f"no database failed in run {self.failed}")
        return failed

    def _listed(self) -> Sequence[str]:
        if self.from_ is None:
            return ()
        try:
            text = sys.stdin.read() if self.from_ == "-" else Path(self.from_).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--from {self.from_}: {error}") from error
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        names = [line for line in lines if line]
        if not names:
            raise ConfigError(f"--from {self.from_} names no database, a line each: nothing was done")
        return names


def _nothing_to_do(why: str) -> NoReturn:
    print(f"{why}: nothing to do", file=sys.stderr)
    raise typer.Exit(0)


@dataclass(frozen=True)
class How:
    """How a fleet is migrated."""

    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Databases at a time.", rich_help_panel=_HOW)
    ] = None
    per_server: Annotated[
        int | None, typer.Option(min=1, help="Databases of one server at a time.", rich_help_panel=_HOW)
    ] = None
    canary: Annotated[
        str | None,
        typer.Option(metavar="N|N%", help="Databases to begin with, none of which may fail.", rich_help_panel=_HOW),
    ] = None
    then: Annotated[
        list[str] | None,
        typer.Option(metavar="N|N%|rest", help="How many come next; may be repeated.", rich_help_panel=_HOW),
    ] = None
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|N%", help="How many may fail; any number if not set.", rich_help_panel=_HOW)
    ] = None
    lock_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that a statement waits for a lock, 5 if not set.", rich_help_panel=_HOW),
    ] = None
    lock_retries: Annotated[
        int | None, typer.Option(min=0, help="Further tries after such a wait, 3 if not set.", rich_help_panel=_HOW)
    ] = None
    patience: Annotated[
        float | None,
        typer.Option(help="Seconds to wait for another migration of a database, 60 if not set.", rich_help_panel=_HOW),
    ] = None
    executor: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Who does it: dask://host:port for a Dask cluster.", rich_help_panel=_HOW),
    ] = None
    x: Annotated[
        list[str] | None, typer.Option("-x", help="An argument for env.py, as Alembic has it.", rich_help_panel=_HOW)
    ] = None

    def flags(self) -> dict[str, Any]:
        """What is said over what is set."""
        named = {name: getattr(self, name) for name in _SETTINGS_OF_HOW}
        stages = [canary(self.canary)] if self.canary is not None else []
        stages += [Stage.of(size) for size in self.then or ()]
        return {**named, "stages": stages or None}

    def rollout(self, settings: Settings, **more: Any) -> Rollout:
        """How, in all."""
        return settings.rollout(x=tuple(self.x or ()), **more)


_SETTINGS_OF_HOW = ("jobs", "per_server", "max_failures", "lock_timeout", "lock_retries", "patience")


def expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give *command*, in place of each parameter that is one of these dataclasses, an option for each of its fields."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += [
                inspect.Parameter(field.name, _KEYWORD, default=field.default, annotation=field.type)
                for field in fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(kind=_KEYWORD))

    @wraps(command)
    def run(**given: Any) -> Any:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        return command(**given, **made)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what `signature` reads
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
