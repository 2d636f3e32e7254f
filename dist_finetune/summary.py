"""What a run says about itself: plan, freeze, environment and attempt at the start, summary.json at the end."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_finetune.evaluate import Evaluation
from dist_finetune.hold import Hold, LostHold
from dist_finetune.job import Job, Progress, Stage
from dist_finetune.models.card import Provenance
from dist_finetune.no_memory import lack_of_memory_told
from dist_finetune.peak_memory import peak_memory_gib
from dist_finetune.report import Reporter
from dist_finetune.run_folder import (
    ATTEMPTS,
    Changes,
    RunState,
    enter_run_folder,
    environment,
    folder_of,
    json_text,
    number,
    read_summary,
    write_json,
    write_text,
)
from dist_finetune.spec import Spec
from dist_finetune.stopping import Stopped
from dist_finetune.verdict import tell_job_script, why_again
from dist_finetune.world import World, gather_objects, on_first, wait_for_first


@dataclass(frozen=True)
class Summary:
    """The result of a run; the same on every rank, and summary.json in the run folder."""

    folder: Path
    status: str
    metrics_before: dict[str, float]
    metrics: dict[str, float]
    num_frozen: int
    num_trainable: int
    frozen_verified: tuple[str, ...]
    steps: int
    kept_step: int
    """Step of the exported model: the last, or the best where `checkpoint.best` asks for it."""
    phases: tuple[dict[str, Any], ...]
    stopped_early: bool
    skipped: int
    """Steps left out because their loss or gradients were not finite (`train.max_skipped`)."""
    train_s: float
    cache_s: float
    """Seconds that filling the cache of the frozen prefix took, on top of `train_s`."""
    total_s: float
    save_pause_s: float
    """Longest time that a save kept training waiting."""
    attempts: int
    peak_memory_gib: float
    world_size: int
    strategy: str
    planned_state_bytes: int
    memory: dict[str, dict[str, int | None]]
    """Bytes of the rank with most by kind, `planned` for the phase that trains most and `actual` at the end."""
    wandb: str

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the number of verified tensors beside their names."""
        out = dataclasses.asdict(self)
        out["folder"] = str(self.folder)
        out["num_frozen_tensors_verified"] = len(self.frozen_verified)
        return out


def write_start(job: Job, provenance: Provenance, stage: Stage, progress: Progress) -> None:
    """plan.json, environment.json and freeze.json of a run that is about to train or to go on.

    A line of attempts.jsonl says from which step it starts, when and where, and after what, if a job script knows.
    """
    machine = environment()
    write_json(job.folder / "plan.json", job.plan.to_json())
    write_json(job.folder / "environment.json", machine)
    attempt = {"attempt": progress.attempts, "step": progress.step, "time": time.time(), "host": machine["host"]}
    attempt |= {"world_size": job.world.world_size, "strategy": job.plan.strategy}
    if why_again():
        attempt["after"] = why_again()
    with (job.folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(attempt) + "\n")
    write_freeze(job, stage, dataclasses.asdict(provenance))


def write_freeze(job: Job, stage: Stage, source: dict[str, Any] | None = None) -> None:
    """Adds a phase to freeze.json: every tensor in order, with the sha256 that each frozen one must keep."""
    phase = job.plan.phases[stage.phase.index]
    path = job.folder / "freeze.json"
    content: dict[str, Any] = {"source": source, "phases": {}}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    tensors = [dataclasses.asdict(record) for record in phase.manifest.records]
    for tensor in tensors:
        tensor["sha256"] = stage.frozen_digests.get(tensor["name"])
    content["phases"][phase.name] = {"digest": phase.manifest.digest, "mode": phase.manifest.mode, "tensors": tensors}
    write_json(path, content)


