"""Commands around a run: `report` makes its page, `prepare` brings what it needs. `cli` registers them."""

import os
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


def prepare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The config file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides by dotted key, such as train.lr=3e-5.", show_default=False),
    ] = None,
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
