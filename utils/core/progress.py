"""How far the work is: progress bars, live on a terminal, a line now and then in a log file; and
what is left of it.
"""

import statistics
import sys
from collections.abc import Sequence

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal
WARM_UP = 2  # steps of a call that include compiling and the libraries' choice of kernels


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


def time_left(
    seconds: Sequence[float],
    left: int,
    *,
    unit: str = "iteration",
    evaluations: int = 0,
    evaluation_seconds: float | None = None,
) -> str:
    """One line, as in "about 4.8 s an iteration, 2.3 h left with 12 evaluations of about 40 s".

    `seconds` are those of the first units of a call, of which the first ones are left out where
    there are more. `left` units and `evaluations` are still to come; without `evaluation_seconds`
    nothing is known of these.
    """
    each = statistics.median(seconds[WARM_UP:] or seconds)
    total = left * each + evaluations * (evaluation_seconds or 0)
    article = "an" if unit[0] in "aeiou" else "a"
    line = f"about {duration(each)} {article} {unit}, {duration(total)} left"
    if evaluations == 0:
        return line
    several = f"{evaluations} evaluation{'s' * (evaluations > 1)}"
    if evaluation_seconds is None:
        return f"{line} and {several}"
    return f"{line} with {several} of about {duration(evaluation_seconds)}"


def duration(seconds: float) -> str:
    """For people: 4.8 s, 40 s, 2.5 min, 2.3 h, 4.1 days."""
    for unit, length, least in (("days", 86400, 172800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
