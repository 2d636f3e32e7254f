"""What a worker need not do before its first step."""

import sys
from pathlib import Path

import pytest
from harness import finish, write_config
from material import Material

pytestmark = pytest.mark.dist

TRAIN = """
import sys
from dist_finetune import load_spec, train
train(load_spec(sys.argv[1]))
print("compiler", "torch._inductor.compile_fx" in sys.modules or "functorch.compile" in sys.modules)
"""


def test_zero_trains_without_loading_a_compiler(material: Material, tmp_path: Path) -> None:
    content = material.text(shard={"strategy": "zero2"}, train={"max_steps": 2, "warmup": 0})
    config = write_config(tmp_path / "c.yaml", content, output=str(tmp_path / "runs"))
    done = finish([sys.executable, "-c", TRAIN, str(config)], 200, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiler False" in done.stdout
