"""What a run leaves is whole: tensors that no rank held come back from the base model, or not at all."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_finetune.errors import TrainingError
from dist_finetune.evaluate import Evaluation
from dist_finetune.job import Stage
from dist_finetune.proof import digest_tensor
from dist_finetune.save import _with_dropped, save_predictions
from dist_finetune.spec import LaunchSpec
from dist_finetune.tensor_files import write_tensors
from dist_finetune.world import join_world, on_first, together


@pytest.mark.parametrize("changed", [None, "0.weight", "1.running_mean"])
def test_what_was_dropped_comes_back_from_the_base_model_as_it_was(changed: str | None) -> None:
    """The first two layers were cached; a bias of theirs had trained in an earlier phase."""
    base = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    source = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    dropped = {"0.bias": torch.tensor([1.0, 2.0, 3.0])}
    trained = {name: source[name] + 1 for name in ("2.weight", "2.bias")}
    digests = {name: digest_tensor((source | dropped)[name]) for name in source if name not in trained}
    stage = Stage(None, None, {}, digests, dropped, {}, 0.0, "none: off")  # type: ignore[arg-type]
    if changed is None:
        whole = _with_dropped(stage, base, trained)
        assert list(whole) == list(source)
        assert all(torch.equal(whole[name], tensor) for name, tensor in (source | dropped | trained).items())
        return
    base.state_dict()[changed].view(-1)[0] += 1e-6
    with pytest.raises(TrainingError, match=f"^{changed} of the base model is not what it was at the start"):
        _with_dropped(stage, base, trained)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_of_tensors_can_be_read_by_whom_other_files_can(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        (tmp_path / "a.json").write_text("{}")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "a.json")]
    assert modes[0] == modes[1]


def test_what_a_full_disk_refuses_ends_all_ranks_in_words(tmp_path: Path) -> None:
    """Ranks that wait for the one that writes would otherwise end with a traceback of their own."""
    (tmp_path / "validation.safetensors").mkdir()  # so that writing fails
    numbers = torch.zeros(1, 2)
    evaluations = {"validation": Evaluation(numbers, numbers.clone(), numbers.clone(), {})}
    with join_world(LaunchSpec()) as world:
        for reason, work in (
            ("Is a directory", lambda: save_predictions(evaluations, tmp_path)),
            ("No space left on device", lambda: Path("/dev/full").write_text("config", encoding="utf-8")),
        ):
            with pytest.raises(TrainingError, match=f"{reason}.* start again the same way") as failed:
                on_first(world, work)
            assert "Traceback" in failed.value.__notes__[0], "for --debug"
            with pytest.raises(TrainingError):
                together(work)
