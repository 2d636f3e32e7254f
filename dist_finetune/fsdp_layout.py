"""How FSDP2 cuts and groups a model's parameters, from the structure map and shapes alone; plan and engine share it."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from dist_finetune.freeze import Manifest, TensorRecord
from dist_finetune.models.structure import Structure

FrozenLayout = Literal["replicate", "shard"]


def block_groups(structure: Structure, containers: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The modules of each group that is gathered as one: a group a block, frozen ones too. All else is the root's.

    A block stays with the root where its tensors are tied to others, where another block runs its modules, or where a
    module of it is one of `containers`, whose forward nobody calls.
    """
    tied = {name for group in structure.aliases for name in group}
    used: set[str] = set()
    groups = []
    for block in structure.blocks:
        owners = {name.rpartition(".")[0] for name in block.parameters}
        modules = tuple(m for m in block.modules if any(o == m or o.startswith(f"{m}.") for o in owners))
        if modules and not tied & set(block.parameters) and not (used | set(containers)) & set(modules):
            used |= set(modules)
            groups.append(modules)
    return tuple(groups)


def is_left_out(record: TensorRecord, frozen_layout: FrozenLayout) -> bool:
    """True for a parameter that stays whole on each rank: a frozen one that is replicated, or a single number."""
    return record.frozen and (frozen_layout == "replicate" or not record.shape)


def fsdp_section(manifest: Manifest, world_size: int, frozen_layout: FrozenLayout, offload: bool) -> dict[str, Any]:
    """Elements that rank 0, which holds most, has under FSDP2: its shares of trainable and frozen parameters, what
    stays whole of the latter, and the most that is gathered at once (a group and the next one)."""
    records = [r for r in manifest.records if r.kind == "parameter"]
    cut = [r for r in records if not is_left_out(r, frozen_layout)]
    sizes: dict[str, int] = {}
    for record in cut:
        sizes[record.part] = sizes.get(record.part, 0) + record.num_elements
    largest = sorted(sizes.values(), reverse=True)[:2]
    shares: Mapping[bool, int] = {
        frozen: sum(_share(r, world_size) for r in cut if r.frozen is frozen) for frozen in (False, True)
    }
    whole = sum(r.num_elements for r in records if is_left_out(r, frozen_layout))
    return {
        "trainable_share": shares[False],
        "frozen_share": shares[True] + whole,
        "whole": whole,
        "gathered": sum(largest),
        "sent": sum(r.num_elements for r in cut),
        "frozen_layout": frozen_layout,
        "offload": offload,
    }


def _share(record: TensorRecord, world_size: int) -> int:
    rows = record.shape[0] if record.shape else 1
    return -(-rows // world_size) * (record.num_elements // max(1, rows))
