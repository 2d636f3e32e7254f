"""A plan as people read it: what freezes, what trains at which rate, batch arithmetic, memory a rank."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_finetune.lint import below, first_trainable_part
from dist_finetune.memory.state import BF16_BYTES, FP32_BYTES
from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan
from dist_finetune.spec import TrainSpec
from dist_finetune.tasks.names import inputs_in_words, outputs_in_words


def render_plan(plan: Plan, params: bool = False) -> RenderableType:
    """The whole plan as rich tables; `params` adds a line for each tensor."""
    if plan.spec.task == "features":
        blocks: list[RenderableType] = [Text(plan_lines(plan))]
    else:
        blocks = [_freeze_table(plan, phase) for phase in plan.phases]
        blocks += [Text(plan_lines(plan)), _memory_table(plan), Text("\n".join(cost_lines(plan)))]
    notes = plan_notes(plan)
    if notes:
        blocks.append(Text("\n".join(f"note: {note}" for note in notes), style="yellow"))
    if params:
        blocks.append(_tensor_table(plan))
    return Group(*blocks)


def plan_lines(plan: Plan) -> str:
    """The decisions of a plan, a line each."""
    if plan.spec.task == "features":
        return _feature_lines(plan)
    batches = plan.batches
    accumulated = f"{batches.micro_batch_size} x {batches.gradient_accumulation_steps} accumulated"
    total_batch = f"{accumulated} x {plan.topology.world_size} processes"
    return "\n".join(
        [
            *_input_lines(plan),
            *(_phase_line(plan, phase) for phase in plan.phases),
            f"batch     {batches.global_batch_size} = {total_batch}; the last of an epoch {batches.last_batch_size}",
            f"steps     {plan.total_steps} ({batches.steps_per_epoch} an epoch)",
            *_unread_line(plan),
            _precision_line(plan),
            f"strategy  {plan.strategy}: {plan.strategy_reason}",
            *_frozen_line(plan),
            *(_cache_line(plan, phase) for phase in plan.phases),
        ]
    )


def _feature_lines(plan: Plan) -> str:
    """What `task: features` does and takes, a line each: it has no steps, and nothing is sharded."""
    features, manifest = plan.spec.features, plan.widest.manifest
    depths = ", ".join(features.at) or "every depth"
    weights = (manifest.num_frozen + manifest.num_trainable) * FP32_BYTES
    return "\n".join(
        [
            *_input_lines(plan),
            f"features  at {depths}, pool {features.pool}, heads {', '.join(features.heads)}",
            f"pass      one: each row once, shared out over {plan.topology.world_size} processes",
            _precision_line(plan),
            f"memory    {_mib(weights)} MiB of weights a process, and what a batch takes in passing",
            f"load      {_host_memory(plan)}",
        ]
    )


def _input_lines(plan: Plan) -> list[str]:
    data = plan.data
    rows = ", ".join(f"{count:,} {split}" for split, count in data.num_rows.items())
    size = inputs_in_words(data.modality, data.max_length, data.image_size)
    return [
        f"model     {plan.card.name}, {data.modality}, {outputs_in_words(data.task, data.classes)}",
        f"data      {rows} rows, {size}",
    ]


def _unread_line(plan: Plan) -> list[str]:
    if not plan.skips_unread:
        return []
    return ["head      reads the first token alone: the last block computes no other token"]


def _precision_line(plan: Plan) -> str:
    return f"precision {plan.precision} on {plan.topology.device}, {plan.precision_reason}"


def _host_memory(plan: Plan) -> str:
    most = _mib(plan.costs.host_bytes_per_node)
    return f"at most {most} MiB of host memory a node, whatever its number of processes"


def _cache_line(plan: Plan, phase: PhasePlan) -> str:
    decision = plan.cache[phase.index]
    name = f"{phase.name}: " if len(plan.phases) > 1 else ""
    return f"cache     {name}{'on' if decision.use else 'off'}: {decision.reason}"


def _frozen_line(plan: Plan) -> list[str]:
    """Under fsdp, whether frozen weights are copied to every rank, and why; elsewhere the strategy decides."""
    if plan.strategy != "fsdp" or not plan.widest.manifest.frozen:
        return []
    if plan.spec.shard.frozen != "auto":
        why = "asked for"
    elif plan.costs.frozen_layout == "shard":
        why = "copies on every rank would not fit"
    else:
        fits = "it fits, and" if plan.memory["fsdp"].fits else "no memory limit is known, and"
        why = f"{fits} a copy has no gradient and need not be gathered at each pass"
    how = {"replicate": "copied to every rank", "shard": "shared out over ranks"}[plan.costs.frozen_layout]
    return [f"frozen    {how}: {why}"]


def plan_notes(plan: Plan) -> list[str]:
    """What is allowed, but the user may not have meant; each once."""
    many = len(plan.phases) > 1
    notes = [*plan.structure.notes]
    if plan.spec.task == "features":
        return [
            *notes,
            "task: features: no layer is trained; each row is run through the model once, then heads are fitted",
        ]
    notes += [(f"{p.name}: " if many else "") + note.message for p in plan.phases for note in p.notes]
    given = plan.spec.train.epochs
    if plan.spec.phases and not isinstance(plan.spec.phases, str) and given != TrainSpec().epochs:
        notes.append(f"train.epochs: {given:g} has no effect: each phase has its own epochs")
    replicated = replication_note(plan)
    return list(dict.fromkeys([*notes, replicated] if replicated else notes))


def room_notes(plan: Plan) -> list[str]:
    """What the plan says of a run that would not fit and that nothing tries: a micro-batch of the user's own is run as
    it is, since a plan counts more than some runs take."""
    if plan.misfit is None or plan.spec.train.micro_batch_size == "auto":
        return []
    return [f"this run may end for lack of memory: {plan.misfit}"]


def _phase_line(plan: Plan, phase: PhasePlan) -> str:
    """What a phase freezes, its steps and rates; a run of one phase names none."""
    manifest = phase.manifest
    share = manifest.num_frozen / max(1, manifest.num_frozen + manifest.num_trainable)
    rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(group.lr for group in phase.groups))
    until = f" or until {phase.until}" if phase.until else ""
    label = "freeze    " if len(plan.phases) == 1 else f"phase {phase.index}   {phase.name}: "
    return (
        f"{label}{manifest.num_frozen:,} parameters frozen ({share:.1%}), {manifest.num_trainable:,} train for "
        f"{phase.num_steps} steps{until}, lr {rates} {phase.schedule} after {phase.warmup_steps} warm-up"
    )


def _freeze_table(plan: Plan, phase: PhasePlan) -> Table:
    taken = [f"{rule.rule}: {rule.num_tensors} tensors, {rule.num_params:,}" for rule in phase.manifest.rules]
    rules = f"parameters by rule: {'; '.join(taken)}" if taken else ""
    title = f"{phase.name}: freeze {phase.manifest.digest[:12]}"
    table = Table(title=title, title_justify="left", caption=rules or None, caption_justify="left")
    for column in ("part", "modules"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "frozen", "lr"):
        table.add_column(column, justify="right")
    frozen, rates = set(phase.manifest.frozen), {n: g.lr for g in phase.groups for n in g.names}
    sizes = {r.name: r.num_elements for r in phase.manifest.records}
    for part in plan.structure.parts:
        num_frozen = sum(sizes[n] for n in part.parameters if n in frozen)
        lrs = sorted({rates[n] for n in part.parameters if n in rates})
        table.add_row(
            part.label,
            ", ".join(part.modules[:3]) + (", ..." if len(part.modules) > 3 else ""),
            f"{part.num_params:,}",
            "all" if part.parameters and not lrs else f"{num_frozen:,}",
            " ".join(f"{lr:.3g}" for lr in lrs) or "-",
        )
    return table


def _memory_table(plan: Plan) -> Table:
    """A column for each strategy, a line for each kind of bytes on the rank that holds most."""
    device = "GPU" if plan.topology.device == "cuda" else "process"
    table = Table(title=f"memory a {device}, MiB", title_justify="left")
    table.add_column("")
    for strategy in plan.memory:
        table.add_column(strategy, justify="right", style="bold" if strategy == plan.strategy else None)
    found = list(plan.memory.values())
    if plan.costs.offloaded:
        table.add_column("zero3, offload", justify="right")
        found.append(plan.costs.offloaded)
    if any(m.phase for m in found):
        table.add_row("phase that needs most", *(m.phase or "" for m in found))
    for name in ("trainable_weights", "frozen_weights", "gradients", "optimizer", "masters", "buffers"):
        table.add_row(name.replace("_", " "), *(_mib(getattr(m.state, name)) for m in found))
    table.add_row("state", *(_mib(m.total) for m in found), end_section=True, style="bold")
    table.add_row("buckets, gathered", *(_mib(m.state.communication) for m in found))
    table.add_row("copies in update", *(_mib(m.state.update) for m in found))
    if any(m.activations is not None for m in found):
        sizes = {m.micro_batch_size for m in found}
        if len(sizes) > 1:
            table.add_row("micro-batch", *(str(m.micro_batch_size) for m in found))
        rows = f" of {sizes.pop()} rows" if len(sizes) == 1 else ""
        table.add_row(f"activations{rows}", *(_mib(m.activations or 0) for m in found))
        table.add_row("peak", *(_mib(m.needed) for m in found), style="bold")
    if plan.topology.device_memory_bytes is not None:
        table.add_row("fits", *("yes" if m.fits else "no" for m in found))
    table.add_row("sent a step", *(_mib(m.traffic) for m in found))
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def cost_lines(plan: Plan) -> list[str]:
    """What a run takes besides GPU memory, and what its freeze gains."""
    costs = plan.costs
    lines = [f"checkpoint {_mib(costs.checkpoint_bytes)} MiB on disk; at load {_host_memory(plan)}"]
    gain = costs.forecast
    if gain and gain.speedup > 1:
        lines.append(
            f"forecast   {gain.speedup:.2f}x the unfrozen speed, counted in operations; {gain.speedup_cached:.2f}x "
            f"with the frozen prefix cached, which is {gain.frozen_prefix_share:.0%} of the forward pass"
        )
    if better := costs.forecast_filled_up:
        lines.append(
            f"forecast   {better.speedup:.2f}x, and {better.speedup_cached:.2f}x cached, if what trains below frozen "
            "blocks were frozen too"
        )
    lines += _cached_line(plan)
    moved = plan.memory[plan.strategy].state.offloaded
    if moved:
        ranks = plan.topology.processes_per_node
        lines.append(f"offload    {_mib(moved)} MiB of each rank in host memory, {_mib(moved * ranks)} on a node")
    if costs.offloaded:
        moved = costs.offloaded.state.offloaded
        lines.append(
            f"offload    shard: {{strategy: zero3, offload: parameters}} moves {_mib(moved)} MiB of each rank's state "
            "to host memory, and takes more time"
        )
    rows = plan.batches.micro_batch_size
    if costs.activations and costs.other_activations:
        ours, other = costs.activations.at(rows), costs.other_activations.at(rows)
        way = "without" if plan.spec.train.gradient_checkpointing else "with"
        if abs(ours - other) > ours // 100:
            saved = f" ({_mib(costs.saved.at(rows))} saved for the backward pass)" if costs.saved else ""
            lines.append(
                f"activations {_mib(ours)} MiB for {rows} rows{saved}, {_mib(other)} {way} train.gradient_checkpointing"
            )
    if costs.activations_unknown:
        lines.append(f"activations unknown: the model can't be run without data ({costs.activations_unknown})")
    return lines


def _cached_line(plan: Plan) -> list[str]:
    """What the cache of the phase that trains most takes on disk, and spares each process."""
    elements = plan.costs.cached_elements
    if not plan.cache[plan.widest.index].use or elements is None:
        return []
    first = first_trainable_part(plan.widest.manifest, plan.structure)
    dropped = sum(part.num_params for part in below(first, plan.structure)) * FP32_BYTES
    views = plan.spec.cache.views or 1
    rows = sum(count * (views if split == "train" else 1) for split, count in plan.data.num_rows.items())
    size = BF16_BYTES if plan.spec.cache.dtype == "bf16" else FP32_BYTES
    at_most = "at most " if plan.data.modality == "text" else ""  # texts are stored without padding
    return [
        f"cache      {at_most}{_mib(rows * elements * size)} MiB on disk for {rows:,} rows; once it is filled, each "
        f"process drops {_mib(dropped)} MiB of frozen weights (the table counts them)"
    ]


def replication_note(plan: Plan) -> str | None:
    """What ddp, zero1 and zero2 users of a mostly frozen model may not expect: each rank holds all frozen weights."""
    mine = plan.memory[plan.strategy].state
    world_size = plan.topology.world_size
    if world_size == 1 or mine.frozen_weights < mine.total // 4 or "zero3" not in plan.memory:
        return None
    sharded = plan.memory["zero3"].state
    if mine.frozen_weights <= sharded.frozen_weights:
        return None
    return (
        f"{plan.strategy} keeps all frozen weights on every rank, {_mib(mine.frozen_weights)} of {_mib(mine.total)} "
        f"MiB of state; zero3 would keep {_mib(sharded.frozen_weights)}, and {_mib(sharded.communication)} in passing"
    )


def _tensor_table(plan: Plan) -> Table:
    table = Table(title="tensors", title_justify="left")
    for column in ("name", "shape", "part", "frozen", "rule"):
        table.add_column(column, overflow="fold")
    for record in plan.widest.manifest.records:
        shape = " x ".join(map(str, record.shape)) or "scalar"
        table.add_row(record.name, shape, record.part, "yes" if record.frozen else "no", record.rule or "")
    return table
