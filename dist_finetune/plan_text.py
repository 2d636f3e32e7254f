"""A plan as people read it: what freezes, what trains at which rate, batch arithmetic, memory a rank."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_finetune.phases import PhasePlan
from dist_finetune.plan import Plan


def render_plan(plan: Plan, params: bool = False) -> RenderableType:
    """The whole plan as rich tables; `params` adds a line for each tensor."""
    blocks: list[RenderableType] = [_freeze_table(plan, phase) for phase in plan.phases]
    blocks += [Text(plan_lines(plan)), _memory_table(plan)]
    notes = plan_notes(plan)
    if notes:
        blocks.append(Text("\n".join(f"note: {note}" for note in notes), style="yellow"))
    if params:
        blocks.append(_tensor_table(plan))
    return Group(*blocks)


def plan_lines(plan: Plan) -> str:
    """The decisions of a plan, a line each."""
    batches, data = plan.batches, plan.data
    rows = ", ".join(f"{count:,} {split}" for split, count in data.num_rows.items())
    size = f"up to {data.max_length} tokens" if data.modality == "text" else f"{data.image_size} pixels"
    accumulated = f"{batches.micro_batch_size} x {batches.gradient_accumulation_steps} accumulated"
    total_batch = f"{accumulated} x {plan.topology.world_size} processes"
    return "\n".join(
        [
            f"model     {plan.card.name}, {plan.data.modality}, {len(data.classes)} classes",
            f"data      {rows} rows, {size}",
            *(_phase_line(plan, phase) for phase in plan.phases),
            f"batch     {batches.global_batch_size} = {total_batch}; the last of an epoch {batches.last_batch_size}",
            f"steps     {plan.total_steps} ({batches.steps_per_epoch} an epoch)",
            f"precision {plan.precision} on {plan.topology.device}",
            f"strategy  {plan.strategy}: {plan.strategy_reason}",
        ]
    )


def plan_notes(plan: Plan) -> list[str]:
    """What is allowed, but the user may not have meant; each once."""
    many = len(plan.phases) > 1
    return list(dict.fromkeys((f"{p.name}: " if many else "") + note.message for p in plan.phases for note in p.notes))


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
    table = Table(title=f"{phase.name}: freeze {phase.manifest.digest[:12]}", title_justify="left")
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
    table = Table(title="training state a rank, MiB (activations come on top)", title_justify="left")
    table.add_column("strategy")
    columns = ("trainable_weights", "frozen_weights", "gradients", "optimizer", "masters", "buffers", "total")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for strategy, state in plan.memory.items():
        cells = (f"{getattr(state, column) / 2**20:,.1f}" for column in columns)
        table.add_row(strategy, *cells, style="bold" if strategy == plan.strategy else None)
    return table


def _tensor_table(plan: Plan) -> Table:
    table = Table(title="tensors", title_justify="left")
    for column in ("name", "shape", "part", "frozen", "rule"):
        table.add_column(column, overflow="fold")
    for record in plan.widest.manifest.records:
        shape = " x ".join(map(str, record.shape)) or "scalar"
        table.add_row(record.name, shape, record.part, "yes" if record.frozen else "no", record.rule or "")
    return table
