"""Two databases on a real server, one Repo over both. Run it: python examples/quickstart.py"""

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import Repo, WrongDatabaseError
from shardrepo.testing.servers import start_servers


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


with start_servers(1) as (server,):
    server.create_databases(["app", "shard02"])

    class MyRepo(Repo, config={"url": server.url("app"), "pool_size": 5}):
        pass

    for name in ("app", "shard02"):
        with MyRepo.using(name):
            Base.metadata.create_all(MyRepo.engine())

    grace = MyRepo.insert(User(name="Grace"))  # in the default database

    MyRepo.set_database("shard02")
    ada = MyRepo.insert(User(name="Ada"))
    print("in shard02, user 1 is", MyRepo.get_one(User, 1).name)

    MyRepo.set_database(None)
    print("in app, user 1 is", MyRepo.get_one(User, 1).name)

    try:
        MyRepo.update(ada, name="Ada Lovelace")
    except WrongDatabaseError:
        print("Ada cannot be written to app: she lives in", (MyRepo.home(ada) or "").partition("/")[2])

    with MyRepo.using("shard02"), MyRepo.transaction():
        MyRepo.update(ada, name="Ada Lovelace")
        MyRepo.insert(User(name="Edsger"))
        print("shard02 now has", MyRepo.all(select(User.name).order_by(User.name)))

    stats = MyRepo.stats()
    print(f"{stats.idle} connections kept, of at most {stats.pool_size}")
    MyRepo.dispose()
