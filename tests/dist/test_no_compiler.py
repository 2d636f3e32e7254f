"""ZeRO on CPU processes where no C++ compiler is: DeepSpeed must not try to build an op at start-up."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from harness import finish, write_config
from material import Material

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("strategy", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_trains_without_a_compiler(material: Material, tmp_path: Path, strategy: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "bash", "uname", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    environment = {"PATH": str(tools), "CC": "", "CXX": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    assert not any(shutil.which(compiler, path=str(tools)) for compiler in ("c++", "g++", "gcc", "cc", "clang"))
    config = material.text(train={"max_steps": 2}, shard={"strategy": strategy})
    path = write_config(tmp_path / "c.yaml", config, name="run", output=str(tmp_path / "runs"))
    command = [sys.executable, "-m", "dist_finetune", "run", str(path), "--processes", "2"]
    done = finish(command, 300, tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["status"] == "finished"
    assert "FutureWarning" not in done.stdout + done.stderr
