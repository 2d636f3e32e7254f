"""A pre-trained CNN as a feature extractor on real photographs: what a user would get."""

from pathlib import Path

import pytest
import timm

from dist_finetune.features.run import compare_heads
from dist_finetune.spec_file import load_spec

HYMENOPTERA = Path(__file__).parents[3] / "shared" / "data" / "hymenoptera"


@pytest.mark.slow
@pytest.mark.skipif(not HYMENOPTERA.is_dir(), reason="../shared/data/hymenoptera is not there")
def test_linear_heads_on_imagenet_features_tell_ants_from_bees(tmp_path: Path) -> None:
    config = {
        "model": {"name": "demo:efficientnet-lite0"},
        "data": {"train": str(HYMENOPTERA / "train"), "validation": str(HYMENOPTERA / "val"), "image_size": 256},
        "task": "features",
        "features": {"at": ["3", "head"], "heads": ["softmax", "svm"]},
        "track": {"wandb": "off"},
        "name": "bees",
        "output": str(tmp_path),
    }
    summary = compare_heads(load_spec(config))
    accuracy = {(result.depth, result.head): result.accuracy for result in summary.results}
    assert max(accuracy["head", kind] for kind in ("softmax", "svm")) >= 0.95
    assert max(accuracy["block 3", kind] for kind in ("softmax", "svm")) < 0.9
    assert summary.num_rows_predicted_alike == 153
    model = timm.create_model(f"local-dir:{tmp_path / 'bees' / 'model'}", pretrained=True)
    assert model.num_classes == 2
