#!/usr/bin/env bash
# Installs the package and fine-tunes a real BERT and a real CNN: on the GPUs, or on two CPU processes where there is none.
# Arguments are handed to both runs, such as train.epochs=1 or --fresh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
    if [ ! -x .venv/bin/pip ]; then
        for python in python3.11 python3.12 python3.13 python3.14 python3 none; do
            if [ "$python" = none ]; then
                echo "error: no Python 3.11 or newer found; install one, or activate an environment that has it" >&2
                exit 2
            fi
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

# The stamp says which folder, with which pyproject.toml, was installed into this environment.
stamp="$(python -c 'import sys; print(sys.prefix)')/dist-finetune-demo.stamp"
current="$here $(cksum < pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$current" ]; then
    echo "installing dist-finetune and its packages (torch and others: minutes the first time)"
    python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
    echo "$current" > "$stamp"
fi

output=runs
processes=()
for argument in "$@"; do
    case "$argument" in output=*) output=${argument#output=} ;; esac
done
case " $* " in
    *" --processes"* | *" --gpus"*) ;;
    *)
        # as many as share a batch of 32 evenly
        gpus=$(python -c 'from dist_finetune.launchers.local import count_gpus
print(max((n for n in range(1, count_gpus() + 1) if 32 % n == 0), default=0))')
        if [ "$gpus" -gt 0 ]; then processes=(--gpus "$gpus"); else processes=(--processes 2); fi
        ;;
esac

runs=()
for name in quickstart_bert quickstart_cnn; do
    printf '\n$ dist-finetune run configs/%s.yaml %s\n' "$name" "${processes[*]:-} $*"
    python -m dist_finetune run "configs/$name.yaml" "${processes[@]}" "$@"
    runs+=("$output/$name")
done

python - "${runs[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

folders = [Path(argument) for argument in sys.argv[1:]]
runs = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
table = Table("", *(folder.name for folder in folders), title="Both runs")
for label, text in {
    "accuracy before": lambda run: f"{run['metrics_before']['eval/accuracy']:.3f}",
    "accuracy after": lambda run: f"{run['metrics']['eval/accuracy']:.3f}",
    "parameters frozen": lambda run: f"{run['num_frozen']:,}",
    "parameters trainable": lambda run: f"{run['num_trainable']:,}",
    "frozen tensors verified": lambda run: str(run["num_frozen_tensors_verified"]),
    "seconds": lambda run: f"{run['total_s']:.0f}",
    "peak GiB a process": lambda run: f"{run['peak_memory_gib']:.2f}",
    "run folder": lambda run: run["folder"],
}.items():
    table.add_row(label, *(text(run) for run in runs))
Console().print(table)
print("All of a run on one page, in any browser:", " and ".join(str(folder / "report.html") for folder in folders))
PYTHON
