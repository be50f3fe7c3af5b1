"""How the figures look. One style for all: a column wide, and nothing told by colour alone."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator

from utils.methods.trajectory.lengths import LENGTH_POLICIES

MARKERS = 12  # the most on a line, about
COLUMN = 3.4  # inches, of a page with two columns
STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 250,
    "pdf.fonttype": 42,  # text that can be searched
}
ITERATION = "outer iteration"
NAMES = {"att": "ATT", "fixed": "fixed"}


# How series are drawn: any two differ by line and marker. The colours suit the colour-blind (Okabe
# and Ito).
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    {"color": "#cc79a7", "linestyle": ":", "marker": "D"},
    {"color": "#e69f00", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#56b4e9", "linestyle": (0, (8, 2)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (1, 3)), "marker": "X"},
    {"color": "#7f7f7f", "linestyle": (0, (3, 1)), "marker": "<"},
    {"color": "#6a3d9a", "linestyle": (0, (8, 2, 1, 2)), "marker": ">"},
    {"color": "#b15928", "linestyle": (0, (2, 2)), "marker": "*"},
)
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----", "||||", "**")  # of bars
POLICIES = tuple(LENGTH_POLICIES)


def place_of(policy: str) -> int:
    """The number of its look; methods without lengths share one."""
    return POLICIES.index(policy) if policy in POLICIES else len(POLICIES)


def look_of(policy: str, **changes: Any) -> dict[str, Any]:
    return LOOKS[place_of(policy)] | changes


def name_of(policy: str) -> str:
    return NAMES.get(policy, policy)


def save(figure: Figure, path: Path) -> list[Path]:
    """Write <path>.png and <path>.pdf, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".pdf")]
    with rc_context(STYLE):
        figure.savefig(files[0], metadata={"Software": None})
        figure.savefig(files[1], metadata={"CreationDate": None})
    return files


def draw_distances(found: pd.DataFrame) -> Figure:
    """Fig. 1. A curve holds the picks of both policies, whoever learned the images."""
    figure = Figure(figsize=(COLUMN, 2.6))
    by_iteration = list(found.groupby("iteration"))
    panels = _panels(figure, 1, len(by_iteration))
    for axes, (iteration, curves) in zip(panels, by_iteration, strict=True):
        axes.set_title(f"iteration {iteration:,}")
        axes.set_xlabel("student step t")
        for curve in curves.itertuples():
            own = look_of(curve.policy, marker="", label=f"images by {name_of(curve.policy)}")
            axes.plot(curve.distances, **own)
            end = len(curve.distances) - 1
            for step, pick, size in ((curve.n_opt, "att", 6), (end, "fixed", 5)):
                mark = {"color": own["color"], "markersize": size, **_open_marker(pick)}
                axes.plot(step, curve.distances[step], **mark)
    left = figure.axes[0]
    left.set_ylabel(r"$\|\theta_t-\theta^*\|^2 \,/\, \|\theta_0-\theta^*\|^2$")
    for pick, text in (("att", "ATT picks $N_{opt}$"), ("fixed", "fixed picks $N_S$")):
        left.plot([], [], color="black", label=text, **_open_marker(pick))
    _legend_below(figure, left)
    return figure


def _open_marker(policy: str) -> dict[str, Any]:
    marker = look_of(policy)["marker"]
    return {"marker": marker, "linestyle": "", "markerfacecolor": "white"}


