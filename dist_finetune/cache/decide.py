"""Whether a phase trains from stored activations, and why."""

from dataclasses import dataclass

from dist_finetune.errors import UserError
from dist_finetune.freeze import Manifest
from dist_finetune.lint import first_trainable_part
from dist_finetune.models.structure import Structure
from dist_finetune.spec import Spec

MIN_PASSES = 1.5  # building is one pass through the prefix: with fewer passes of training there is nothing to save


@dataclass(frozen=True)
class CacheDecision:
    """A phase's cache. Where the model can't be cut after all, or a disk is full, the run goes on without."""

    use: bool
    reason: str


def decide_cache(spec: Spec, manifest: Manifest, structure: Structure, num_passes: float) -> CacheDecision:
    """The decision for a phase that goes `num_passes` times over the training data.

    Raises UserError where `cache: on` asks for what can't be.
    """
    mode = spec.cache.mode
    if spec.cache.views and not spec.data.augment:
        raise UserError("cache.views has no effect without data.augment; remove it, or set data.augment: true")
    if mode == "off":
        if spec.cache.views:
            raise UserError("cache.views has no effect beside cache: off, where every epoch has new images; remove one")
        return CacheDecision(False, "off in the config")
    obstacle = _obstacle(spec, manifest, structure)
    if obstacle and mode == "on":
        raise UserError(f"cache: on can't work: {obstacle}")
    if obstacle:
        return CacheDecision(False, obstacle)
    if mode == "on":
        return CacheDecision(True, "asked for")
    if num_passes < MIN_PASSES:
        return CacheDecision(False, f"{num_passes:.2g} passes over the data don't repay the one that fills it")
    first = first_trainable_part(manifest, structure)
    return CacheDecision(True, f"{num_passes:.3g} passes share one through the parts below {first.label}")


def _obstacle(spec: Spec, manifest: Manifest, structure: Structure) -> str | None:
    if not manifest.frozen or first_trainable_part(manifest, structure) is structure.parts[0]:
        return "nothing frozen lies below the first trainable part"
    if manifest.mode == "train":
        return "freeze.mode is train: dropout and batch statistics would differ from epoch to epoch"
    if spec.data.augment and spec.cache.views is None:
        return "data.augment makes new images each epoch; cache.views=4 would store four versions of each and cycle"
    return None
