"""What is left of a config where no layer of the model trains."""

from dist_finetune.errors import UserError
from dist_finetune.spec import CacheSpec, FreezeSpec, ShardSpec, Spec, TrainSpec


def refuse_idle_settings(spec: Spec) -> None:
    """Raises UserError where a config with `task: features` sets what plays no part in it."""
    idle = {
        "freeze": not spec.freeze.is_none(),
        "phases": bool(spec.phases),
        "strategy": spec.strategy is not None,
        "data.augment": spec.data.augment,
    }
    named = [key for key, is_set in idle.items() if is_set]
    if named:
        raise UserError(
            f"task: features trains no layer of the model and takes each row as it is, so {', '.join(named)} would "
            "have no effect; remove it, or leave out task: features"
        )


def without_activations(cache: CacheSpec) -> CacheSpec:
    """The cache of a run that keeps no activations. Its place and size stay: tokens of large data lie there too."""
    return cache.model_copy(update={"mode": "off", "views": None})


def without_training(spec: Spec, world_size: int) -> Spec:
    """The spec of the same model and data with nothing about training in it, which a plan would check for no reason.
    Each rank holds the whole model."""
    train = TrainSpec(seed=spec.train.seed, precision=spec.train.precision, global_batch_size=world_size, warmup=0)
    data = spec.data.model_copy(update={"augment": False})
    bare = {
        "freeze": FreezeSpec(),
        "phases": (),
        "train": train,
        "data": data,
        "cache": without_activations(spec.cache),
        "shard": ShardSpec(strategy="ddp"),
        "task": "features",  # also for `advise`, which extracts them whatever its config's task is
    }
    return spec.model_copy(update=bare)
