"""`dist-finetune doctor`: does this machine, or this whole job, agree with itself? One line for each question.

Started alone it looks at one machine; under a launcher every rank looks, and the first one speaks for all.
"""

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dist_finetune.doctor_local import Finding, local_findings
from dist_finetune.doctor_ranks import rank_findings, shared_folder_finding
from dist_finetune.engine import open_accelerator
from dist_finetune.errors import DistFinetuneError, UserError
from dist_finetune.home import expand_home
from dist_finetune.launchers.environment import world_from_environment
from dist_finetune.plan import Plan, for_planning, make_plan
from dist_finetune.preflight import visible_gpus
from dist_finetune.run_folder import output_of
from dist_finetune.spec import LaunchSpec, Spec
from dist_finetune.topology import job_topology
from dist_finetune.world import World, gather_objects, join_world, together

JOIN_TIMEOUT_S = 60.0
COLLECTIVE_TIMEOUT_S = 120.0


def examine(spec: Spec | None, say: Callable[[str], None]) -> int:
    """Says a line for each finding, on the first rank, and returns the exit code: 1 where something fails, else 0."""
    launch = (spec.launch if spec else LaunchSpec()).model_copy(
        update={"join_timeout": JOIN_TIMEOUT_S, "timeout": COLLECTIVE_TIMEOUT_S}
    )
    findings: list[Finding] = []
    num_said = 0
    try:
        with join_world(launch) as world:
            speaks = world.is_first
            for finding in _together(spec, world):
                findings.append(finding)
                if speaks:  # at once: NCCL ends a process whose collective does not come back
                    say(_line(finding))
                    num_said += 1
    except DistFinetuneError as error:
        findings, num_said, speaks = _alone(spec, error), 0, True
    except RuntimeError as error:  # what torch says of a collective that did not come back
        findings.append(_hang(error, launch, findings))
        speaks = True
    if speaks:
        # One write, so that lines of several ranks on one terminal don't mix.
        counts = {state: sum(f.state == state for f in findings) for state in ("fail", "warn")}
        total = f"{counts['fail']} to mend, {counts['warn']} to know about, {len(findings)} looked at"
        say("\n".join([*map(_line, findings[num_said:]), total]))
    return int(any(finding.state == "fail" for finding in findings))


def _alone(spec: Spec | None, error: DistFinetuneError) -> list[Finding]:
    """What one machine shows where ranks did not come together; its first rank looks, the others only say why."""
    try:
        found = world_from_environment(os.environ)
        local = local_findings(spec, None, found.local_world_size) if found.local_rank == 0 else []
    except UserError:  # which `error` says; ranks that can't be told apart all look
        local = local_findings(spec, None, None)
    told = any(finding.state == "fail" and finding.text in str(error) for finding in local)
    return local if told else [*local, Finding("fail", "ranks", str(error))]


def _hang(error: RuntimeError, launch: LaunchSpec, findings: list[Finding]) -> Finding:
    """Says on which rank the questions ended, and after which one."""
    rank, after = world_from_environment(os.environ).rank, findings[-1].about if findings else "the start"
    text = f"rank {rank} on {socket.gethostname()} could not go on after {after!r}: {_first_line(error)}"
    todo = (
        f"a rank that says nothing here hangs or has ended (collectives wait {launch.timeout:.0f} s): look at its "
        "output, `nvidia-smi` and network, or leave its machine out (sbatch --exclude)"
    )
    return Finding("fail", "ranks", text, todo)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _together(spec: Spec | None, world: World) -> Iterator[Finding]:
    """The findings of all ranks, the same on every rank, each as soon as it is there. Collective."""
    yield from rank_findings(world)
    plan, problem = _plan(spec, world)
    if problem:
        yield problem
    local = local_findings(spec, plan, None if world.launcher == "none" else world.local_world_size)
    yield from _merged(gather_objects((socket.gethostname(), local)))
    output = (output_of(spec) if spec else Path("runs")).absolute()
    yield shared_folder_finding(world, "run folder", output, must_share=True)
    cache = expand_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    yield shared_folder_finding(world, "hub cache", cache, must_share=False)


def _plan(spec: Spec | None, world: World) -> tuple[Plan | None, Finding | None]:
    """The plan of `spec` for this job, alone: for what this machine's GPUs would run; and what is wrong with it.
    Accelerate and DeepSpeed must see the same world as torch."""
    if spec is None:
        return None, None
    topology = job_topology(world)
    if world.launcher == "none":  # as `run` would start it here
        topology = replace(topology, processes_per_node=visible_gpus() or 1)

    def planned() -> Plan:
        # `strategy: auto` has not measured yet: what it may choose at most is a training of everything
        return make_plan(for_planning(spec, topology.world_size) if spec.task == "features" else spec, topology)

    try:
        plan = together(planned)
        together(lambda: open_accelerator(plan, plan.phases[0], world))
    except DistFinetuneError as error:
        return None, Finding("fail", "config", str(error), "`dist-finetune plan` shows what this config would do")
    engines = "Accelerate and DeepSpeed see" if plan.strategy.startswith("zero") else "Accelerate sees"
    processes = "one process" if world.world_size == 1 else f"{world.world_size} processes"
    planned_for = "" if topology.world_size == world.world_size else f" on {topology.world_size} GPUs"
    text = f"{plan.strategy}, {plan.precision}{planned_for}; {engines} {processes} too"
    if plan.misfit:
        return plan, Finding("fail", "config", plan.misfit)
    return plan, Finding("ok", "config", text)


def _merged(seen: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """One finding for all machines that say the same; where they differ, each with its machines' names."""
    hosts: dict[Finding, list[str]] = {}
    for host, findings in seen:
        for finding in findings:
            hosts.setdefault(finding, []).append(host)
    everybody = sorted({host for host, _ in seen})
    return [
        finding
        if sorted(set(there)) == everybody
        else Finding(finding.state, finding.about, f"{', '.join(sorted(set(there)))}: {finding.text}", finding.todo)
        for finding, there in hosts.items()
    ]


def _line(finding: Finding) -> str:
    todo = f"\n      {'':13}-> {finding.todo}" if finding.todo else ""
    return f"{finding.state:<6}{finding.about:<13}{finding.text}{todo}"
