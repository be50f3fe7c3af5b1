"""scoreboard.md, .csv and .html."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Template

from scripts.report.markdown import markdown
from utils.core.files import write_text
from utils.measure.protocol import mean_and_std

TITLE = "Scoreboard"
ABOUT = """
Test accuracies in percent, mean ± population standard deviation over n networks. *augmented* says
whether they trained with DSA. Lines with soft labels, learned steps or kernel regression use more
than images and classes, and compare with one another alone. *equal bytes* are as many random real
images, a byte a value, as fit into the bytes of the set. *chosen by* says on what the iteration of
a set was chosen: test favours it.
"""
ABOUT_SCORES = """
The scores of DD-Ranking (arXiv 2505.13300), in percent, of images with their classes alone. HLR is
what the set lacks of the whole training set (less is better), IOR what it brings over as many
random real images; LRS joins both, ARS the IOR with and without augmentation.
"""
PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; }
</style></head><body>
<h1>{{ title }}</h1>
{% for about, table in parts %}<p>{{ about }}</p>
{{ table | safe }}
{% endfor %}{% if problems %}<h2>Left out</h2><ul>
{% for problem in problems %}<li>{{ problem }}</li>{% endfor %}</ul>
{% endif %}<p>Made by <code>{{ command }}</code></p></body></html>
""",
    autoescape=True,
)


def write(
    out: Path,
    rows: pd.DataFrame,
    scores: pd.DataFrame,
    problems: Sequence[str],
    argv: Sequence[str],
) -> None:
    """Write the three files into the folder `out`."""
    command = shlex.join(["python", "-m", "scripts.scoreboard", *argv])
    shown = [(ABOUT, _as_text(rows)), (ABOUT_SCORES, scores.round(2).fillna(""))]
    parts = [f"# {TITLE}\n"]
    for about, frame in shown:
        parts += [about, markdown([*frame.columns], frame.itertuples(index=False))]
    if problems:
        parts += ["\n## Left out\n", *(f"- {problem}" for problem in problems), ""]
    parts += ["\n## How it was made\n", f"```bash\n{command}\n```\n"]
    write_text("\n".join(parts), out / "scoreboard.md")
    write_text(rows.to_csv(index=False), out / "scoreboard.csv")
    tables = [(about, frame.to_html(index=False, border=0)) for about, frame in shown]
    page = PAGE.render(title=TITLE, parts=tables, problems=problems, command=command)
    write_text(page, out / "scoreboard.html")


def _as_text(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as they are read: mean and deviation together, best first within a set."""
    spread = zip(rows["accuracy"], rows["std"], rows["n"], strict=True)
    text = rows.assign(
        accuracy=[mean_and_std(*each).strip() for each in spread],
        augmented=rows["augmented"].map({True: "yes", False: "no"}),
    )
    return text.drop(columns="std").fillna("")
