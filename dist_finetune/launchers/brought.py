"""Settings that a launcher brings along: named and refused where they contradict the run, never mixed into it.

`accelerate launch` hands its flags and config file on as environment variables, which Accelerator and its DeepSpeed
plugin read in places of their own. The run's config is the one source, so these are compared with it and then removed.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_finetune.errors import UserError

if TYPE_CHECKING:
    from dist_finetune.spec import Spec

CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# What `accelerate launch` sets, or a user who left everything alone would get: these say nothing.
DEFAULTS = {
    "ACCELERATE_MIXED_PRECISION": ("no",),
    "ACCELERATE_DYNAMO_BACKEND": ("no",),
    "ACCELERATE_USE_CPU": ("false",),
    "ACCELERATE_USE_DEEPSPEED": ("false",),
    "ACCELERATE_USE_FSDP": ("false",),
    "ACCELERATE_USE_MEGATRON_LM": ("false",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false",),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto"),
    "ACCELERATE_GRADIENT_CLIPPING": ("auto", "none"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none",),
    CONFIG_FILE: ("none",),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false",),
}
# Engines of accelerate's that this package does not drive.
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def brought_settings(env: Mapping[str, str], argv: Sequence[str] = ()) -> dict[str, str]:
    """Settings in the environment and on the command line that differ from the launcher's defaults, by name."""
    brought = {
        name: env[name]
        for name, defaults in DEFAULTS.items()
        if env.get(name) and env[name].strip().lower() not in defaults
    }
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--deepspeed_config", "--deepspeed-config"):
            brought["--deepspeed_config"] = value if equals else " ".join(argv[i + 1 : i + 2])
    return brought


def refuse_launcher_settings(
    spec: "Spec",
    strategy: str,
    precision: str,
    *,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    device: str | None = None,
) -> list[str]:
    """As `refuse_contradictions`, for what this process's own launcher brought."""
    return refuse_contradictions(
        brought_settings(os.environ, sys.argv[1:]),
        spec,
        strategy,
        precision,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        device=device,
    )


def refuse_contradictions(
    brought: Mapping[str, str],
    spec: "Spec",
    strategy: str,
    precision: str,
    *,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    device: str | None = None,
) -> list[str]:
    """Raises UserError that names every brought setting which contradicts the run as resolved.

    Returns notes on settings of a brought DeepSpeed file that don't contradict but have no effect.
    """
    numbers = _run_numbers(spec, strategy, precision, micro_batch_size, gradient_accumulation_steps)
    problems = [
        *_contradictions_of_engines(brought, numbers),
        *_contradictions_of_variables(brought, numbers, device),
    ]
    notes: list[str] = []
    if CONFIG_FILE in brought:
        found, notes = _compare_deepspeed_file(brought[CONFIG_FILE], numbers, spec)
        problems += found
    if problems:
        raise UserError(
            "the launcher brings settings that contradict the config:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nRemove them from the launcher's flags or config file, or change the config as said."
        )
    return notes


def _run_numbers(
    spec: "Spec", strategy: str, precision: str, micro_batch_size: int | None, accumulation: int | None
) -> dict[str, Any]:
    micro = spec.train.micro_batch_size
    return {
        "stage": 0 if strategy == "ddp" else int(strategy[-1]) if strategy.startswith("zero") else None,
        "strategy": strategy,
        "precision": precision,
        "global_batch_size": spec.train.global_batch_size,
        "micro_batch_size": micro_batch_size or (micro if isinstance(micro, int) else None),
        "accumulation": accumulation,
        "clipping": spec.train.max_grad_norm or 0.0,
        "offload_optimizer": "none" if spec.shard.offload == "none" else "cpu",
        "offload_param": "cpu" if spec.shard.offload == "parameters" else "none",
        "compile": "inductor" if spec.train.compile else "no",
        "gradient_checkpointing": spec.train.gradient_checkpointing,
    }


def _contradictions_of_engines(brought: Mapping[str, str], numbers: Mapping[str, Any]) -> Iterator[str]:
    for name, engine in OTHER_ENGINES.items():
        if name in brought and engine.lower() != numbers["strategy"]:
            yield f"{name}={brought[name]}: {engine} is asked for, but the run uses {numbers['strategy']}"
    if "ACCELERATE_USE_FSDP" in brought:
        if "FSDP_OFFLOAD_PARAMS" in brought and numbers["offload_param"] == "none":
            yield "FSDP_OFFLOAD_PARAMS=true, but the run keeps its parameters on the device: write shard.offload"
        if "FSDP_ACTIVATION_CHECKPOINTING" in brought and not numbers["gradient_checkpointing"]:
            yield "FSDP_ACTIVATION_CHECKPOINTING=true: write train.gradient_checkpointing: true"
    backend = brought.get("ACCELERATE_DYNAMO_BACKEND")
    if backend is not None and backend.lower() != numbers["compile"]:
        yield (
            f"ACCELERATE_DYNAMO_BACKEND={backend} (--dynamo_backend), but train.compile alone says whether the run "
            "compiles, with inductor"
        )


