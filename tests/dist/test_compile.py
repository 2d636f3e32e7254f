"""`train.compile` with a real compiler: compiled blocks train as plain ones do, under each strategy that takes them."""

from pathlib import Path
from typing import Any

import pytest
from harness import Job, train_jobs
from material import Material
from safetensors.torch import load_file

from dist_finetune.combinations import has_compiler
from dist_finetune.selfcheck import NO_GRADIENT

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(
        not has_compiler("cpu"), reason="needs a C++ compiler, which torch.compile has make code for the CPU"
    ),
]


@pytest.mark.parametrize(
    ("kind", "num_processes", "ways"),
    [
        # each process compiles for itself, for a minute or two
        pytest.param("text", 1, ["fsdp"], marks=pytest.mark.slow),
        pytest.param("text", 2, ["ddp", "zero2", "fsdp", "recomputed"], marks=pytest.mark.slow),
        pytest.param("image", 2, ["ddp", "zero2", "fsdp"], marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_train_as_plain_ones(
    material: Material, tmp_path: Path, kind: str, num_processes: int, ways: list[str]
) -> None:
    def config(strategy: str, **train: Any) -> dict[str, Any]:
        made: dict[str, Any] = getattr(material, kind)(
            train={"max_steps": 4, **train}, shard={"strategy": strategy}, cache="off"
        )
        return made

    jobs = [Job("plain", config("ddp"))]
    for way in ways:
        recomputed = way == "recomputed"
        jobs.append(Job(way, config("ddp" if recomputed else way, compile=True, gradient_checkpointing=recomputed)))
    made = tmp_path / "inductor"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(made), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    runs = train_jobs(jobs, num_processes, tmp_path, 900, **env)
    assert list(made.rglob("*.so")), "nothing was compiled"
    plain = runs.pop("plain")
    expected = load_file(plain.folder / "model" / "model.safetensors")
    for name, run in runs.items():
        assert run.series("train/loss") == pytest.approx(plain.series("train/loss"), rel=1e-5), name
        weights = load_file(run.folder / "model" / "model.safetensors")
        assert weights.keys() == expected.keys(), name
        for tensor in (tensor for tensor in weights if not tensor.endswith(NO_GRADIENT)):
            distance = (weights[tensor] - expected[tensor]).abs().max().item()
            assert distance < 1e-5, f"{name}: {tensor}"
