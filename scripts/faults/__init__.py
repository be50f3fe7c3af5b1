"""Kill, fill up, interrupt and damage calls of the three scripts, and count what is lost."""

import os

if os.name == "nt":
    raise SystemExit(
        "scripts.faults: error: its faults are those of Unix, they cannot be injected here"
    )
