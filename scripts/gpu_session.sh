#!/usr/bin/env bash
# On a machine with a GPU: the benchmarks, then the cuda tests, within ten minutes.
#
#     bash scripts/gpu_session.sh OUT [PYTHON]
#
# leaves OUT/measure/session.tgz and OUT/test/session.tgz (scripts/gpu). PYTHON (default: that of
# .venv, else python3) needs the packages of requirements.txt but wandb, and pytest; no data set.
set -euo pipefail
out=$(realpath -m "${1:?name a folder for the results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${2:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
status=0
"$python" -m scripts.gpu measure "$out/measure" --seconds 420 || status=$?
"$python" -m scripts.gpu test "$out/test" --seconds 180 || status=$?
exit "$status"
