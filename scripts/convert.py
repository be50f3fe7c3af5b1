"""Write a distilled set of another code as a file of this one.

    python -m scripts.convert IN OUT [--dataset NAME] [--space SPACE] ...

IN is a file or a folder, OUT a new file distilled_<tag>.pt, which explains itself. What IN does not
say is asked for by a flag; whatever is assumed is printed and kept in OUT (docs/data.md). The data
set has to be there, for its classes and their mean and standard deviation.

Exit status: 0 the file is written, 2 bad input.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from utils.config.resolve import resolve
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.script import run_script
from utils.data.foreign.decide import open_set
from utils.options import ConvertOptions


def main(argv: Sequence[str]) -> int:
    options = resolve(ConvertOptions, argv, description=__doc__ or "").options
    source, out = Path(options.source), Path(options.out)
    if out.exists():
        raise UserError(f"{out} is there already: name a new file")
    if out.suffix != ".pt":
        raise UserError(f"{out}: the file is a .pt, such as distilled_imported.pt")
    check_writable(out.parent)
    distilled = open_set(source, options.stated(data_path=options.data_path, model=options.model))
    distilled.save(out, include_whitening=True)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
