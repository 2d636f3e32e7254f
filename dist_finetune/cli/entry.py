"""The command line: its commands, and what each of them ends with."""

import atexit
import gc
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dist_finetune import __version__
from dist_finetune.cli import finished, jobs, planning
from dist_finetune.errors import DistFinetuneError, UserError
from dist_finetune.launchers.brought import brought_settings
from dist_finetune.launchers.environment import world_from_environment

GC_THRESHOLDS = (100_000, 50, 100)  # Python's own look for cycles every 700 objects takes a tenth of a start's time
LOCAL_RANK_FLAG = re.compile(r"--local[_-]rank(=\d+)?")
app = typer.Typer(
    help="Fine-tune large BERTs and CNNs over many GPUs, with the frozen layers truly frozen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process: exit code 0 done, 1 failed, 2 wrong input, 75 stopped and resumable."""
    gc.set_threshold(*GC_THRESHOLDS)
    atexit.register(gc.freeze)  # else Python ends with a look for cycles in all that was imported, a fifth of a plan
    try:
        _main(arguments)
    except SystemExit as end:
        leave_at_once(end.code)
        raise
    except Exception:  # one without words of ours: Python shows it, and would then take itself apart
        leave_at_once(1, traceback.format_exc())
        raise


def leave_at_once(code: object, last_words: str = "") -> None:
    """Ends a rank of several whose work is done, after its `last_words`. Threads of torch, DeepSpeed and gloo now and
    then abort ("terminate called without an active exception") or hang while the interpreter takes itself apart, and
    hold the job. So does a W&B client that could not finish, also where there is one rank."""
    try:
        is_one_of_several = world_from_environment(os.environ).world_size > 1
    except UserError:
        return  # which has been said
    is_stuck = getattr(sys.modules.get("dist_finetune.tracking"), "is_stuck", False)
    if (is_one_of_several or is_stuck) and "torch" in sys.modules and isinstance(code, int | None):
        sys.stderr.write(last_words)
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code or 0)


def _main(arguments: Sequence[str] | None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever it stands: who adds it repeats the last command.
    debug = ["--debug"] if "--debug" in given else []
    try:
        rest = _without_launcher_flags([word for word in given if word != "--debug"])
        app([*debug, *rest], prog_name="dist-finetune")
    except DistFinetuneError as error:
        if debug:
            traceback.print_exc()
        # One write, so that lines of several ranks on one terminal don't mix.
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """The user's own arguments: `deepspeed` puts --local_rank=N first, and sets LOCAL_RANK as well."""
    kept, words = [], iter(arguments)
    for word in words:
        found = LOCAL_RANK_FLAG.fullmatch(word)
        if not found:
            kept.append(word)
        elif not found[1]:
            next(words, None)
    brought = brought_settings({}, kept)
    if brought:
        flag, value = next(iter(brought.items()))
        raise UserError(
            f"{flag} {value}: DeepSpeed's settings follow from the config. Put extra keys under shard.deepspeed of the "
            "config, and leave the flag out."
        )
    return kept


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dist-finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


for command in (
    jobs.run,
    jobs.resume,
    jobs.train,
    planning.plan,
    planning.submit,
    planning.prepare,
    jobs.features,
    jobs.advise,
    jobs.selfcheck,
    planning.doctor,
    finished.evaluate,
    finished.predict,
    finished.export,
    finished.report,
    finished.verify,
    finished.inspect,
    finished.cache,
    planning.schema,
):
    app.command()(command)
