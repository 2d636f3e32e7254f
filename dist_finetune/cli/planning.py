"""Commands before a run: its plan, its submission, what it needs."""

import json
import os
from typing import Annotated

import typer

from dist_finetune.cli.options import Config, Fresh, Overrides, load, memory_bytes, show
from dist_finetune.errors import PlanError


def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each machine; left out: as many as are visible here.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
    params: Annotated[bool, typer.Option("--params", help="List every parameter.")] = False,
) -> None:
    """Show what a run would freeze, train and need, without GPU and weights; exit code 1 if it doesn't fit."""
    spec = load(config, overrides)
    memory = memory_bytes(gpu_memory) if gpu_memory else None
    if gpus_per_node and spec.task != "features":
        spec.train.rows_per_process(nodes * gpus_per_node)  # told before all is imported that a plan needs
    from dist_finetune.plan import for_planning, make_plan
    from dist_finetune.plan_text import render_plan
    from dist_finetune.preflight import visible_gpus
    from dist_finetune.topology import Topology, local_topology

    processes = gpus_per_node or visible_gpus() or 1  # as `run` starts here
    here = local_topology(processes, nodes)
    asks_for_gpus = gpus_per_node is not None or memory is not None
    if asks_for_gpus:
        memory = memory or here.device_memory_bytes
        is_seen = here.device == "cuda"
        topology = Topology(nodes, processes, "cuda", memory, here.supports_bf16, is_seen)
    else:
        topology = here
    planned = make_plan(for_planning(spec, topology.world_size), topology)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=1))
    else:
        show(render_plan(planned, params=params))
    if planned.misfit:
        raise PlanError(planned.misfit)


def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each machine; 0 trains on CPUs.")] = 1,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="With no GPUs: processes on each machine, default 1.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one attempt, such as 04:00:00 or '90 min'.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80GiB.")] = None,
    to: Annotated[str, typer.Option(help="slurm, skypilot, dstack or kubernetes.")] = "slurm",
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=a,b: a run for each value, and for each combination of several.")
    ] = None,
    price: Annotated[str | None, typer.Option(help="A price list (YAML); shows hours and cost.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the job.")] = False,
    fresh: Fresh = False,
) -> None:
    """Plan, show, write and submit a SLURM job that saves at its time limit, queues itself again and goes on.

    With another --to it writes that tool's file and shows the commands; nothing is started.
    """
    from dist_finetune.launchers.request import check_request

    request = check_request(
        to=to,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        gpu_memory_bytes=memory_bytes(gpu_memory) if gpu_memory else None,
        time=time,
        partition=partition,
        sweep=tuple(sweep or ()),
        price=price,
        dry_run=dry_run,
        fresh=fresh,
    )
    load(config, overrides)  # a wrong config is told before the seconds of imports that a plan takes
    from dist_finetune.submit import submit as submit_job

    submit_job(config, overrides or (), request, typer.echo)


def prepare(
    config: Config,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fetch nothing: only prove that a run without network finds everything.")
    ] = False,
) -> None:
    """Fetch model, tokenizer and data where there is internet, and prove that a run without any finds them."""
    if check:
        # Before the first import: the hub's client reads them once.
        os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    from dist_finetune import prepare as preparing

    (preparing.check if check else preparing.prepare)(config, overrides or (), typer.echo)


def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Also check what this config needs.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, GPUs, ranks, network, disks, hub, W&B: alone or under any launcher; exit code 1 if one fails."""
    spec = load(config, overrides) if config else None
    from dist_finetune.doctor import examine

    raise typer.Exit(examine(spec, typer.echo))


def schema(
    as_text: Annotated[bool, typer.Option("--text", help="Print all keys as tables in Markdown instead.")] = False,
) -> None:
    """Print the JSON Schema of the config, for completion in an editor."""
    from dist_finetune.spec import Spec
    from dist_finetune.spec_text import key_tables

    content = Spec.model_json_schema()
    # A file without a name takes its own.
    content["required"] = [key for key in content["required"] if key != "name"]
    if as_text:
        typer.echo(key_tables(content), nl=False)
        return
    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **content}, indent=2))
