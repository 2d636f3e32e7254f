"""Hours and money of a planned run, from its operations and a price list that the user gives.

A price list is YAML, an entry for each GPU, `A100-80GB: {per_hour: 2.10, tflops: 312, efficiency: 0.35}`: the price of
one for an hour in any currency, its peak at the run's precision, and the share of the peak that training reaches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from dist_finetune.errors import UserError
from dist_finetune.memory.forecast import Forecast
from dist_finetune.plan import Plan
from dist_finetune.spec_base import Section
from dist_finetune.spec_file import parse_yaml


class GpuPrice(Section):
    per_hour: Annotated[float, Field(ge=0)]
    tflops: Annotated[float, Field(gt=0)]
    efficiency: Annotated[float, Field(gt=0, le=1)] = 0.35


@dataclass(frozen=True)
class Cost:
    gpu: str
    hours: float
    price: float


def read_prices(path: Path) -> dict[str, GpuPrice]:
    """The price list in `path`, by GPU. Raises UserError that names each wrong entry."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), path, "safe")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no price list that can be read: {error}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: a price list has an entry for each GPU: `A100-80GB: {{per_hour: 2.1, tflops: 312}}`")
    prices, problems = {}, []
    for gpu, entry in content.items():
        try:
            prices[str(gpu)] = GpuPrice.model_validate(entry)
        except ValidationError as error:
            where = ", ".join(f"{'.'.join(map(str, e['loc'])) or 'the entry'}: {e['msg']}" for e in error.errors())
            problems.append(f"  {gpu}: {where}")
    if problems:
        raise UserError(f"{path}: wrong entries, which need per_hour and tflops\n" + "\n".join(problems))
    return prices


def run_costs(plan: Plan, prices: Mapping[str, GpuPrice]) -> list[Cost]:
    """Hours and price of the whole run on each GPU of the list, cheapest first.

    Raises UserError where the plan could not count the model's operations.
    """
    forecast = plan.costs.forecast
    if forecast is None or not forecast.forward_flops:
        why = plan.costs.activations_unknown or "its operations could not be counted"
        raise UserError(f"--price: no time can be told for {plan.card.name}: {why}")
    operations = _operations(plan, forecast)
    costs = []
    for gpu, entry in prices.items():
        seconds = operations / (entry.tflops * 1e12 * entry.efficiency * plan.topology.world_size)
        hours = seconds / 3600
        costs.append(Cost(gpu, hours, hours * entry.per_hour * plan.topology.world_size))
    return sorted(costs, key=lambda cost: cost.price)


def _operations(plan: Plan, forecast: Forecast) -> float:
    """Floating point operations of a whole run."""
    whole, rows = forecast.forward_flops, plan.data.num_rows
    if plan.spec.task == "features":
        return whole * sum(rows.values())  # one pass, and heads are fitted on the CPU
    full_epochs, more_steps = divmod(plan.total_steps, plan.batches.steps_per_epoch)
    trained = full_epochs * rows["train"] + more_steps * plan.batches.global_batch_size
    evaluations = 1 + max(1, round(plan.total_steps / plan.batches.steps_per_epoch))  # one before the first step
    validation, tested = rows.get("validation", 0), rows.get("test", 0) * whole
    if not all(cache.use for cache in plan.cache):
        return trained * forecast.frozen_flops + evaluations * validation * whole + tested
    prefix = whole * forecast.frozen_prefix_share  # each stored row runs through it once
    stored = rows["train"] * (plan.spec.cache.views or 1) + validation
    return stored * prefix + trained * forecast.cached_flops + evaluations * validation * (whole - prefix) + tested


def cost_lines(plans: Sequence[Plan], prices: Mapping[str, GpuPrice]) -> list[str]:
    """A line for each GPU of the list, cheapest first, for all runs. Start-up, saving and waiting come on top."""
    each = [{cost.gpu: cost for cost in run_costs(plan, prices)} for plan in plans]
    totals = [Cost(gpu, sum(run[gpu].hours for run in each), sum(run[gpu].price for run in each)) for gpu in prices]
    runs = "" if len(plans) == 1 else f" for all {len(plans)} runs"
    num_gpus = plans[0].topology.world_size
    return [
        f"price     {cost.gpu} x {num_gpus}: {_time(cost.hours)}, {cost.price:,.2f}{runs}"
        for cost in sorted(totals, key=lambda cost: cost.price)
    ]


def _time(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 1 else f"{max(0.1, hours * 60):.1f} min"
