"""Which database a log record is about."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .errors import ShardRepoError

if TYPE_CHECKING:
    from .repo import Repo


class DatabaseFilter(logging.Filter):
    """Adds ``database``, ``server`` and ``tags`` to each record, for a format such as ``%(database)s %(message)s``.

        >>> handler = logging.StreamHandler()
        >>> handler.addFilter(DatabaseFilter(MyRepo))

    They are those that *repo* would use where the record was made, ``-`` where it has none, and what `call_options`
    says there. The library's own records,
    under ``shardrepo.*``, name the database that they are about and are left as they are, those that are about none
    excepted. Drops no record.
    """

    def __init__(self, repo: type[Repo]) -> None:
        super().__init__()
        self._repo = repo

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "database"):
            try:
                labels = self._repo.get_database().labels
            except ShardRepoError:
                labels = {"database": "-", "server": "-"}
            record.__dict__.update(labels, tags=self._repo._router.context.tags)
        return True
