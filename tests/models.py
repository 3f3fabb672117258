"""The mapped classes that the tests store."""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import (
    Column,
    Computed,
    FetchedValue,
    ForeignKey,
    Index,
    Sequence,
    String,
    Table,
    UniqueConstraint,
    func,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship


class Base(DeclarativeBase):
    """Root of the test models."""


post_tags = Table(
    "post_tags",
    Base.metadata,
    Column("post_id", ForeignKey("posts.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class User(Base):
    """Six columns; one is computed by the server at INSERT and UPDATE, one is unique."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str | None] = mapped_column(String(200), unique=True)
    age: Mapped[int] = mapped_column(default=0)
    city: Mapped[str] = mapped_column(server_default="nowhere")
    name_length: Mapped[int] = mapped_column(Computed("length(name)", persisted=True))
    posts: Mapped[list[Post]] = relationship(back_populates="author", cascade="save-update, merge, delete")


class Post(Base):
    __tablename__ = "posts"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    author: Mapped[User | None] = relationship(back_populates="posts")
    tags: Mapped[list[Tag]] = relationship(secondary=post_tags)


class Tag(Base):
    __tablename__ = "tags"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(unique=True)


class Account(Base):
    """Has a version, which SQLAlchemy counts."""

    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__: Any = {"version_id_col": version}


class Animal(Base):
    """Joined inheritance: two tables for one Dog."""

    __tablename__ = "animals"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__: Any = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "dogs"

    id: Mapped[int] = mapped_column(ForeignKey("animals.id"), primary_key=True)
    breed: Mapped[str]
    __mapper_args__: Any = {"polymorphic_identity": "dog"}


class Place(Base):
    """A primary key of two columns, and a column that the server fills in."""

    __tablename__ = "places"
    __table_args__ = (UniqueConstraint("label"),)

    row: Mapped[int] = mapped_column(primary_key=True)
    seat: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str | None]
    changed: Mapped[str | None] = mapped_column(server_default=func.now().cast(String), server_onupdate=FetchedValue())


class Shelf(Base):
    """Its books come with it, by a join."""

    __tablename__ = "shelves"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]
    books: Mapped[list[Book]] = relationship(lazy="joined", cascade="all, delete-orphan", back_populates="shelf")


class Book(Base):
    """Its chapters come with it, by a second statement; its text does not; its headline is computed by the SELECT."""

    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column()
    text: Mapped[str | None] = mapped_column(deferred=True)
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"))
    headline: Mapped[str] = column_property(func.upper(title))
    shelf: Mapped[Shelf | None] = relationship(back_populates="books")
    chapters: Mapped[list[Chapter]] = relationship(lazy="selectin")


class Chapter(Base):
    __tablename__ = "chapters"

    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int | None] = mapped_column(ForeignKey("books.id"))
    title: Mapped[str]


class Note(Base):
    """Columns that are called otherwise than their attributes, an array, JSON, and a default that Python computes."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    heading: Mapped[str] = mapped_column("Title %", String(20))
    kind: Mapped[str] = mapped_column(String(5), server_default="plain")
    token: Mapped[str] = mapped_column(default=lambda: uuid.uuid4().hex)
    shout: Mapped[str | None] = mapped_column(default=lambda context: _shouted(context))
    words: Mapped[list[str] | None] = mapped_column(ARRAY(String))
    data: Mapped[Any] = mapped_column(JSONB, nullable=True)
    __table_args__ = (Index("notes_of_a_kind", heading, unique=True, postgresql_where=kind == "one"),)


class Numbered(Base):
    """Has another key for its mapping than for its table."""

    __tablename__ = "numbered"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(
        Sequence("numbers"), server_default=Sequence("numbers").next_value(), unique=True
    )
    label: Mapped[str] = mapped_column(server_default="none")
    __mapper_args__: Any = {"primary_key": [number]}


def _shouted(context: Any) -> str:
    """The heading in capitals, as a default that looks at its row."""
    return str(context.get_current_parameters()["Title %"]).upper()
