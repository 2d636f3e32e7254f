"""Commands around a run: `report` makes its page, `prepare` brings what it needs. `cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from dist_finetune.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    to: Annotated[
        Path | None, typer.Option(help="The file to write; left out: report.html in the folder of the one run.")
    ] = None,
) -> None:
    """Write a run's page (plots, frozen parts, planned and actual), which opens offline; of several, a comparison."""
    if len(runs) > 1 and to is None:
        raise UserError("several runs make one page: say where with --to FILE, such as --to comparison.html")
    from dist_finetune.html_report.page import write_comparison, write_report

    path = write_report(runs[0], to) if len(runs) == 1 or to is None else write_comparison(runs, to)
    typer.echo(f"written: {path}")
