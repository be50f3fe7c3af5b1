"""The page about one run, report.html: what it says and shows, and that a browser opens it."""

import base64
import io
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from made_runs import diverged, entry, evaluation, steps, steps_without_lengths, write_run
from PIL import Image

from scripts.report import __main__ as report
from scripts.report import pictures
from scripts.report.page import PAGE, ten_lines, write_page
from scripts.report.pictures import gallery
from scripts.results.runs import read_begun
from utils.core.errors import UserError
from utils.core.pictures import save_grid
from utils.data.distilled import SyntheticSet
from utils.data.normalisation import Normalisation
from utils.methods.registry import foreign_flags

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def save_set(
    folder, tag, *, values, classes=2, ipc=1, iteration=None, normalisation=None, sheet=True
):
    """A set whose images are all `values` (C, H, W), with its picture."""
    channels, side, _ = values.shape
    plain = Normalisation((0.0,) * channels, (1.0,) * channels)
    config = {"data_path": "data", "res": side, "dsa": True, "dsa_strategy": "flip"}
    made = SyntheticSet(
        images=values.expand(classes * ipc, *values.shape).clone(),
        labels=torch.arange(classes).repeat_interleave(ipc),
        syn_lr=0.02,
        dataset="folder",
        subset=None,
        model="ConvNetD1",
        ipc=ipc,
        class_names=tuple(f"<b>{n}</b>" for n in range(classes)),
        normalisation=normalisation or plain,
        iteration=int(tag) if iteration is None else iteration,
        set="raw",
        config=config | {"batch_train": 256},
    )
    made.save(folder / f"distilled_{tag}.pt", include_whitening=False)
    if sheet and channels in (1, 3):
        save_grid(made.images, folder / f"images_{tag}.png", ipc=ipc)
    return made


def grey(level, *, channels=3, side=8):
    return torch.full((channels, side, side), level)


def shown(folder, **options):
    settings = {"ipc": 1, "side": 8, "class_names": ()} | options
    return gallery(folder, **settings)


def pixels(uri):
    """The picture in a data URI."""
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def text_of(path):
    """The page without its scripts."""
    page = write_page(path, path).read_text()
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """A made run of two classes, evaluated, with three sets."""
    records = [*steps([3, 4, 5, 4], [3, 3, 4, 4]), evaluation(2, 0.5, 0.75, model="ConvNetD1")]
    measured = entry(0.75, 0.5, model="ConvNetD1", confusion=[[6, 2], [3, 5]])
    others = [entry(0.5, 0.5, model="ConvNetD1", trained_on="random real", tag="x")]
    path = write_run(
        tmp_path / "run",
        records,
        dataset="folder",
        data_path="/somewhere/<i>pets",
        res=8,
        model="ConvNetD1",
        data={"classes": 2, "class_names": ["<b>0</b>", "<b>1</b>"]},
        evaluations=[measured, *others],
    )
    for tag, level in (("0", 0.0), ("2", 0.5), ("4", 1.0)):
        save_set(path, tag, values=grey(level))
    save_set(path, "best", values=grey(0.5), iteration=2)
    save_set(path, "last", values=grey(1.0), iteration=4)
    return path


def test_the_page_says_what_was_measured_and_escapes_names(run):
    text = text_of(run)
    for part in (
        "ATT on &lt;i&gt;pets at 8 pixels, 1 image per class",
        "finished: 4 steps",
        "62.50 % ± 12.50 %",
        "random real",
        "75 % recognised",
        "62 % recognised",
        "16 answers of 2 networks",
        "4 in 4 s, 1 s each",
        "10 of 4 epochs",
    ):
        assert part in text, part
    assert "<b>0" not in text and "&lt;b&gt;0&lt;/b&gt;" in text


def test_sets_are_shown_by_iteration_and_begin_with_the_best(run):
    found = shown(run)
    names = ["iteration 0", "iteration 2 (best)", "iteration 4 (last)"]
    assert [frame.name for frame in found.frames] == names
    assert found.start == 1
    assert found.best == run / "distilled_best.pt"
    levels = [pixels(frame.strips[1]).getpixel((3, 3)) for frame in found.frames]
    assert levels == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_what_is_missing_is_said(tmp_path):
    text = text_of(write_run(tmp_path / "begun", [], Iteration=5))
    for part in (
        "not finished: 0 of 5 steps so far",
        "Nothing has been measured yet",
        "No set is saved yet",
        "No step has been logged yet",
        "No iteration was evaluated",
        "No confusion is recorded",
    ):
        assert part in text, part


def test_runs_of_other_methods_and_ends(tmp_path):
    how = {"experts": None, "method": "dm", "drop": foreign_flags("dm")}
    text = text_of(write_run(tmp_path / "dm", steps_without_lengths(3), **how))
    assert "DM on digits" in text and "plot_loss" in text and "plot_length" not in text
    text = text_of(diverged(tmp_path / "ended", after=2))
    assert "ended after 2 of 5 steps, because it diverged: syn_lr became -1" in text


