"""One page about one run, report.html: everything in one file, which opens without a network."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline

from networks import NETWORKS
from scripts.report.pictures import Gallery, gallery
from scripts.report.plots import accuracy_figure, confusion_figure, mean_of, step_figures
from scripts.results.evaluations import measured
from scripts.results.runs import Record, Run, read_begun
from utils.core.errors import UserError
from utils.core.files import check_writable, write_text
from utils.core.progress import duration
from utils.data.spec import KNOWN
from utils.measure.protocol import mean_and_std
from utils.measure.record import CONFUSION, is_confusion

PAGE = "report.html"
# Of an environment, what the page says of how a run was made.
ENVIRONMENT = ("command", "device", "python", "torch", "git_commit")
SET_NAMES = {"distilled raw": "distilled images", "distilled ema": "distilled, moving average"}
Facts = list[tuple[str, str]]


def write_page(path: Path, out: Path, *, more: Mapping[str, Any] | None = None) -> Path:
    """Write the page about the run in `path` into the folder `out`; its path.

    `more` has what a command around the run knows: `choices`, lines about how the run was set up,
    and `minutes`, (part, predicted, used) in minutes. UserError where there is no run, or one of
    another version, or where nothing can be written.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"--html {path} is no run directory: it has no config.yaml; give a folder such as "
            "results/<dataset>/<model>/ipc<k>/<run_name>"
        )
    check_writable(out)
    run = read_begun(path)
    write_text(page(run, more=more or {}), out / PAGE)
    return out / PAGE


