"""W&B where its server can't be reached or is not wanted: no run fails by it, and its id stays."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from dist_finetune import tracking
from dist_finetune.errors import UserError
from dist_finetune.spec import TrackSpec
from dist_finetune.tracking import require_login, start_wandb


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody is logged in, and nobody listens where the server should be."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2)
    wandb.teardown()  # it remembers its settings
    yield
    wandb.teardown()


@pytest.mark.parametrize("login", ["variable", "file"])
def test_a_server_that_can_not_be_reached_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    if login == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    else:
        (tmp_path / "netrc").write_text(f"machine localhost:9 login user password {'a' * 40}", encoding="utf-8")
        (tmp_path / "netrc").chmod(0o600)
    run = start_wandb(TrackSpec(), tmp_path, "run", {})
    assert run
    assert run.mode == "offline"
    run.finish({}, exit_code=0)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(json.loads((tmp_path / tracking.ID_FILE).read_text(encoding="utf-8"))["id"])


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_login_is_found_whatever_mode_the_environment_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The config is asked first; a key that is none counts as no login."""
    monkeypatch.setenv("WANDB_MODE", mode)
    netrc = tmp_path / "netrc"
    netrc.touch(0o600)
    netrc.write_text("machine localhost:9 login user password short", encoding="utf-8")
    with pytest.raises(UserError, match="online needs a login"):
        require_login(TrackSpec(wandb="online"))
    netrc.write_text(f"machine localhost:9 login user password {'a' * 40}", encoding="utf-8")
    require_login(TrackSpec(wandb="online"))
    assert wandb.setup().settings.mode == mode


def test_auto_leaves_wandb_off_where_its_own_variable_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start_wandb(TrackSpec(), tmp_path, "run", {}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_hangs_does_not_hold_the_process(tmp_path: Path) -> None:
    """The client's own process is stopped, as one that waits for its server might be."""
    program = """if True:
        import json, pathlib, psutil, signal, sys, torch
        from dist_finetune import tracking
        from dist_finetune.cli.entry import leave_at_once
        from dist_finetune.spec import TrackSpec
        folder, tracking.FINISH_TIMEOUT_S = pathlib.Path(sys.argv[1]), 1
        run = tracking.start_wandb(TrackSpec(wandb="offline"), folder, "run", {})
        clients = psutil.Process().children(recursive=True)
        (folder / "clients").write_text(json.dumps([client.pid for client in clients]))
        for client in clients:
            client.send_signal(signal.SIGSTOP)
        run.finish({}, exit_code=0)
        leave_at_once(3)
    """
    said = tmp_path / "said"  # no pipe, which the client would hold open
    try:
        with said.open("w", encoding="utf-8") as out:
            command = [sys.executable, "-c", program, str(tmp_path)]
            done = subprocess.run(command, check=False, timeout=60, stdout=out, stderr=out)
    finally:
        for pid in json.loads((tmp_path / "clients").read_text(encoding="utf-8")):
            os.kill(pid, signal.SIGKILL)
    assert done.returncode == 3
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert said.read_text(encoding="utf-8").endswith(f"upload the rest with: wandb sync {folder}\n")