def test_a_damaged_record_is_named_and_the_rest_is_shown(run):
    (run / "eval.json").write_text("{")
    (run / "distilled_2.pt").write_bytes(b"x")  # its picture is there
    (run / "distilled_4.pt").write_bytes(b"x")
    (run / "images_4.png").write_bytes(b"x")
    (run / "distilled_last.pt").unlink()
    (run / "images_last.png").unlink()
    text = text_of(run)
    assert "eval.json cannot be read as a list of evaluations" in text
    assert "The set of iteration 4 can be read neither as a set nor as a picture." in text
    assert [frame.iteration for frame in shown(run).frames] == [0, 2]


@pytest.mark.parametrize("ipc", [1, 3, 25])
def test_whitened_sets_are_cut_from_their_pictures(tmp_path, ipc):
    made = save_set(
        tmp_path,
        "0",
        values=grey(0.0),
        classes=12,
        ipc=ipc,
        normalisation=Normalisation((0.0,) * 3, (1.0,) * 3, zca=True),
    )
    own = torch.linspace(0, 1, len(made.images)).view(-1, 1, 1, 1).expand_as(made.images)
    save_grid(own, tmp_path / "images_0.png", ipc=ipc)
    (frame,) = shown(tmp_path, ipc=ipc).frames
    step = 8 + pictures.GAP
    for label, strip in enumerate(frame.strips):
        picture = pixels(strip)
        for number in range(min(ipc, pictures.MOST_IMAGES)):
            level = int(own[label * ipc + number, 0, 0, 0] * 255 + 0.5)
            found = picture.getpixel((number * step + 7, 7))
            assert all(abs(value - level) <= 1 for value in found)


@pytest.mark.parametrize(
    ("channels", "mode", "note"),
    [
        (1, "L", ""),
        (2, "L", "Of the 2 channels the first is shown."),
        (3, "RGB", ""),
        (5, "RGB", "Of the 5 channels the first three are shown, as red, green and blue."),
    ],
)
def test_any_number_of_channels(tmp_path, channels, mode, note):
    save_set(tmp_path, "0", values=grey(0.5, channels=channels))
    found = shown(tmp_path)
    assert pixels(found.frames[0].strips[0]).mode == mode
    assert "".join(found.notes) == note


def test_many_classes_and_images_stay_within_bounds_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 2 * 10 * 100 * 8 * 8)
    for tag in range(0, 24, 2):
        save_set(tmp_path, str(tag), values=grey(0.5, side=8), classes=101, ipc=50, sheet=False)
    found = shown(tmp_path, ipc=50)
    strips = [pixels(strip) for frame in found.frames for strip in frame.strips]
    assert sum(strip.width * strip.height for strip in strips) < 1.2 * pictures.MOST_PIXELS
    assert [found.frames[0].iteration, found.frames[-1].iteration] == [0, 22]
    assert len(found.frames) == pictures.MOST_FRAMES
    assert len(found.frames[0].strips) == 100
    assert "10 of 12 saved iterations are shown." in found.notes
    assert "The first 2 of the 50 images of a class are shown." in found.notes
    assert "The first 100 of 101 classes are shown." in found.notes


def test_large_images_are_shown_smaller(tmp_path):
    save_set(tmp_path, "0", values=grey(0.5, side=128))
    found = shown(tmp_path)
    assert pixels(found.frames[0].strips[0]).size == (64, 64)
    assert found.notes == ("Images of 128x128 pixels are shown at 64x64.",)


def test_the_ten_lines_train_on_the_set(run, monkeypatch):
    code = ten_lines(read_begun(run), run / "distilled_best.pt")
    assert len(code.splitlines()) == 10 and code.rstrip().endswith("0 to 1")
    deep = replace(read_begun(run), data={"pixels": {"low": [0], "high": [4095]}})
    assert ten_lines(deep, None).rstrip().endswith("(high - low) of s['data']['pixels']")
    monkeypatch.chdir(run)
    names = {}
    exec(code.replace("range(300)", "range(2)"), names)
    assert names["answer"](torch.rand(5, 3, 8, 8)).shape == (5,)
    assert names["opt"].param_groups[0]["lr"] == 0.02


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"--html {wrong} is no run directory"):
            report.main(["--html", str(wrong)])
    with pytest.raises(UserError, match="leave out x"):
        report.main(["x", "--html", str(tmp_path)])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is here: install Debian's package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def test_a_browser_opens_the_page(browser, run, tmp_path):
    """Without an error and without a request; the slider changes the pictures."""
    out = tmp_path / "elsewhere"
    assert report.main(["--html", str(run), "--out", str(out)]) == 0
    page = browser.new_page(viewport={"width": 390, "height": 844})
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((out / PAGE).as_uri())
    page.wait_for_selector("#plot_loss .main-svg")
    assert page.locator(".js-plotly-plot").count() == 5  # loss, length, rate, accuracy, confusion
    assert page.locator("#shown").inner_text() == "iteration 2 (best)"
    before, after = (page.locator(f"img.{name}").first for name in ("before", "after"))
    assert after.evaluate("image => image.naturalWidth") == 8
    assert before.get_attribute("src") != after.get_attribute("src")
    was = after.get_attribute("src")
    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#shown").inner_text() == "iteration 4 (last)"
    assert after.get_attribute("src") != was
    page.wait_for_function("document.querySelector('img.after').naturalWidth === 8")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    if "SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["SCREENSHOT"], full_page=True)
