"""The DeepSpeed config of a plan: every number concrete, none "auto", sized from the parameters that train.

DeepSpeed derives some numbers from `hidden_size` where they are "auto", which a CNN does not have; and its default
buckets of 5e8 elements cost 2 GB on a rank that trains a small head.
"""

from typing import TYPE_CHECKING, Any

from dist_finetune.errors import UserError, did_you_mean
from dist_finetune.freeze import Manifest
from dist_finetune.spec import Spec, Strategy

if TYPE_CHECKING:
    from dist_finetune.batch_plan import BatchPlan

BUCKET_ELEMENTS = 50_000_000  # 200 MB of fp32 gradients in flight: large enough for full bandwidth


def deepspeed_settings(
    spec: Spec, strategy: Strategy, batches: "BatchPlan", precision: str, manifest: Manifest
) -> dict[str, Any] | None:
    """The whole config that DeepSpeed gets, with the user's extra keys merged in; None without it.

    Raises UserError where `shard.deepspeed` contradicts the plan or is set for a strategy that does not use DeepSpeed.
    """
    if not strategy.startswith("zero"):
        if spec.shard.deepspeed:
            raise UserError(
                f"shard.deepspeed has no effect on strategy {strategy}; remove it or choose zero1, zero2 or zero3"
            )
        return None
    settings: dict[str, Any] = {
        "train_batch_size": batches.global_batch_size,
        "train_micro_batch_size_per_gpu": batches.micro_batch_size,
        "gradient_accumulation_steps": batches.gradient_accumulation_steps,
        "managed_gradient_accumulation": False,  # our loop says when a window ends, so that partial windows are exact
        "gradient_clipping": spec.train.max_grad_norm or 0.0,  # left out, DeepSpeed under Accelerate would clip at 1.0
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "zero_optimization": _zero_section(spec, strategy, manifest),
    }
    if spec.shard.offload != "none":
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs on the CPU as well, with no compiler
    if precision != "fp32":
        # bf16.enabled and fp16.enabled would cast norms too; autocast keeps parameters and norms in fp32
        settings["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    return _merge(settings, spec.shard.deepspeed, "shard.deepspeed")


def zero_section(spec: Spec, strategy: Strategy, manifest: Manifest) -> dict[str, Any] | None:
    """The `zero_optimization` section of `strategy` with the user's keys; None where DeepSpeed is not used."""
    if not strategy.startswith("zero"):
        return None
    section = _zero_section(spec, strategy, manifest)
    extra = spec.shard.deepspeed.get("zero_optimization", {})
    if not isinstance(extra, dict):
        raise UserError(f"shard.deepspeed.zero_optimization: {extra!r} contradicts the plan; write a section of keys")
    # a section is made for each strategy that is weighed; what fits none is refused with the one that is chosen
    extra = {k: v for k, v in extra.items() if k != "stage" and k in section}
    return _merge(section, extra, "shard.deepspeed.zero_optimization")


def _zero_section(spec: Spec, strategy: Strategy, manifest: Manifest) -> dict[str, Any]:
    sizes = [r.num_elements for r in manifest.records if r.kind == "parameter" and not r.frozen]
    largest = max(r.num_elements for r in manifest.records if r.kind == "parameter")
    bucket = max(max(sizes), min(sum(sizes), BUCKET_ELEMENTS))
    bucket += bucket % 2  # DeepSpeed aligns flat groups to two elements
    stage = int(strategy.removeprefix("zero"))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
    }
    if stage >= 2:  # stage 1 can't, where our loop says when a window ends; beside offload it waits for copies anyway
        zero["overlap_comm"] = spec.shard.offload == "none"
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": max(largest, BUCKET_ELEMENTS // 5),
            "stage3_param_persistence_threshold": 0,
            # How many weights stay gathered although not in use. With DeepSpeed's 1e9 a model below that is never
            # released between forward and backward, and nothing is saved.
            "stage3_max_live_parameters": 2 * BUCKET_ELEMENTS,
            "stage3_max_reuse_distance": BUCKET_ELEMENTS,
            "sub_group_size": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if spec.shard.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if spec.shard.offload == "parameters" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return zero


def _merge(settings: dict[str, Any], extra: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings with those of `extra` that may be tuned, or that say what is planned anyway."""
    merged = dict(settings)
    for key, value in extra.items():
        planned = settings.get(key)
        if isinstance(value, dict) and (planned is None or isinstance(planned, dict)) and key in SECTIONS:
            merged[key] = _merge(planned or {}, value, f"{where}.{key}")
        elif key in TUNABLE_IN.get(where.rpartition(".")[2], ()) and (key in settings or key in SHOWN):
            merged[key] = _tuned(value, f"{where}.{key}")
        elif key not in settings or planned != value:
            raise UserError(f"{where}.{key}: {_refusal(key, value, planned, where)}")
    return merged


def _tuned(value: Any, where: str) -> int | bool:
    """What the user set a key to. Raises UserError for "auto" and all else that DeepSpeed could not go by."""
    key = where.rpartition(".")[2]
    fits = isinstance(value, bool) == (key in FLAGS)
    if fits and key not in FLAGS:
        least = 1 if key == "steps_per_print" else 0  # DeepSpeed divides by it
        fits = isinstance(value, int | float) and value >= least and float(value).is_integer()
    if not fits:
        wanted = "true or false" if key in FLAGS else "a whole number, such as 50000000"
        raise UserError(f"{where}: {value!r} is not {wanted}; write one, or leave the key out for what fits the plan")
    return value if key in FLAGS else int(value)


def _refusal(key: str, value: Any, planned: Any, where: str) -> str:
    tunable = TUNABLE_IN.get(where.rpartition(".")[2], ())
    if planned is not None:
        way = f"set it through {SET_BY.get(key, 'train.* or shard.strategy')}, or remove it"
        return f"{value!r} contradicts the plan, which needs {planned!r}; {way}"
    if key in tunable:
        return "the strategy's stage has no such setting, so that it would have no effect; remove it"
    if key in SET_BY:
        return f"this is decided elsewhere; set it through {SET_BY[key]}, and remove it here"
    where_else = [
        f"shard.deepspeed.{p}.{key}".replace(".deepspeed.deepspeed", ".deepspeed")
        for p in TUNABLE_IN
        if key in TUNABLE_IN[p]
    ]
    hint = f"Did you mean {where_else[0]}?" if where_else else did_you_mean(key, (*tunable, *SECTIONS))
    return f"no key that may be tuned here. {hint}"


SHOWN = ("wall_clock_breakdown", "dump_state", "memory_breakdown")  # off unless set
FLAGS = (*SHOWN, "contiguous_gradients", "overlap_comm", "round_robin_gradients")
# Trade memory or messages for speed, and change no result; by the section that holds them.
TUNABLE_IN: dict[str, tuple[str, ...]] = {
    "deepspeed": ("steps_per_print", *SHOWN),
    "zero_optimization": (
        "reduce_bucket_size",
        "allgather_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "sub_group_size",
        "contiguous_gradients",
        "overlap_comm",
        "round_robin_gradients",
    ),
}
SECTIONS = ("zero_optimization", "torch_autocast")
SET_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.lr, train.head_lr, train.layer_decay and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "bf16": "train.precision: bf16",
    "fp16": "train.precision: fp16",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.gradient_checkpointing",
    "stage": "shard.strategy",
    "offload_optimizer": "shard.offload",
    "offload_param": "shard.offload",
    "wandb": "track.wandb",
    "tensorboard": "track.tensorboard",
    "elasticity": "resume, which takes any number of processes",
}
