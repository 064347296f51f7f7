"""Paths and URLs of a config, judged as they stand: no shell reads them, and what follows an address is no address."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distill.config_load import Loc, Origin, Problem

if TYPE_CHECKING:
    from distill.config import Config

_FOR_A_SHELL = re.compile(r"^~|\$\{?[A-Za-z_]|\0")


def address_problems(config: Config, origin: Origin) -> Iterator[Problem]:
    """Paths that only a shell would read as meant, and a teacher.url that is no address, or more than one."""
    for loc, path in _paths(config):
        if _FOR_A_SHELL.search(path):
            must = "a path is taken as it stands, without ~, $NAME or NUL. Write the whole path."
            yield Problem((loc,), f"{origin.name(loc)} is {path!r}; {must}")
    loc = ("teacher", "url")
    if config.teacher.url and (wrong := wrong_url(config.teacher.url)):
        yield Problem((loc, ("teacher", "token_env")), f"{origin.name(loc)} {wrong}")


def _paths(config: Config) -> Iterator[tuple[Loc, str]]:
    train = config.train
    yield ("run", "dir"), config.run.dir
    yield ("teacher", "path"), config.teacher.path
    lists: dict[Loc, Sequence[Any]] = {
        ("students",): config.students,
        ("prompts", "train"): config.prompts.train,
        ("prompts", "eval"): config.prompts.eval,
        ("train", "general", "sources"): train.general.sources if train.general else (),
    }
    for loc, items in lists.items():
        yield from (((*loc, i, "path"), each.path) for i, each in enumerate(items) if hasattr(each, "path"))
    yield from (
        (("train", "text_sets", i, "source", "path"), each.source.path) for i, each in enumerate(train.text_sets)
    )
    yield from ((("train", "trace_sets", i, "run"), each.run) for i, each in enumerate(train.trace_sets))


def wrong_url(url: str) -> str:
    """What is wrong with it, and the remedy; empty if nothing is. What may be a secret is not repeated."""
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        return f"is {url!r}, which is no address. Use http://HOST:PORT."
    if parts.query or parts.fragment or parts.username is not None:
        return "says more than an address. Use http://HOST:PORT; a token goes into the variable that token_env names."
    return ""