def summarise(
    job: Job,
    progress: Progress,
    kept_step: int,
    final: Mapping[str, Evaluation],
    frozen_verified: tuple[str, ...],
    save_pauses_s: Sequence[float],
    memory: dict[str, dict[str, int | None]],
    total_s: float,
) -> Summary:
    """The summary of a finished run; rank 0 writes it. Collective (peak memory is the highest of all ranks)."""
    plan, world = job.plan, job.world
    metrics = {
        f"{'eval' if split == 'validation' else split}/{name}": value
        for split, evaluation in final.items()
        for name, value in evaluation.metrics.items()
    }
    manifest = plan.phases[progress.phase].manifest
    summary = Summary(
        folder=job.folder,
        status="finished",
        metrics_before={f"eval/{name}": value for name, value in (progress.before or {}).items()},
        metrics=metrics,
        num_frozen=manifest.num_frozen,
        num_trainable=manifest.num_trainable,
        frozen_verified=frozen_verified,
        steps=progress.step,
        kept_step=kept_step,
        phases=tuple(progress.phases_done),
        stopped_early=progress.step < plan.total_steps,
        skipped=progress.skipped,
        train_s=round(progress.train_s, 3),
        cache_s=round(progress.cache_s, 3),
        total_s=round(total_s, 3),
        save_pause_s=round(max(save_pauses_s, default=0.0), 4),
        attempts=progress.attempts,
        peak_memory_gib=round(max(gather_objects(peak_memory_gib(world.device))), 3),
        world_size=world.world_size,
        strategy=plan.strategy,
        planned_state_bytes=plan.memory[plan.strategy].total,
        memory=memory,
        wandb=job.report.wandb_mode,
    )
    if world.is_first:
        write_text(job.folder / "summary.json", json_text(summary.to_json(), indent=1) + "\n")
    return summary


def write_end(folder: Path | None, error: Exception, world: World) -> None:
    """Tells a job script how the run ended, and marks its folder, where it has one, as failed or stopped.

    On whichever rank knows first: one that fails alone leaves the first rank in a collective, which the launcher ends.
    """
    status: Literal["stopped", "failed"] = "stopped" if isinstance(error, Stopped) else "failed"
    if world.is_first:
        tell_job_script(status)
    if folder and (folder / "plan.json").exists() and read_summary(folder).get("status") is None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        told = {"status": status, "message": f"{type(error).__name__}: {error}", "time": when}
        with contextlib.suppress(OSError):  # a full disk must not hide what ended the run
            write_json(folder / "summary.json", told)


@contextlib.contextmanager
def in_run_folder(
    spec: Spec,
    fresh: bool,
    changes: Changes,
    world: World,
    report: Reporter,
    memory_todo: str,
    between: Callable[[], None] = lambda: None,
) -> Iterator[tuple[RunState, Hold]]:
    """Around a run, with how its folder was found: no other job writes there meanwhile, and what ends the run early is
    marked there and told to its trackers. `between` may end the wait for another job, see `Hold`. Collective.

    Told to stop, which every rank is at once, all wait for the first one: most launchers end a job, and a tracker that
    is still closing, with its first process. Raises what `enter_run_folder` does.
    """
    folder, found = folder_of(spec), None
    with Hold(folder, report.say, between) as hold:
        try:
            found = on_first(world, lambda: enter_run_folder(spec, fresh, changes, hold))
            with lack_of_memory_told(world, memory_todo):
                yield found, hold
        except Exception as error:
            # before it has started, what the folder holds is another run's, or one that --fresh will put aside
            is_lost = hold.is_lost or isinstance(error, LostHold)  # the first rank looks, the others are told
            is_ours = (found == "unfinished" or report.has_files) and not is_lost
            write_end(folder if is_ours else None, error, world)
            report.finish({}, exit_code=1)
            hold.release()
            if isinstance(error, Stopped):
                wait_for_first()
            raise


def load_summary(folder: Path) -> Summary:
    """The summary of a finished run, from its folder."""
    saved = read_summary(folder)
    values = {field.name: saved[field.name] for field in dataclasses.fields(Summary)}
    for metrics in ("metrics_before", "metrics"):
        values[metrics] = {name: number(value) for name, value in saved[metrics].items()}
    values |= {"folder": folder, "frozen_verified": tuple(saved["frozen_verified"]), "phases": tuple(saved["phases"])}
    return Summary(**values)
