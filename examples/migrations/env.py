"""The migrations of web_app.py."""

from web_app import Base, MyRepo

from shardrepo.fleet import env

env.run(MyRepo, Base.metadata)