def _contradictions_of_variables(
    brought: Mapping[str, str], numbers: Mapping[str, Any], device: str | None
) -> Iterator[str]:
    stage = brought.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if stage is not None and stage != str(numbers["stage"]):
        yield (
            f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage} (--zero_stage), but the run uses {numbers['strategy']}: "
            f"write shard.strategy: {_strategy_of(stage)}"
        )
    elif (
        stage is None and "ACCELERATE_USE_DEEPSPEED" in brought and CONFIG_FILE not in brought and not numbers["stage"]
    ):
        yield (
            "ACCELERATE_USE_DEEPSPEED=true (--use_deepspeed), but the run uses "
            f"{numbers['strategy']}: write shard.strategy: zero1, zero2 or zero3, or launch with --multi_gpu"
        )
    asked = brought.get("ACCELERATE_MIXED_PRECISION")
    if asked is not None and asked.lower() != numbers["precision"]:
        yield (
            f"ACCELERATE_MIXED_PRECISION={asked} (--mixed_precision), but the run trains in {numbers['precision']}: "
            + (
                f"write train.precision: {asked.lower()}"
                if asked.lower() in ("bf16", "fp16")
                else f"train.precision has no {asked}; use bf16, fp16 or fp32"
            )
        )
    accumulation = brought.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if accumulation is not None and accumulation != str(numbers["accumulation"]):
        yield (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulation}, but accumulation follows from "
            f"train.global_batch_size ({numbers['global_batch_size']}), micro_batch_size and the number of processes"
            + (f", and is {numbers['accumulation']}" if numbers["accumulation"] else "")
        )
    clipping = brought.get("ACCELERATE_GRADIENT_CLIPPING")
    if clipping is not None and _differs(clipping, numbers["clipping"]):
        yield f"ACCELERATE_GRADIENT_CLIPPING={clipping}, but train.max_grad_norm is {numbers['clipping'] or 'null'}"
    for name, what in (("OPTIMIZER", "optimizer moment"), ("PARAM", "parameter")):
        offload = brought.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE")
        if offload is not None and offload.lower() != numbers[f"offload_{name.lower()}"]:
            yield (
                f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE={offload}, but the run keeps its {what}s on "
                f"{numbers[f'offload_{name.lower()}'].replace('none', 'the device')}: write shard.offload"
            )
    if "ACCELERATE_USE_CPU" in brought and device == "cuda":
        yield "ACCELERATE_USE_CPU=true (--cpu), but a GPU is visible: set CUDA_VISIBLE_DEVICES= (empty) for the CPU"
    if "--deepspeed_config" in brought:
        yield f"--deepspeed_config {brought['--deepspeed_config']}: put its keys under shard.deepspeed of the config"


def _compare_deepspeed_file(location: str, numbers: Mapping[str, Any], spec: "Spec") -> tuple[list[str], list[str]]:
    """Contradictions of a DeepSpeed config file with the run, and notes on keys without effect; "auto" says nothing."""
    content = _read_deepspeed_file(location)
    where = location if len(location) < 200 else "the DeepSpeed config"
    flat = {key: value for key, value in _flatten(content) if value not in ("auto", None)}
    expected: dict[str, tuple[Any, str]] = {
        "zero_optimization.stage": (numbers["stage"], "shard.strategy"),
        "train_batch_size": (numbers["global_batch_size"], "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (numbers["micro_batch_size"], "train.micro_batch_size"),
        "gradient_accumulation_steps": (numbers["accumulation"], "train.global_batch_size, from which it is derived"),
        "gradient_clipping": (numbers["clipping"], "train.max_grad_norm"),
        "bf16.enabled": (numbers["precision"] == "bf16", "train.precision"),
        "fp16.enabled": (numbers["precision"] == "fp16", "train.precision"),
        "zero_optimization.offload_optimizer.device": (numbers["offload_optimizer"], "shard.offload"),
        "zero_optimization.offload_param.device": (numbers["offload_param"], "shard.offload"),
        "optimizer.type": ("AdamW", "the one optimizer there is"),
        "optimizer.params.lr": (spec.train.lr, "train.lr"),
        "optimizer.params.weight_decay": (spec.train.weight_decay, "train.weight_decay"),
    }
    own = dict(_flatten(spec.shard.deepspeed))
    problems, ignored = [], []
    for key, value in flat.items():
        ours, setting = expected.get(key, (own.get(key), "shard.deepspeed"))
        if ours is None and key in expected:
            problems.append(f"{where}: {key} is {value!r}, but the run derives it ({setting})")
        elif ours is None:
            ignored.append(key)
        elif _differs(value, ours):
            problems.append(f"{where}: {key} is {value!r}, but the run has {ours!r} ({setting})")
    note = f"{where}: {', '.join(ignored)} has no effect; put it under shard.deepspeed of the config where it is wanted"
    return problems, [note] if ignored else []


def _read_deepspeed_file(location: str) -> dict[str, Any]:
    """accelerate takes a path, or the whole JSON text in base64."""
    try:
        content = json.loads(_text_of(location))
    except (OSError, ValueError):
        raise UserError(
            f"the launcher names the DeepSpeed config {location[:200]}, which is no readable JSON file"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{location[:200]}: a DeepSpeed config is a JSON mapping of keys, this is not one")
    return content


def _text_of(location: str) -> str | bytes:
    try:
        return Path(location).read_text(encoding="utf-8")
    except OSError:
        return base64.urlsafe_b64decode(location)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differs(value: Any, ours: Any) -> bool:
    try:
        return abs(float(value) - float(ours)) > 1e-12
    except (TypeError, ValueError):
        return str(value).lower() != str(ours).lower()


def _strategy_of(stage: str) -> str:
    return {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}.get(stage, "zero1, zero2 or zero3")
