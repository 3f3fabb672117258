"""One Repo over hundreds or thousands of PostgreSQL databases."""

from .across import Outcome
from .config import Config
from .database import DEFAULT, Choice, Database
from .errors import (
    AuthenticationError,
    CheckoutTimeoutError,
    ConfigError,
    ConnectError,
    ConstraintError,
    DatabaseBehindError,
    DatabaseStateError,
    FleetError,
    ListingError,
    NoDatabaseError,
    NotInTransactionError,
    ReadOnlyError,
    RepoDisposedError,
    SandboxError,
    ServerFullError,
    ServerUnavailableError,
    ShardRepoError,
    StaleError,
    TransactionDoomedError,
    TransactionOwnerError,
    UnknownDatabaseError,
    WrongDatabaseError,
)
from .log import DatabaseFilter
from .repo import Repo
from .returning import BulkResult
from .sandbox import Sandbox
from .session import RoutedSession
from .stats import Stats

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "AuthenticationError",
    "BulkResult",
    "CheckoutTimeoutError",
    "Choice",
    "Config",
    "ConfigError",
    "ConnectError",
    "ConstraintError",
    "Database",
    "DatabaseBehindError",
    "DatabaseFilter",
    "DatabaseStateError",
    "FleetError",
    "ListingError",
    "NoDatabaseError",
    "NotInTransactionError",
    "Outcome",
    "ReadOnlyError",
    "Repo",
    "RepoDisposedError",
    "RoutedSession",
    "Sandbox",
    "SandboxError",
    "ServerFullError",
    "ServerUnavailableError",
    "ShardRepoError",
    "StaleError",
    "Stats",
    "TransactionDoomedError",
    "TransactionOwnerError",
    "UnknownDatabaseError",
    "WrongDatabaseError",
]
