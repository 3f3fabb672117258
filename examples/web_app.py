"""A web application with a database for each tenant, in plain ASGI. Run it: python examples/web_app.py

It then serves a few requests to itself, on a real server. Any ASGI server runs `app` as it is, with DATABASE_URL
in the environment; any framework's application may stand where `notes` does, behind the same `Tenants`.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import Repo, UnknownDatabaseError
from shardrepo.testing.servers import start_servers

Scope: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Reply: TypeAlias = tuple[int, object]

# The tenants that there are, by subdomain, and their databases. What a client sends only ever picks one of these.
DOMAIN = "example.com"
TENANTS = {"acme": "tenant_acme", "bolt": "tenant_bolt", "crux": "tenant_crux"}

NO_TENANT: Reply = (404, {"error": "no such tenant"})


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def config() -> dict[str, Any]:
    """What the repo asks for when a database is first needed. There is no default to fall back to."""
    return {"url": os.environ["DATABASE_URL"], "pool_size": 20, "require_database": True}


class MyRepo(Repo, config=config):
    pass


class Tenants:
    """A middleware that chooses the database of each request's tenant, around all that answers the request.

    A request for a tenant that is not known is answered here. Code that is not behind this has no database:
    there a verb raises `NoDatabaseError`, and sends nothing.
    """

    def __init__(self, app: Application, databases: Mapping[str, str]) -> None:
        self.app = app
        self.databases = databases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"{scope['type']} has no tenant here")
        database = self.databases.get(subdomain(scope))
        if database is None:
            await reply(send, *NO_TENANT)
            return
        # The choice is this task's, and that of what it awaits, starts or runs in a thread. A server has a task for
        # each request, so that requests of other tenants, in between, never see it.
        with MyRepo.using(database):
            await self.app(scope, receive, send)


def subdomain(scope: Scope) -> str:
    """The tenant's part of the Host header; empty if the host is not one of ours."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower().partition(":")[0]
    name, _, domain = host.partition(".")
    return name if domain == DOMAIN else ""


async def notes(scope: Scope, receive: Receive, send: Send) -> None:
    """The application: it knows nothing of tenants, and answers once it knows the whole answer."""
    try:
        status, body = await answer(scope["method"], scope["path"], receive)
    except UnknownDatabaseError:  # a tenant whose database is not there yet, or not any more
        status, body = NO_TENANT
    await reply(send, status, body)


async def answer(method: str, path: str, receive: Receive) -> Reply:
    match method, path.split("/")[1:]:
        case "GET", ["notes"]:
            return await list_notes()
        case "POST", ["notes"]:
            return await add_note(await body_of(receive))
        case "GET", ["notes", key] if key.isdecimal():
            return await show_note(int(key))
    return 404, {"error": "no such page"}


# A verb waits for the server, so it runs in a thread, which takes the choice along.


async def list_notes() -> Reply:
    return 200, await asyncio.to_thread(MyRepo.all, select(Note.text).order_by(Note.id))


async def add_note(text: str) -> Reply:
    note = await asyncio.to_thread(MyRepo.insert, Note(text=text))
    return 201, {"id": note.id, "text": note.text}


async def show_note(key: int) -> Reply:
    note = await asyncio.to_thread(MyRepo.get, Note, key)
    return (404, {"error": "no such note"}) if note is None else (200, {"id": note.id, "text": note.text})


async def body_of(receive: Receive) -> str:
    """What the client sends along."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError("the client left before it had sent everything")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body.decode()


async def reply(send: Send, status: int, body: object) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


app = Tenants(notes, TENANTS)


# From here on, what an ASGI server and its clients would do.


async def ask(method: str, host: str, path: str, body: str = "") -> Reply:
    """One request to `app`, and its reply."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body.encode()}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": [(b"host", host.encode())]}, receive, send)
    start, end = sent
    return start["status"], json.loads(end["body"])


async def ask_at_once(*requests: tuple[str, ...]) -> None:
    """Several requests at the same time, each in a task of its own as a server has it."""
    replies = await asyncio.gather(*(ask(*request) for request in requests))
    for (method, host, path, *_), (status, body) in zip(requests, replies, strict=True):
        print(f"{method} {host}{path}: {status} {json.dumps(body)}")


async def serve() -> None:
    acme, bolt, crux = (f"{tenant}.{DOMAIN}" for tenant in TENANTS)
    await ask_at_once(("POST", acme, "/notes", "Buy rockets"), ("POST", bolt, "/notes", "Sell shoes"))
    await ask_at_once(
        ("GET", acme, "/notes/1"),
        ("GET", bolt, "/notes/1"),
        ("GET", acme, "/notes"),
        ("GET", bolt, "/notes/2"),
        ("GET", crux, "/notes"),
        ("GET", f"nobody.{DOMAIN}", "/notes"),
        ("GET", "acme.example.net", "/notes"),
    )


if __name__ == "__main__":
    with start_servers(1) as (server,):
        os.environ["DATABASE_URL"] = server.url("postgres").render_as_string(hide_password=False)
        for tenant in ("acme", "bolt"):  # crux has signed up, and its database is not there yet
            server.create_database(TENANTS[tenant])
            with MyRepo.using(TENANTS[tenant]):
                Base.metadata.create_all(MyRepo.engine())
        asyncio.run(serve())
        MyRepo.dispose()
