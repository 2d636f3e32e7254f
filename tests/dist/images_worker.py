"""One rank that reads image data: images_worker.py CONFIG OUT RANKS_A_MACHINE. Writes OUT.RANK: the fingerprint, or the
error, and how many files it read and decoded. Ranks take themselves for those of containers of one host name."""

import json
import sys
from pathlib import Path
from typing import Any

from dist_finetune import turns
from dist_finetune.advise import run as advise_run
from dist_finetune.data import checks
from dist_finetune.data.together import read_tables_together
from dist_finetune.errors import DistFinetuneError
from dist_finetune.features import job as features_job
from dist_finetune.report import Reporter
from dist_finetune.spec_file import load_spec
from dist_finetune.world import join_world

check = checks._check_image
counts = {"read": 0, "decoded": 0}


def check_and_count(image: Any, decode: bool) -> checks.ImageCheck:
    counts["read"] += 1
    counts["decoded"] += decode
    return check(image, decode)


def main() -> None:
    spec, out = load_spec(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {"errors": []}
    with join_world(spec.launch) as world:
        turns.PID_NAMESPACE = out.with_name(f"namespace.{world.rank}")
        turns.PID_NAMESPACE.symlink_to(f"container{world.rank // int(sys.argv[3])}")
        checks._check_image = check_and_count
        for read in (
            lambda: read_tables_together(spec.data, 0, None, world),
            lambda: features_job.class_tables(spec, "task: features", world),
            lambda: advise_run._advise(spec, world, Reporter(False)),
        ):
            try:
                found["fingerprint"] = read().fingerprint
            except DistFinetuneError as error:
                found["errors"].append(str(error))
            found.setdefault("counts", dict(counts))
    out.with_name(f"{out.name}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
