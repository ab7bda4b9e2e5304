"""The token of an embedded Ray: a secret of its own, that ends with it.

Ray 2.60 turns token authentication on for a cluster that `ray.init` starts, and keeps a new token in ~/.ray/auth_token.
Every `ray start` of the user would find it there afterwards, and turn authentication on too: its other nodes and
clients, which have no token, could not join any more. So an embedded cluster has its token in its own directory. Where
the user has decided (RAY_AUTH_MODE), or has a token, Ray does as it does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

from elastic_moe.environment import environment

MODE, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"
FILE = "auth_token"


@contextmanager
def own_token(root: Path) -> Iterator[None]:
    """While this lasts, this process and those that it starts use a new token, which is kept in this directory."""
    if _decided():
        yield
        return
    path = root / FILE
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    with token_at(str(path)):
        yield


@contextmanager
def token_at(path: str) -> Iterator[None]:
    """While this lasts, this process shows the token in this file, unless the user has decided otherwise; "": none."""
    if not path or _decided():
        yield
        return
    try:
        with environment({MODE: "token", TOKEN_PATH: path}):
            _look_again()
            yield
    finally:
        _look_again()


def own_path() -> str:
    """The file with the token of an embedded cluster that this process has started; "" if there is none."""
    return os.environ.get(TOKEN_PATH, "") if os.environ.get(MODE) == "token" else ""


def _decided() -> bool:
    return MODE in os.environ or AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)


def _look_again() -> None:
    """Ray keeps mode and token of a process from its first look at them."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
