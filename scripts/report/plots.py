"""The interactive figures of a run's page, as pieces of HTML that need plotly.js beside them."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from networks import canonical_name
from scripts.results.evaluations import logged_evaluations
from scripts.results.runs import Record, Run
from utils.measure.protocol import Accuracies

MOST_POINTS = 1000
COLOURS = ("#2563a8", "#c2571a", "#3b7d4f", "#7a4fa3")
SET_NAMES = {"raw": "images", "ema": "moving average of the images"}


def step_figures(run: Run) -> dict[str, str]:
    """Loss, length and learned rate over the outer steps, as far as the run's method logs them."""
    steps = run.logged("step")
    kinds = {
        "Loss": ({"loss": "loss"}, ""),
        "Length": ({"length": "matched step", "n_opt": "nearest step"}, ""),
        "Learned rate": ({"syn_lr": "syn_lr"}, ""),
    }
    found = {}
    for title, (names, _) in kinds.items():
        traces = {}
        for key, label in names.items():
            points = [(step["iteration"], _number(step.get(key))) for step in steps]
            known = [(at, value) for at, value in points if value is not None]
            if known:
                traces[label] = _thinned(known)
        if traces:
            found[title] = _lines(title, traces, is_log=title == "Loss" and _spreads(traces))
    return found


def mean_of(steps: Sequence[Record]) -> int:
    """How many steps a point of the figures is the mean of."""
    return max(1, -(-len(steps) // MOST_POINTS))


def accuracy_figure(run: Run) -> str | None:
    """Test accuracy over iterations, of each set by the run's own network; None without any."""
    own = canonical_name(run.options.evaluation_models[0])
    figure = go.Figure()
    for name, colour in zip(SET_NAMES, COLOURS, strict=False):
        records = [
            record
            for record in logged_evaluations(run)
            if record.get("set") == name and canonical_name(record["model"]) == own
        ]
        measured = [(each["iteration"], Accuracies(tuple(each["accs"]))) for each in records]
        if not measured:
            continue
        counts = sorted({len(accuracies.accs) for _, accuracies in measured})
        label = f"{SET_NAMES[name]} (n={', '.join(map(str, counts))})"
        figure.add_scatter(
            x=[iteration for iteration, _ in measured],
            y=[100 * accuracies.mean for _, accuracies in measured],
            error_y={"array": [100 * accuracies.std for _, accuracies in measured]},
            customdata=[len(accuracies.accs) for _, accuracies in measured],
            hovertemplate="iteration %{x}: %{y:.2f} % (n=%{customdata})",
            name=label,
            mode="lines+markers",
            line={"color": colour},
        )
    if not figure.data:
        return None
    return _as_html(figure, "accuracy", x="iteration", y="test accuracy in %")


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> str:
    """How many of a class's test images were given each label, in percent of the class."""
    totals = [max(1, sum(row)) for row in confusion]
    shares = [
        [100 * count / total for count in row] for row, total in zip(confusion, totals, strict=True)
    ]
    names = [html.escape(name) for name in class_names]
    # By position: two names may be shown alike.
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
    if len(names) > 30:
        ticks = {}
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            customdata=[list(row) for row in confusion],
            zmin=0,
            zmax=100,
            colorscale=[[0, "#ffffff"], [1, COLOURS[0]]],
            hovertemplate="class %{y}, taken for %{x}: %{z:.1f} % (%{customdata})<extra></extra>",
            colorbar={"title": {"text": "%"}, "thickness": 12},
        )
    )
    figure.update_xaxes(**ticks, constrain="domain")
    figure.update_yaxes(**ticks, autorange="reversed", scaleanchor="x", constrain="domain")
    height = max(340, min(720, 220 + 24 * len(names)))
    return _as_html(figure, "confusion", x="taken for", y="class", height=height)


def _number(value: Any) -> float | None:
    """A logged value as a finite number, a list of them as its mean; None for anything else."""
    if isinstance(value, list):
        numbers = [number for each in value if (number := _number(each)) is not None]
        return statistics.fmean(numbers) if numbers else None
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of those that follow one another."""
    size = max(1, -(-len(points) // MOST_POINTS))
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*group, strict=True))) for group in groups]  # type: ignore[misc]


def _spreads(traces: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    """Whether positive values span more than a factor of ten."""
    values = [value for points in traces.values() for _, value in points]
    return min(values) > 0 and max(values) > 10 * min(values)


def _lines(title: str, traces: Mapping[str, Sequence[tuple[float, float]]], *, is_log: bool) -> str:
    figure = go.Figure()
    for (label, points), colour in zip(traces.items(), COLOURS, strict=False):
        xs, ys = zip(*points, strict=True)
        figure.add_scatter(
            x=xs, y=ys, name=label, mode="lines", line={"color": colour, "width": 1.5}
        )
    if is_log:
        figure.update_yaxes(type="log")
    name = title.lower().replace(" ", "_")
    (single, *others) = traces
    return _as_html(figure, name, x="iteration", y="step" if others else single)


def _as_html(figure: go.Figure, name: str, *, x: str, y: str, height: int = 320) -> str:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 56, "r": 16, "t": 28, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=len(figure.data) > 1 or name == "accuracy",
        xaxis_title=x,
        yaxis_title=y,
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot_{name}",
        default_height=f"{height}px",
        config={"displaylogo": False, "responsive": True},
    )
