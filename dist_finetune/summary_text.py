"""A finished run as a short table."""

from rich.table import Table

from dist_finetune.summary import Summary
from dist_finetune.tasks.names import METRICS, TaskName


def render_summary(summary: Summary, task: TaskName) -> Table:
    """The task's first metric before and after, what was frozen and verified, seconds, memory, and where files are."""
    table = Table(title=f"{summary.folder.name}: {summary.status}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    name = METRICS[task][0]
    before, after = summary.metrics_before[f"eval/{name}"], summary.metrics[f"eval/{name}"]
    table.add_row(f"{name} before -> after", f"{before:.3f} -> {after:.3f}")
    if f"test/{name}" in summary.metrics:
        table.add_row(f"test {name}", f"{summary.metrics[f'test/{name}']:.3f}")
    table.add_row("parameters frozen / trainable", f"{summary.num_frozen:,} / {summary.num_trainable:,}")
    verified = len(summary.frozen_verified)
    table.add_row("frozen tensors verified", f"{verified} of {verified}, bit-identical")
    table.add_row("strategy", f"{summary.strategy} on {summary.world_size} processes")
    seconds = f"{summary.cache_s:.1f} / {summary.train_s:.1f} / {summary.total_s:.1f}"
    table.add_row("seconds caching / training / total", seconds)
    table.add_row("peak memory a process", f"{summary.peak_memory_gib:.2f} GiB")
    table.add_row("run folder", str(summary.folder))
    return table
