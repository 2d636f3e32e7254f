"""Commands on what is there already: a run's model, page and checkpoints, a model's parts, stored activations."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from dist_finetune.cli.options import RunFolder, show
from dist_finetune.errors import UserError
from dist_finetune.home import expand_home


def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="As data.validation; left out: the run's test rows, else validation."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"] | None, typer.Option(help="A split of the run instead of DATA.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a run's model on its own held-out rows, or on others with the same columns and classes."""
    from dist_finetune.inference.evaluate import evaluate_run
    from dist_finetune.run_folder import json_text

    found = evaluate_run(run, data, split)
    if found.is_first:
        typer.echo(json_text(found.to_json(), indent=1) if as_json else found.lines())
        if found.not_recorded:
            typer.echo(f"warning: {found.not_recorded}", err=True)


def predict(
    run: RunFolder,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of rows, a folder of images, or one image; no labels needed.")
    ],
    to: Annotated[
        Path | None, typer.Option(help="Write here, .jsonl or .csv; left out: JSON lines on the standard output.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", help="Call rows by this column instead of by their numbers.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names for a .csv or .tsv file without a header line, such as text,label.")
    ] = None,
) -> None:
    """Give each row or image of FILE its class and probabilities, or labels, a number or tags, in the input's order."""
    from dist_finetune.inference.predict import predict_file, save_predictions, write_predictions

    if to is not None and to.exists() and file.exists() and to.samefile(file):
        raise UserError(f"--to {to}: that is FILE itself, which predictions would replace; name another file")
    header = tuple(columns.split(",")) if columns else None
    found = predict_file(run, file, header, id_column)
    if to is None:
        write_predictions(found, sys.stdout, ".jsonl")
    else:
        typer.echo(f"{save_predictions(found, to):,} predictions in {to}")


def export(
    run: RunFolder,
    to: Annotated[Literal["hf", "timm", "onnx"], typer.Option(help="For transformers, for timm, or as ONNX.")],
    out: Annotated[Path | None, typer.Option(help="A new folder to write to.", show_default=False)] = None,
) -> None:
    """Write a run's model for transformers, timm or ONNX Runtime; a format that doesn't suit it is refused."""
    from dist_finetune.inference.export import export_run

    made = export_run(run, to, out)
    typer.echo("\n".join([f"{made.folder}", f"load it with {made.how_to_load}", *made.notes]))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, one or several.", show_default=False)],
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


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run's folder, or one of its checkpoints/step-NNNNNN.",
            show_default=False,
        ),
    ],
) -> None:
    """Check files and hashes of a run's checkpoints (or of one), and say what could be resumed."""
    from dist_finetune.checkpoint.verify import verify_path

    lines, is_good = verify_path(path)
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if is_good else 1)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As model.name in a config.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="As model.trust_remote_code: run code of a hub repository.")
    ] = False,
) -> None:
    """Show a model's structure as freeze rules name it: embeddings or stem, numbered blocks, head, tied tensors."""
    from dist_finetune.models.on_meta import on_meta
    from dist_finetune.models.order import structure_for
    from dist_finetune.models.sources import build_model, describe_model
    from dist_finetune.models.structure import render_structure
    from dist_finetune.spec import ModelSpec

    # a structure needs no weights, and not all that can be trained have published ones
    spec = ModelSpec(name=model, weights="none", trust_remote_code=trust_remote_code)
    card = describe_model(spec)
    with on_meta():
        built = build_model(card, spec, ("0", "1"))
    show(render_structure(structure_for(built, card)))


def cache(
    action: Annotated[
        Literal["ls", "clear"],
        typer.Argument(metavar="ls|clear", help="List the entries, or delete them all.", show_default=False),
    ],
    folder: Annotated[Path, typer.Option(help="The cache's folder, as cache.folder in a config.")] = Path(
        "runs/.cache"
    ),
) -> None:
    """List or delete stored activations of frozen prefixes."""
    from dist_finetune.cache.entries import clear, list_entries

    folder = expand_home(folder)  # a shell leaves it in --folder=~/x
    if action == "clear":
        typer.echo(f"{clear(folder) / 2**20:,.1f} MiB freed in {folder}")
        return
    entries = list_entries(folder)
    if not entries:
        typer.echo(f"no stored activations in {folder}")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        typer.echo(f"{entry.key}  {entry.num_bytes / 2**20:>10,.1f} MiB  used {used}  {entry.source}")
