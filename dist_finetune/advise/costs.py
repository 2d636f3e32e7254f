"""What each choice would cost here: bytes from the plan, seconds from the measured forward pass."""

from dataclasses import dataclass
from typing import Any

from dist_finetune.advise.probes import Evidence
from dist_finetune.data.tables import Tables
from dist_finetune.features.bare import without_activations
from dist_finetune.plan import Plan, plan_run
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.topology import Topology

TRAIN_PASSES = 3  # forward, and twice that for backward, in forward passes


@dataclass(frozen=True)
class Cost:
    """Training state of a rank (activations not counted) and seconds of the whole run on this topology."""

    state_bytes: int
    seconds: float


def cost_of(choice: dict[str, Any], spec: Spec, evidence: Evidence, topology: Topology, tables: Tables) -> Cost:
    """The cost of one of `situation.choices`. A frozen prefix is run forward only."""
    plan = plan_run(merged(spec, choice), topology, tables)
    if choice.get("task") == "features":
        weights = plan.widest.manifest.num_trainable + plan.widest.manifest.num_frozen
        return Cost(4 * weights, evidence.num_rows * evidence.seconds_a_row / topology.world_size)
    passes = sum(
        phase.num_steps / plan.batches.steps_per_epoch * _passes(plan, index) for index, phase in enumerate(plan.phases)
    )
    seconds = passes * evidence.num_rows * evidence.seconds_a_row / topology.world_size
    return Cost(plan.memory[plan.strategy].total, seconds)


def _passes(plan: Plan, index: int) -> float:
    """Forward passes that one row costs in a phase: F for the frozen prefix, 3F for the rest."""
    frozen = set(plan.phases[index].manifest.frozen)
    blocks = plan.structure.blocks
    prefix = next((i for i, part in enumerate(blocks) if not frozen.issuperset(part.parameters)), len(blocks))
    stem = plan.structure.of_kind("embeddings")
    if stem is not None and not frozen.issuperset(stem.parameters):
        prefix = 0
    return TRAIN_PASSES - (TRAIN_PASSES - 1) * prefix / max(len(blocks), 1)


def merged(spec: Spec, part: dict[str, Any]) -> Spec:
    """`spec` with a part of a config in it, checked anew; what the part decides is not left to advice again, nor to
    what `spec` froze before."""
    given = spec.model_dump(mode="json", by_alias=True)
    whole = given | {"freeze": "none", "phases": []} | part
    if part.get("task") == "features":
        whole["features"] = given["features"] | part["features"]  # probes were pooled as the rest of the section says
        whole["data"] = whole["data"] | {"augment": False}
        whole["cache"] = without_activations(spec.cache).model_dump(mode="json")
    elif whole["cache"]["mode"] == "on":  # what is frozen is the advice's to say, and may be nothing
        whole["cache"] = whole["cache"] | {"mode": "auto"}
    return load_spec(whole | {"strategy": None})
