"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal


def progress_bar(*, total: int, unit: str, initial: int = 0) -> tqdm:
    """A tqdm bar; update its text with `refresh=False`, so that a log is not flooded."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        initial=initial,
        dynamic_ncols=live,
        mininterval=0.1 if live else LOG_INTERVAL,
        file=sys.stderr,
    )
