#!/usr/bin/env bash
# One cell of run_all.sh: wait for slots of a device, run the commands there, note how it went.
#
#     run_cell.sh QUEUE LINE       a folder and a line as scripts/plan writes them
#
# A cell that fails is an outcome, not an error: the exit status is 0, so that xargs goes on.
set -euo pipefail
queue=$1
IFS=$'\t' read -r name slots needs _ command <<<"$2"
log=$(<"$queue/logs")/$name.log
mkdir -p "$(dirname "$log")" "$(dirname "$queue/status/$name")"

say() { echo "$(date +%T) $name: $1"; }

finish() {
    echo "$1" | tee "$queue/status/$name" >"${log%.log}.status"
    say "$1"
    exit 0
}

# Print the free slots of a device, one a line. A slot is taken while someone holds its lock.
free_slots() {
    local slot
    for slot in "$1"/*; do
        if flock --nonblock "$slot" true; then echo "$slot"; fi
    done
}

# Take `slots` slots of the device that has the most free ones, until this process and those that it
# starts have ended. Who is first at the door waits there: large cells are not overtaken for ever.
take_slots() {
    local most free slot
    exec {door}>"$queue/door"
    flock "$door"
    if [ "$slots" = all ]; then
        device="all GPUs"
        return # with the door in hand
    fi
    while true; do
        most=()
        for device in "$queue"/slots/*; do
            mapfile -t free < <(free_slots "$device")
            if [ "${#free[@]}" -gt "${#most[@]}" ]; then most=("${free[@]}"); fi
        done
        if [ "${#most[@]}" -ge "$slots" ]; then break; fi
        sleep 1
    done
    for slot in "${most[@]:0:slots}"; do
        exec {held}>"$slot"
        flock "$held"
    done
    exec {door}>&-
    device=$(basename "$(dirname "${most[0]}")")
    export CUDA_VISIBLE_DEVICES="${device#cpu}"
}

if [ "$needs" != - ] && ! grep -qs '^done' "$queue/status/$needs"; then
    finish "not run: $needs failed"
fi
take_slots
exec {mine}>>"$log"
if ! flock --nonblock "$mine"; then
    say "waiting: another call is at it"
    flock "$mine"
fi
trap 'echo interrupted >"${log%.log}.status"; exit 255' INT TERM # 255 stops xargs
say "started on device $device, log $log"
SECONDS=0
printf '\n%s on %s\n%s\n' "$(date)" "$(hostname)" "$command" >&"$mine"
if bash -c "$command" >&"$mine" 2>&1; then
    finish "done in $((SECONDS / 3600))$(date -u -d "@$SECONDS" +:%M:%S)"
else
    finish "failed: exit $?"
fi
