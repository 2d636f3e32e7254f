"""`dist-finetune doctor`: does this machine, or this whole job, agree with itself? One line for each question.

Started alone it looks at one machine; under a launcher every rank looks, and the first one speaks for all.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from dist_finetune.doctor_local import Finding, local_findings
from dist_finetune.doctor_ranks import rank_findings, shared_folder_finding
from dist_finetune.engine import open_accelerator
from dist_finetune.errors import DistFinetuneError
from dist_finetune.plan import Plan, local_topology, make_plan
from dist_finetune.spec import LaunchSpec, Spec
from dist_finetune.world import World, gather_objects, join_world, together

JOIN_TIMEOUT_S = 60.0
COLLECTIVE_TIMEOUT_S = 120.0


def examine(spec: Spec | None, say: Callable[[str], None]) -> int:
    """Says a line for each finding, on the first rank, and returns the exit code: 1 where something fails, else 0."""
    launch = (spec.launch if spec else LaunchSpec()).model_copy(
        update={"join_timeout": JOIN_TIMEOUT_S, "timeout": COLLECTIVE_TIMEOUT_S}
    )
    try:
        with join_world(launch) as world:
            findings = _examine_together(spec, world)
    except DistFinetuneError as error:
        say(_line(Finding("fail", "ranks", str(error))))
        return 1
    if world.is_first:
        for finding in findings:
            say(_line(finding))
        counts = {state: sum(f.state == state for f in findings) for state in ("fail", "warn")}
        say(f"{counts['fail']} to mend, {counts['warn']} to know about, {len(findings)} looked at")
    return int(any(finding.state == "fail" for finding in findings))


def _examine_together(spec: Spec | None, world: World) -> list[Finding]:
    """The findings of all ranks. Collective, the same list on every rank."""
    findings = rank_findings(world)
    plan, problem = _plan(spec, world)
    findings += [problem] if problem else []
    local = local_findings(spec, plan, world.local_world_size)
    findings += _merged(gather_objects((socket.gethostname(), local)))
    output = Path(spec.output if spec else "runs").absolute()
    findings.append(shared_folder_finding(world, "run folder", output, must_share=True))
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    findings.append(shared_folder_finding(world, "hub cache", cache, must_share=False))
    return findings


def _plan(spec: Spec | None, world: World) -> tuple[Plan | None, Finding | None]:
    """The plan of `spec` for this job, and what is wrong with it; Accelerate and DeepSpeed must see the same world."""
    if spec is None:
        return None, None
    topology = local_topology(world.local_world_size, world.num_nodes)
    try:
        plan = together(lambda: make_plan(spec, topology))
        together(lambda: open_accelerator(plan, plan.phases[0], world))
    except DistFinetuneError as error:
        return None, Finding("fail", "config", str(error), "`dist-finetune plan` shows what this config would do")
    engines = "Accelerate" if plan.strategy == "ddp" else "Accelerate and DeepSpeed"
    text = f"{plan.strategy}, {plan.precision}; {engines} see {world.world_size} process(es) too"
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
