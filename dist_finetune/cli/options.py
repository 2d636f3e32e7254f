"""What commands have in common: arguments, the config, and how a result is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_finetune.errors import UserError

if TYPE_CHECKING:
    from dist_finetune.spec import Spec

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The config file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides by dotted key, such as train.lr=3e-5.", show_default=False),
]
Gpus = Annotated[int | None, typer.Option(help="Use so many GPUs; left out: all visible ones.")]
Processes = Annotated[
    int | None, typer.Option(help="Start so many processes; with GPUs each has one, without any the default is 1.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; a run folder of the same name is kept aside.")]


def load(config: str, overrides: Sequence[str] | None) -> "Spec":
    """The config with its overrides. Raises UserError that lists every problem."""
    # Building the models of the config takes half of what `--help` may take.
    from dist_finetune.spec_file import load_spec

    return load_spec(config, overrides or ())


def memory_bytes(text: str) -> int:
    """Bytes of a --gpu-memory such as 80GiB. Raises UserError."""
    from dist_finetune.durations import parse_bytes

    try:
        number: int = parse_bytes(text)
    except ValueError as error:
        raise UserError(f"--gpu-memory: {error}") from None
    return number


def show(rendered: Any) -> None:
    """Plain text as it is; anything else as rich draws it on this terminal."""
    if isinstance(rendered, str):
        typer.echo(rendered)
    else:
        from rich.console import Console

        Console(markup=False).print(rendered)
