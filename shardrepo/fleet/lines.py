"""Text for people, of bounded length whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final

# Names, and servers, that are said of many.
MAX_NAMES: Final = 5
MAX_SERVERS: Final = 8

# PostgreSQL's longest name, in bytes.
_LONGEST_NAME: Final = 63


def line(text: object, most: int = 200) -> str:
    """*text* on one line, of at most *most* characters."""
    words = " ".join(str(text).split())
    return words if len(words) <= most else f"{words[: most - 3]}..."


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first few of *names*, and how many more there are; of *count* if *names* are not all of them."""
    shown = [line(name, _LONGEST_NAME) for name in names[:MAX_NAMES]]
    rest = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def unlisted(failures: Mapping[str, Exception]) -> Iterable[str]:
    """Why the databases of servers, ``host:port``, could not be listed."""
    for server, error in islice(failures.items(), MAX_SERVERS):
        yield f"the databases of {line(server)} could not be listed, and are left out: {line(error)}"
    if len(failures) > MAX_SERVERS:
        yield f"nor could those of {len(failures) - MAX_SERVERS} more servers"
