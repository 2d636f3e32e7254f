"""Data as the ranks of a job read it: each on its own, but for image files, which the ranks of a machine share.

Every machine reads every file, as each may have a copy of its own; that all copies are the same is seen by the digests.
"""

from typing import Any

import torch.distributed as dist

from dist_finetune.data.checks import ImageCheck
from dist_finetune.data.tables import OpenTables, Tables, checked_tables, open_tables
from dist_finetune.spec import DataSpec
from dist_finetune.tasks.names import TaskName
from dist_finetune.turns import this_host
from dist_finetune.world import World, gather_objects, require_same, together

Checks = dict[str, list[ImageCheck]]


def read_tables_together(spec: DataSpec, seed: int, task: TaskName | None, world: World) -> Tables:
    """As `read_tables` on every rank; one of each machine reads an image file, one of the first rank's decodes it.

    Collective: raises on every rank the DistFinetuneError of the lowest rank that failed.
    """
    opened = together(lambda: open_tables(spec, task))
    num_images = {role: len(source.table) for role, source in opened.sources.items()} if opened.columns.image else {}
    require_same("the number of images", str(num_images), "Give every rank the same data.")
    images = _checks(opened, world) if num_images else None
    return together(lambda: checked_tables(opened, images, spec, seed, task))


def _checks(opened: OpenTables, world: World) -> Checks:
    """Those of all images, of which this rank makes its share."""
    hosts = gather_objects(this_host())  # containers of one host name may each have files of their own
    machines = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    mine = next(ranks for ranks in machines if world.rank in ranks)
    number, decode = mine.index(world.rank), 0 in mine
    share = together(lambda: opened.check_images(decode, number, len(mine)))
    shares: list[Any] = [None] * len(mine)
    # within the machine alone: those of all machines would take memory for each of them
    group: Any = dist.new_subgroups_by_enumeration(machines, backend="gloo")[0]
    dist.all_gather_object(shares, share, group=group)
    dist.destroy_process_group(group)
    whole: Checks = {}
    for role, source in opened.sources.items():
        whole[role] = [(b"", None)] * len(source.table)
        for first, part in enumerate(shares):
            whole[role][first :: len(mine)] = part[role]
    return whole