def draw_mismatches(found: pd.DataFrame, *, gamma: float, interval: int) -> Figure:
    """Fig. 2. ATT's line is one for all N_S: it matches N_opt."""
    figure = Figure(figsize=(COLUMN, 4.2))
    cases, mean = _panels(figure, 2, 1, sharey=False)
    by_label = {
        f"{name_of(policy)}: 0 by construction"
        if policy == "att"
        else f"{name_of(policy)}, $N_S$ = {syn_steps}": series
        for (policy, syn_steps), series in found.groupby(["policy", "syn_steps"])
    }
    for look, (label, series) in zip(itertools.cycle(LOOKS), by_label.items(), strict=False):
        at = interval * (series["interval"] + 0.5)
        every = max(1, len(series) // MARKERS)
        for axes, values in ((cases, series["cases"]), (mean, series["mean"])):
            axes.plot(at, values, label=label, markevery=every, **look)
    cases.set_ylabel(f"cases with $|n-N_{{opt}}| > {gamma:g}$\nper {interval} iterations")
    mean.set_ylabel("mean $|n-N_{opt}|$, steps")
    mean.set_xlabel(f"{ITERATION} (middle of {interval})")
    for axes in (cases, mean):
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        axes.margins(y=0.08)
    _legend_below(figure, cases)
    return figure


def draw_lengths(found: pd.DataFrame) -> Figure:
    """Fig. 4, left. Dots are single choices, the line is their running median over seeds."""
    by_bound = list(found.groupby("syn_steps"))
    figure = Figure(figsize=(COLUMN, 0.9 + 1.05 * len(by_bound)))
    iterations = found.columns
    reach = len(iterations) // 80
    text = f"ATT: n, median of {2 * reach + 1} iterations"
    for axes, (syn_steps, by_run) in zip(_panels(figure, len(by_bound), 1), by_bound, strict=True):
        lengths = by_run.to_numpy()
        for of_run in lengths:
            axes.plot(iterations, of_run, ".", color="0.7", markersize=2, rasterized=True)
        axes.plot(
            iterations, running_median(lengths, reach), **look_of("att", marker="", label=text)
        )
        bound = np.full(len(iterations), syn_steps)
        axes.plot(iterations, bound, **look_of("fixed", marker="", label="fixed: $N_S$"))
        axes.set_ylabel(f"length, steps\n($N_S$ = {syn_steps})")
    figure.axes[-1].set_ylim(0, 1.1 * by_bound[-1][0])
    figure.axes[-1].set_xlabel(ITERATION)
    _legend_below(figure, figure.axes[0])
    return figure


def running_median(lengths: np.ndarray, reach: int) -> np.ndarray:
    """(seeds, iterations) -> (iterations,): over seeds and `reach` iterations to either side."""
    windows = [lengths[:, max(0, at - reach) : at + reach + 1] for at in range(lengths.shape[1])]
    return np.array([np.nanmedian(window) for window in windows])


def draw_successes(found: pd.DataFrame) -> Figure:
    """Fig. 4, right. The number is above each bar, with the repeats where some are missing."""
    figure = Figure(figsize=(COLUMN, 2.5))
    most = found["repeats"].max()
    by_rate = list(found.groupby("rate"))
    for axes, (rate, shown) in zip(_panels(figure, 1, len(by_rate)), by_rate, strict=True):
        multipliers = sorted(set(shown["multiplier"]))
        by_policy = list(shown.groupby("policy"))
        for number, (policy, bars) in enumerate(by_policy):
            shift = 0.8 * ((number + 0.5) / len(by_policy) - 0.5)
            at = [multipliers.index(value) + shift for value in bars["multiplier"]]
            _bars(axes, at, bars, policy=policy, most=most)
        axes.set_xticks(range(len(multipliers)), [f"{value:g}" for value in multipliers])
        axes.set_xlabel(f"multiplier of {rate}")
        axes.grid(visible=False, axis="x")
        axes.set_ylim(0, 1.12 * most)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel(f"successes out of {most}")
    _legend_below(figure, figure.axes[0])
    return figure


def _bars(axes: Axes, at: Sequence[float], found: pd.DataFrame, *, policy: str, most: int) -> None:
    color, hatch = look_of(policy)["color"], HATCHES[place_of(policy)]
    bars = axes.bar(
        at,
        found["successes"],
        width=0.36,
        facecolor="white" if hatch else color,
        edgecolor=color,
        hatch=hatch,
        label=name_of(policy),
    )
    counts = zip(found["successes"], found["repeats"], strict=True)
    texts = [f"{done}" if of == most else f"{done}/{of}" for done, of in counts]
    axes.bar_label(bars, texts, fontsize=6, padding=1)


def draw_accuracies(found: pd.DataFrame) -> Figure:
    """Over iterations and over wall time. Open markers are the moving average of the images."""
    figure = Figure(figsize=(COLUMN, 4.4))
    by_iteration, by_time = _panels(figure, 2, 1, sharex=False)
    for (policy, name), each in found.groupby(["policy", "set"], sort=False):
        own = look_of(policy, label=f"{name_of(policy)}, raw")
        if name == "ema":
            own |= {
                "label": f"{name_of(policy)}, EMA",
                "linewidth": 0.7,
                "markerfacecolor": "white",
            }
        band = each["mean"] - each["std"], each["mean"] + each["std"]
        for axes, at in ((by_iteration, each["iteration"]), (by_time, each["seconds"] / 60)):
            axes.plot(at, each["mean"], markevery=max(1, len(at) // MARKERS), **own)
            if each["seeds"].max() > 1:
                axes.fill_between(at, *band, color=own["color"], alpha=0.15, linewidth=0)
    counts = "/".join(str(n) for n in sorted(set(found["seeds"])))
    for axes, label in ((by_iteration, ITERATION), (by_time, "time in outer steps, minutes")):
        axes.set_ylabel("test accuracy, %")
        axes.set_xlabel(label)
    by_iteration.set_title(f"mean ± std of {counts} seeds" if counts != "1" else "one seed")
    _legend_below(figure, by_iteration)
    return figure


def draw_pictures(files: Sequence[Path]) -> Figure:
    """The initial images beside those that were learned, a class a column."""
    sheets = [imread(file) for file in files]
    height = sum(sheet.shape[0] / sheet.shape[1] for sheet in sheets)
    figure = Figure(figsize=(COLUMN, 0.5 + COLUMN * height))
    titles = ("before: initial images", "after: distilled")
    for axes, sheet, title in zip(_panels(figure, len(files), 1), sheets, titles, strict=True):
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    return figure


def _panels(
    figure: Figure, rows: int, columns: int, *, sharex: bool = True, sharey: bool = True
) -> list[Axes]:
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    return list(grid.flat)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """That of one panel, for all."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
