#!/usr/bin/env bash
# On a machine with a GPU: every cuda test and every benchmark, within ten minutes.
#
#     bash scripts/gpu_session.sh OUT [PYTHON]
#
# leaves logs and JSON in the folder OUT. What does not end in its time is cut off and the rest goes
# on, the most important first. PYTHON (default: that of .venv, else python3) needs torch, kornia,
# scipy, tqdm, PyYAML, psutil and, for the tests, pytest; no data set.
set -uo pipefail
out=$(realpath -m "${1:?name a folder for the results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${2:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
mkdir -p "$out"

step() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || echo "== $name failed or ran out of its $seconds s"
}

bench() {
    local name=$1 seconds=$2
    shift 2
    step "$name" "$seconds" "$python" scripts/bench.py "$@" --out "$out/$name.json"
}

step tests 120 "$python" -m pytest -q -m cuda tests
bench unroll_cifar10_ipc1 90 unroll --ipc 1 --syn_steps 80 --repeats 5
bench unroll_cifar100_ipc10 120 unroll --classes 100 --ipc 10 --syn_steps 20 --repeats 3
bench evaluation_ipc1 60 evaluation --ipc 1 --epochs 100 --repeats 3
bench experts 70 experts --networks 4 --steps 50 --repeats 3
bench experts_bf16 50 experts --networks 4 --steps 50 --repeats 3 --precision bf16
bench memory_cifar100_ipc10 30 unroll --classes 100 --ipc 10 --syn_steps 20 --micro_batch 100 \
    --variants long --repeats 1
bench scaling 120 scaling --sweeps syn_steps --variant short --repeats 3
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
