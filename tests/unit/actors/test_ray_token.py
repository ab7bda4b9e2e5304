"""The token of an embedded Ray is in its own directory, and the user's decision and environment stay as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, stat, sys
from pathlib import Path
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode
from elastic_moe.actors.ray_token import own_path, own_token, token_at

root, before = Path(sys.argv[1]), dict(os.environ)
first = get_authentication_mode()
for name in ("a", "b"):
    (root / name).mkdir()
    with own_token(root / name):
        path = Path(own_path())
        assert path == root / name / "auth_token", path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(path.read_text()) == 64
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        assert AuthenticationTokenLoader.instance().has_token()
    assert (dict(os.environ), own_path(), get_authentication_mode()) == (before, "", first)
with token_at(str(root / "a" / "auth_token")):
    assert own_path() == str(root / "a" / "auth_token")
with token_at(""):
    assert own_path() == ""
os.environ["RAY_AUTH_MODE"] = "disabled"
with own_token(root):
    assert not (root / "auth_token").exists(), "the user has decided"
    assert own_path() == ""
del os.environ["RAY_AUTH_MODE"]
os.environ["RAY_AUTH_TOKEN"] = "1" * 64
with own_token(root):
    assert not (root / "auth_token").exists(), "the user has a token"
print("ok")
"""


def test_a_token_for_an_embedded_ray(tmp_path: Path) -> None:
    """In a process of its own, since Ray keeps what a process has decided."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr
    assert not (tmp_path / ".ray").exists()
