"""Show progress and the time left: live on a terminal, a line now and then in a log file."""

import statistics
import sys
from collections.abc import Sequence

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal
WARM_UP = 2  # steps of a call that include compiling and the libraries' choice of kernels


def progress_bar(*, total: int, unit: str, initial: int = 0) -> tqdm:
    """Make a tqdm bar; update its text with `refresh=False`, so that a log is not flooded."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        initial=initial,
        dynamic_ncols=live,
        mininterval=0.1 if live else LOG_INTERVAL,
        file=sys.stderr,
    )


def close_bars() -> None:
    """Leave the bars as they are, so that what is printed next stands on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", [])):
        bar.close()


def time_left(
    seconds: Sequence[float],
    left: int,
    *,
    unit: str = "iteration",
    evaluations: int = 0,
    evaluation_seconds: float | None = None,
) -> str:
    """Estimate the time left: "about 4.8 s an iteration, 2.3 h left with 12 evaluations of ...".

    `seconds` are those of the first units of a call; where there are more than WARM_UP, these are
    left out. `left` units and `evaluations` are still to come; without `evaluation_seconds` an
    evaluation's time is unknown.
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
    """Write a duration for people: 4.8 s, 40 s, 2.5 min, 2.3 h, 4.1 days."""
    for unit, length, least in (("days", 86400, 172800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
