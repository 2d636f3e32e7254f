"""Every config in configs/ is valid and says which command runs it."""

import re
from pathlib import Path

import pytest

from dist_finetune.spec_file import load_spec, resolved_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*"))


def test_all_configs_are_looked_at() -> None:
    assert [path.name for path in CONFIGS] == [
        "bert_large_sst2.yaml",
        "multilabel_digits.yaml",
        "quickstart_bert.yaml",
        "quickstart_cnn.yaml",
        "regression_digits.yaml",
        "resnet50_folder.yaml",
        "tokens_punctuation.yaml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid_named_after_its_file_and_says_its_command(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    commands = re.findall(r"^#   dist-finetune run (configs/\S+)", path.read_text(), re.MULTILINE)
    assert commands == [f"configs/{path.name}"]
    assert not spec.freeze.is_none(), "each example shows a freeze"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_is_read_back_equal(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    again = tmp_path / "config.yaml"
    again.write_text(resolved_yaml(spec))
    assert load_spec(again) == spec
