"""A finished run as a short table."""

from rich.table import Table

from dist_finetune.summary import Summary


def render_summary(summary: Summary) -> Table:
    """Accuracy before and after, what was frozen and verified, seconds, memory, and where the files are."""
    table = Table(title=f"{summary.folder.name}: {summary.status}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    before, after = summary.metrics_before["eval/accuracy"], summary.metrics["eval/accuracy"]
    table.add_row("accuracy before -> after", f"{before:.3f} -> {after:.3f}")
    if "test/accuracy" in summary.metrics:
        table.add_row("test accuracy", f"{summary.metrics['test/accuracy']:.3f}")
    table.add_row("parameters frozen / trainable", f"{summary.num_frozen:,} / {summary.num_trainable:,}")
    verified = len(summary.frozen_verified)
    table.add_row("frozen tensors verified", f"{verified} of {verified}, bit-identical")
    table.add_row("strategy", f"{summary.strategy} on {summary.world_size} processes")
    seconds = f"{summary.cache_s:.1f} / {summary.train_s:.1f} / {summary.total_s:.1f}"
    table.add_row("seconds caching / training / total", seconds)
    table.add_row("peak memory a process", f"{summary.peak_memory_gib:.2f} GiB")
    table.add_row("run folder", str(summary.folder))
    return table
