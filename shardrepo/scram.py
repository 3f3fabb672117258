"""What SCRAM derives from a password, remembered: derived once per server and role instead of per connection.

Deriving takes the 4,096 rounds of PBKDF2 that PostgreSQL asks for by default, some 4 ms during which libpq holds
the whole interpreter; the rest of a local connect takes about one. From version 18 on, libpq takes the derived
keys in place of the password (https://www.postgresql.org/docs/18/libpq-connect.html, scram_client_key).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Final

from .database import Database, Secret, digest

# The server's challenge in libpq's trace: B <length> AuthenticationSASLContinue 'r=<nonce>,s=<salt>,i=<rounds>'
_CHALLENGE: Final = re.compile(rb"\tAuthenticationSASLContinue\t '[^']*,s=([A-Za-z0-9+/=]+),i=(\d+)'")

# More servers and roles than this are not remembered all at once.
MAX_KEYS: Final = 1024


@dataclass(frozen=True, slots=True)
class Keys:
    """The two keys of RFC 5802 that stand in for a password, in base64. As secret as the password."""

    client: str = field(repr=False)
    server: str = field(repr=False)


class KeyStore:
    """The keys of the passwords that servers have accepted. Safe for threads: each step is one of a dict's."""

    def __init__(self) -> None:
        self._keys: dict[object, Keys | None] = {}

    def has(self, database: Database, password: Secret | None) -> bool:
        """Whether it is known what to use: keys, or that there are none to use."""
        return _identity(database, password) in self._keys

    def get(self, database: Database, password: Secret | None) -> Keys | None:
        """The keys for *password* where *database* is, if a connection was opened with it before."""
        return self._keys.get(_identity(database, password))

    def learn(self, database: Database, password: Secret | None, trace: bytes) -> None:
        """Remember the keys of a password that was just accepted, as *trace* shows; or that there are none, because
        another method than SCRAM is in use, or the password would have to be normalised as libpq does it."""
        challenge = _CHALLENGE.search(trace)
        keys = None
        if challenge is not None and password is not None and password.reveal().isascii():
            keys = _derived(password, base64.b64decode(challenge[1]), int(challenge[2]))
        if len(self._keys) >= MAX_KEYS:
            self._keys.clear()
        self._keys[_identity(database, password)] = keys


def _identity(database: Database, password: Secret | None) -> object:
    return database.server, database.username, digest(password)


def _derived(password: Secret, salt: bytes, rounds: int) -> Keys:
    # The interpreter is free meanwhile: hashlib lets go of it.
    salted = hashlib.pbkdf2_hmac("sha256", password.reveal().encode(), salt, rounds)
    client, server = (base64.b64encode(hmac.digest(salted, name, "sha256")) for name in (b"Client Key", b"Server Key"))
    return Keys(client.decode(), server.decode())
