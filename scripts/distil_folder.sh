#!/usr/bin/env bash
# Distil a folder of pictures in the minutes given, and show the result on one page.
#
#     bash scripts/distil_folder.sh my_pictures [--ipc 10] [--minutes 30]
#
# Interrupted, the same command goes on. `--help` says more.
set -euo pipefail
if [ $# -gt 0 ] && [[ "$1" != -* ]] && [ ! -d "$1" ]; then
    echo "distil_folder.sh: error: ${1:-''} is no folder: give one with train/<class>/* and test/<class>/*" >&2
    exit 2
fi
export DISTIL_FOLDER_FROM="$PWD" DISTIL_FOLDER_SH="$0" # paths are looked for from where the caller is
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
exec .venv/bin/python -m scripts.folder "$@"
