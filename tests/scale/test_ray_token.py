"""Ray's token lets in whoever knows it, so nobody else can read it. Ray itself is stood in for: this runs without it."""

from __future__ import annotations

import os
import stat
import sys
import types
from pathlib import Path

import pytest

from pellucid.scale import ray_engine


@pytest.mark.parametrize("before", ["no folder", "an open folder", "an open token"])
def test_rays_token_is_readable_by_its_owner_alone(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / ".ray" / "auth_token"
    if before != "no folder":
        token.parent.mkdir(mode=0o755)
    if before == "an open token":
        token.write_text("secret")
        token.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    seen = []

    def init(**settings: object) -> None:
        """As Ray does: a token is made where there is none, with the mode that the umask leaves."""
        seen.append(stat.S_IMODE(token.parent.stat().st_mode))
        if not token.exists():
            token.write_text("secret")
            token.chmod(0o644)

    class StopError(RuntimeError):
        """The rest of Ray is not stood in for."""

    def hand_out(*given: object) -> None:
        seen.append(stat.S_IMODE(token.stat().st_mode))
        raise StopError

    ray = types.ModuleType("ray")
    vars(ray).update(
        is_initialized=lambda: False,
        init=init,
        shutdown=lambda: None,
        exceptions=types.SimpleNamespace(RayTaskError=ZeroDivisionError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_engine, "_hand_out", hand_out)
    with pytest.raises(StopError):
        ray_engine.harvest_on_ray(lambda: None, tasks=1)  # type: ignore[arg-type, return-value]
    assert seen == [0o700 if before == "no folder" else 0o755, 0o600]
    assert os.stat(token).st_size == 6