def page(run: Run, *, more: Mapping[str, Any]) -> str:
    """The page as text."""
    evaluations, notes = _evaluations(run)
    shown = gallery(
        run.path, ipc=run.options.ipc, side=run.settings()["res"], class_names=_class_names(run)
    )
    confusion_of = _with_confusion(evaluations, len(shown.class_names))
    figures = {
        "steps": step_figures(run),
        "accuracy": accuracy_figure(run),
        "confusion": confusion_of and confusion_figure(confusion_of[CONFUSION], shown.class_names),
    }
    images = f"{run.options.ipc} image{'s' * (run.options.ipc > 1)}"
    return _template().render(
        title=f"{run.method} on {_data_name(run)}, {images} per class",
        status=_status(run),
        diverged=run.diverged is not None,
        accuracies=_accuracies(run, evaluations),
        notes=[*shown.notes, *notes],
        gallery=shown,
        rows=_rows(shown, confusion_of),
        **figures,
        mean_of=mean_of(run.logged("step")),
        confusion_of=confusion_of and _describe_confusion(confusion_of),
        cost=_cost(run, shown),
        choices=more.get("choices", ()),
        minutes=more.get("minutes", ()),
        settings=_settings(run),
        environment=_environment(run, evaluations),
        lines=ten_lines(run, shown.best),
        plotly=plotly.offline.get_plotlyjs() if any(figures.values()) else "",
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _evaluations(run: Run) -> tuple[Sequence[Record], list[str]]:
    """The entries of eval.json; where it is damaged, none and a note."""
    try:
        return run.evaluations, []
    except UserError as error:
        return [], [f"{' '.join(str(error).split())}."]


def _status(run: Run) -> str:
    taken, wanted = run.steps_taken, run.options.Iteration
    if run.diverged is not None:
        return f"ended after {taken:,} of {wanted:,} steps, because it diverged: " + str(
            run.diverged.get("reason", "no reason is recorded")
        )
    if taken < wanted:
        return f"not finished: {taken:,} of {wanted:,} steps so far"
    return f"finished: {taken:,} steps"


def _data_name(run: Run) -> str:
    options, res = run.options, run.settings()["res"]
    name = options.dataset
    if name == "folder":
        name = Path(options.data_path).name or options.data_path
    return " ".join(filter(None, (name, options.subset, f"at {res} pixels" if res else "")))


def _class_names(run: Run) -> list[str]:
    """As far as config.yaml tells them, or how many there are; empty where it does not."""
    known = run.data or {}
    names = known.get("class_names")
    if isinstance(names, list) and names:
        return [str(name) for name in names]
    count = known.get("classes")
    if not isinstance(count, int):
        facts = KNOWN.get(run.options.dataset)
        count = facts.spec.classes if facts else 0
    return [str(number) for number in range(count)]


def _accuracies(run: Run, evaluations: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each set and network that was measured."""
    rows = measured(run) if evaluations or not (run.path / "eval.json").exists() else []
    return [
        {
            "set": SET_NAMES.get(row["trained_on"], row["trained_on"]),
            "network": row["network"],
            "accuracy": mean_and_std(row["mean"], row["std"], row["n"], unit=" %").strip(),
            "n": str(row["n"]),
            "epochs": f"{row['epochs']:,}",
            "chosen_by": {"test": "test images", "val": "images held out"}.get(
                row["chosen_by"], row["chosen_by"]
            ),
        }
        for row in sorted(rows, key=lambda row: not row["set"])  # distilled ones first
    ]


def _with_confusion(evaluations: Sequence[Record], classes: int) -> Record | None:
    """The evaluation whose confusion is shown: of a distilled set before others, of the latest."""
    able = [
        entry
        for entry in evaluations
        if is_confusion(entry.get(CONFUSION)) and len(entry[CONFUSION]) == classes
    ]
    return max(
        reversed(able), key=lambda entry: entry["trained_on"].startswith("distilled"), default=None
    )


def _describe_confusion(entry: Record) -> str:
    images = sum(map(sum, entry[CONFUSION]))
    name = SET_NAMES.get(entry["trained_on"], entry["trained_on"])
    return (
        f"{entry['model']} trained on {name}: {images:,} answers of {len(entry['accs'])} networks "
        "in all"
    )


def _rows(shown: Gallery, confusion_of: Record | None) -> list[dict[str, Any]]:
    """A row for each class: its pictures, first and at the start of the slider, its accuracy."""
    if not shown.frames:
        return []
    first, start = shown.frames[0], shown.frames[shown.start]
    rows = []
    for label, before in enumerate(first.strips):
        counts = confusion_of[CONFUSION][label] if confusion_of else []
        right = f"{100 * counts[label] / sum(counts):.0f} %" if sum(counts) else ""
        name = shown.class_names[label]
        rows.append({"name": name, "right": right, "before": before, "after": start.strips[label]})
    return rows


def _cost(run: Run, shown: Gallery) -> Facts:
    """What was spent, as far as it is recorded."""
    options, steps = run.options, run.logged("step")
    seconds = [step["seconds"] for step in steps if isinstance(step.get("seconds"), int | float)]
    facts: Facts = []
    classes = len(shown.class_names)
    if classes:
        train = _train_images(run)
        share = f" in place of {train:,} real ones" if train else ""
        facts.append(("distilled images", f"{classes * options.ipc:,}{share}"))
    if seconds:
        each = duration(sorted(seconds)[len(seconds) // 2])
        facts.append(("outer steps", f"{len(steps):,} in {duration(sum(seconds))}, {each} each"))
    if run.experts and "number" in run.experts:
        number, epochs = run.experts["number"], run.experts.get("epochs", "?")
        facts.append(("experts", f"{number} of {epochs} epochs"))
    files = [file for file in run.path.iterdir() if file.is_file() and file.name != PAGE]
    size = sum(file.stat().st_size for file in files)
    facts.append(("run directory", f"{size / 1e6:,.1f} MB"))
    if devices := dict.fromkeys(str(call["device"]) for call in run.calls if "device" in call):
        facts.append(("distilled on", ", ".join(devices)))
    return facts


def _train_images(run: Run) -> int | None:
    try:
        return int((run.data or {})["parts"]["train"]["images"])
    except (LookupError, TypeError, ValueError):
        facts = KNOWN.get(run.options.dataset)
        return facts.train if facts else None


def _settings(run: Run) -> Facts:
    return [(name, str(value)) for name, value in run.settings().items()]


def _environment(run: Run, evaluations: Sequence[Record]) -> list[Facts]:
    """Of each call that has written to the run, what was called where."""
    calls = [*run.calls, *(entry.get("environment") for entry in evaluations)]
    known = [
        [(name, str(call[name])) for name in ENVIRONMENT if name in call]
        for call in calls
        if isinstance(call, dict)
    ]
    return [facts for n, facts in enumerate(known) if facts and facts not in known[:n]]


def ten_lines(run: Run, best: Path | None) -> str:
    """The code that trains a network on the run's set elsewhere, needing torch alone."""
    file = best.name if best else "distilled_last.pt"
    depth = re.search("D([0-9])$", run.model) if run.model in NETWORKS else None
    side = run.settings()["res"] or 32
    blocks = int(depth.group(1)) if depth else max(1, min(3, (side // 4).bit_length() - 1))
    way = (
        "see = lambda x: ((x.flatten(1) - s['zca_mean']) @ s['zca_matrix']).view_as(x)"
        if run.options.zca
        else "see = lambda x: (x - torch.tensor(s['mean']).view(-1, 1, 1)) / "
        "torch.tensor(s['std']).view(-1, 1, 1)"
    )
    deep = "low" in ((run.data or {}).get("pixels") or {})
    scale = "(value - low) / (high - low) of s['data']['pixels']" if deep else "0 to 1"
    return f"""\
import torch; from torch import nn
s = torch.load("{file}", weights_only=True)
images, labels, classes = s["images"], s["labels"], len(s["class_names"])
block = lambda: [nn.LazyConv2d(128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(), nn.AvgPool2d(2)]
net = nn.Sequential(*(layer for _ in range({blocks}) for layer in block()), nn.Flatten(), nn.LazyLinear(classes))
net(images[:1]); opt = torch.optim.SGD(net.parameters(), lr=s["syn_lr"], momentum=0.9, weight_decay=5e-4)
for batch in (b for epoch in range(300) for b in torch.randperm(len(labels)).split(256)):
    opt.zero_grad(); nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward(); opt.step()
{way}
answer = lambda pictures: net(see(pictures)).argmax(1)  # of pictures (N, C, H, W), {scale}
"""  # noqa: E501
