"""eval.py keeps what it has trained: after any end, the same call trains only what is missing."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import forking
import pytest
import torch
from short_runs import digits_set

import eval as script
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import Split, load_dataset
from utils.data.real_images import random_real_images
from utils.measure import protocol as evaluation
from utils.measure import record as eval_record
from utils.measure.protocol import Accuracies, Measured
from utils.measure.record import EvalRecord, Evaluation

ROOT = Path(__file__).parent.parent
SETTINGS = "--model MLP --epoch_eval_train 3 --precision fp64".split()


@pytest.fixture(scope="module")
def distilled():
    data = load_dataset("digits")
    return digits_set(
        data,
        random_real_images(data, 1, stream(0, "test")),
        model="MLP",
        set="raw",
        config={"batch_train": 256},
    )


@pytest.fixture
def argv(distilled, tmp_path):
    """The call of eval.py on a set in `tmp_path`, by four networks."""
    distilled.save(tmp_path / "distilled_x.pt", include_whitening=True)
    return ["--distilled", str(tmp_path / "distilled_x.pt"), *SETTINGS, "--num_eval", "4"]


@pytest.fixture(scope="module")
def uninterrupted(distilled, tmp_path_factory):
    """What eval.json holds after four networks on the set and on random images, without a break."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    distilled.save(folder / "distilled_x.pt", include_whitening=True)
    path = folder / "distilled_x.pt"
    script.main(["--distilled", str(path), *SETTINGS, "--num_eval", "4", "--random"])
    entries = results(folder)
    assert [len(set(entry["accs"])) > 1 for entry in entries] == [True, True]
    return entries


class Crash(BaseException):
    """As a signal does, it ends eval.py wherever that is."""


@pytest.fixture
def trained(monkeypatch):
    """The rounds of networks that are trained; `crash_at` is the number of the one that fails."""
    train = evaluation._train_networks

    class Rounds(list):
        crash_at = None

    rounds = Rounds()

    def count(recipe, numbers, *arguments):
        if len(rounds) == rounds.crash_at:
            raise Crash
        rounds.append(list(numbers))
        return train(recipe, numbers, *arguments)

    monkeypatch.setattr(evaluation, "_train_networks", count)
    return rounds


def results(folder):
    """eval.json without what it was made with and from."""
    entries = json.loads((folder / "eval.json").read_text())
    made = ("environment", "data", "seconds")
    return [{k: v for k, v in entry.items() if k not in made} for entry in entries]


def files(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_after_a_crash_only_what_is_missing_is_trained(
    argv, trained, uninterrupted, tmp_path, at_once
):
    argv = [*argv, "--random", "--eval_at_once", str(at_once)]
    rounds = {1: [[0], [1], [2], [3]], 2: [[0, 1], [2, 3]], 3: [[0, 1, 2], [3]]}[at_once]
    for crash_at in range(1, 2 * len(rounds)):
        trained.crash_at = crash_at
        with pytest.raises(Crash):
            script.main(argv)
        whole, begun = divmod(crash_at, len(rounds))
        assert ("eval.json" in files(tmp_path)) == bool(whole)
        assert ("eval_unfinished.json" in files(tmp_path)) == bool(begun)
    trained.crash_at = None
    assert script.main(argv) == 0
    assert trained == 2 * rounds
    assert results(tmp_path) == uninterrupted
    assert files(tmp_path) == {"distilled_x.pt", "eval.json"}


def test_the_table_says_what_was_recorded_before(argv, trained, capsys):
    trained.crash_at = 3
    with pytest.raises(Crash):
        script.main(argv)
    trained.crash_at = None
    ends = []
    for _ in range(2):
        capsys.readouterr()
        script.main(argv)
        ends += re.findall(r"\(n=4\)(.*)\n", capsys.readouterr().out)
    assert ends == ["  (3 of them recorded before)", "  (recorded before)"]


def test_more_networks_are_trained_on_top_of_a_recorded_evaluation(
    argv, trained, uninterrupted, tmp_path
):
    script.main([*argv, "--random", "--num_eval", "3"])
    trained.clear()
    script.main([*argv, "--random"])
    assert trained == [[3], [3]]
    assert results(tmp_path)[2:] == uninterrupted
    trained.clear()
    script.main([*argv, "--num_eval", "2"])
    assert trained == []
    assert results(tmp_path)[4]["accs"] == uninterrupted[0]["accs"][:2]


def test_networks_of_a_call_that_broke_off_count_in_one_with_more(argv, trained, tmp_path):
    trained.crash_at = 2
    with pytest.raises(Crash):
        script.main([*argv, "--random", "--num_eval", "3"])
    trained.crash_at = None
    script.main([*argv, "--random"])
    assert trained == [[0], [1], [2], [3], [0], [1], [2], [3]]
    assert files(tmp_path) == {"distilled_x.pt", "eval.json"}


def test_networks_of_another_evaluation_do_not_count(argv, trained):
    trained.crash_at = 5  # the set's four and one on random images
    with pytest.raises(Crash):
        script.main([*argv, "--random"])
    trained.crash_at = None
    everyone = [[0], [1], [2], [3]]
    for other, expected in {
        "--seed 1": 2 * everyone,
        "--epoch_eval_train 2": 2 * everyone,
        "--batch_train 5": 2 * everyone,
        "--precision fp32": 2 * everyone,
        "--no_dsa": 2 * everyone,
        "--model LeNet": 2 * everyone,
        "--lr_real 0.1": everyone,
    }.items():
        trained.clear()
        script.main([*argv, "--random", *other.split()])
        assert trained == expected, other


def test_no_dsa_is_as_after_a_distillation_without(argv, distilled, uninterrupted, tmp_path):
    script.main([*argv, "--no_dsa"])
    (entry,) = results(tmp_path)
    assert entry["dsa"] is None
    assert entry["accs"] != uninterrupted[0]["accs"]
    plain = tmp_path / "plain"
    plain.mkdir()
    without = replace(distilled, config={**distilled.config, "dsa": False})
    without.save(plain / "distilled_x.pt", include_whitening=True)
    script.main([argv[0], str(plain / "distilled_x.pt"), *argv[2:]])
    assert results(plain)[0]["accs"] == entry["accs"]


def test_a_break_between_the_two_files_loses_and_doubles_nothing(
    argv, trained, uninterrupted, tmp_path, monkeypatch
):
    """Whichever of the writes of a call it comes before."""
    write, unlink = eval_record._write, Path.unlink
    left = 0

    def breaks(function):
        def instead(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return function(*arguments, **keywords)

        return instead

    monkeypatch.setattr(eval_record, "_write", breaks(write))
    unfinished = tmp_path / "eval_unfinished.json"
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda path, **k: (breaks(unlink) if path == unfinished else unlink)(path, **k),
    )
    for _ in range(10):
        left = 1
        try:
            script.main(argv)
            break
        except Crash:
            pass
    assert trained == [[0], [1], [1], [2], [2], [3], [3]]
    assert results(tmp_path) == uninterrupted[:1]
    assert files(tmp_path) == {"distilled_x.pt", "eval.json"}


def test_a_full_disk_is_one_line_and_costs_one_network(
    argv, trained, uninterrupted, tmp_path, monkeypatch
):
    write = eval_record.write_text

    def full(text, path):
        if len(trained) > 2:
            raise UserError(f"cannot write {path}: No space left on device")
        write(text, path)

    monkeypatch.setattr(eval_record, "write_text", full)
    with pytest.raises(UserError, match=r"eval_unfinished\.json: No space left on device"):
        script.main(argv)
    monkeypatch.setattr(eval_record, "write_text", write)
    trained.clear()
    script.main(argv)
    assert trained == [[2], [3]]
    assert results(tmp_path) == uninterrupted[:1]


def whole_entry(**changes):
    entry = {"trained_on": "x", "model": "MLP", "acc_mean": 0.5, "acc_std": 0.5, "num_eval": 2}
    entry |= {"accs": [0.0, 1.0], **changes}
    return json.dumps([{key: value for key, value in entry.items() if value is not ...}]).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\xff",
        whole_entry()[:-20],
        b"[" * 100_000,
        b"{}",
        b"[1]",
        whole_entry(accs="many"),
        whole_entry(accs=[0.5, None]),
        whole_entry(accs=[0.5, 50.0]),
        whole_entry(accs=[0.5, float("nan")]),
        whole_entry(accs=[], num_eval=0),
        whole_entry(accs=[0.5]),
        whole_entry(acc_mean=...),
        whole_entry(acc_std="0.1"),
        whole_entry(model=["MLP"]),
        whole_entry(num_eval=...),
    ],
)
def test_a_damaged_record_is_one_line_before_any_work(argv, tmp_path, monkeypatch, content):
    monkeypatch.setattr(script, "find_dataset", None)
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(UserError, match=r"eval\.json cannot be read .*mend it, or move") as error:
        script.main(argv)
    assert "\n" not in str(error.value)
    assert (tmp_path / "eval.json").read_bytes() == content
    assert files(tmp_path) == {"distilled_x.pt", "eval.json"}


def test_entries_of_others_stay_in_the_record(argv, tmp_path):
    (tmp_path / "eval.json").write_bytes(whole_entry(comment="by hand"))
    script.main(argv)
    assert results(tmp_path)[0]["comment"] == "by hand"
    assert len(results(tmp_path)) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\xff", b'[{"network": 0', b"{}", b"[1]", b'[{"network": 0, "acc": "high"}]'],
)
def test_damaged_unfinished_networks_are_moved_aside(
    argv, uninterrupted, tmp_path, capsys, content
):
    (tmp_path / "eval_unfinished.json").write_bytes(content)
    script.main(argv)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert "eval_unfinished.json is damaged" in line
    assert results(tmp_path) == uninterrupted[:1]
    assert (tmp_path / "eval_unfinished.json.damaged").read_bytes() == content
    assert "eval_unfinished.json" not in files(tmp_path)


def test_what_several_record_at_once_is_all_there(tmp_path):
    def record(name):
        mine = EvalRecord(tmp_path)
        for seed in range(4):
            settings = {"trained_on": name, "model": "MLP", "seed": seed}
            asked = Evaluation(settings, lambda networks: "same", num_eval=2)
            mine.keep(asked, {0: Measured(0.25)})
            mine.keep(asked, {1: Measured(0.75)})
            assert mine.networks(asked) == {0: Measured(0.25), 1: Measured(0.75)}
            if seed % 2:
                mine.add(asked, Accuracies((0.25, 0.75)))
                mine.add(asked, Accuracies((0.25, 0.75)))

    names = [f"set {n}" for n in range(6)]
    threads = [threading.Thread(target=record, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = sorted((entry["trained_on"], entry["seed"]) for entry in results(tmp_path))
    assert whole == [(name, seed) for name in names for seed in (1, 3)]
    unfinished = json.loads((tmp_path / "eval_unfinished.json").read_text())
    networks = sorted(
        (entry["trained_on"], entry["seed"], entry["network"]) for entry in unfinished
    )
    assert networks == [(name, seed, k) for name in names for seed in (0, 2) for k in (0, 1)]


def test_accuracies_by_class_are_recorded_and_printed_on_demand(argv, tmp_path, capsys):
    script.main(argv)
    assert "\n  7   " not in capsys.readouterr().out
    (entry,) = results(tmp_path)
    test_labels = load_dataset("digits").test.labels
    counts = test_labels.bincount() / len(test_labels)
    for acc, by_class in zip(entry["accs"], entry["accs_by_class"], strict=True):
        assert sum(counts * torch.tensor(by_class)).item() == pytest.approx(acc)
    columns = zip(*entry["accs_by_class"], strict=True)
    assert entry["acc_by_class"] == pytest.approx([sum(each) / len(each) for each in columns])
    script.main([*argv, "--by_class"])
    out = capsys.readouterr().out
    assert "(recorded before)" in out
    assert f"  7 {100 * entry['acc_by_class'][7]:44.2f}%" in out


def test_records_from_before_are_read_and_measured_by_class_where_that_is_asked(
    argv, uninterrupted, trained, tmp_path
):
    names = ("acc_by_class", "accs_by_class", "confusion")
    before = [{k: v for k, v in e.items() if k not in names} for e in uninterrupted[:1]]
    (tmp_path / "eval.json").write_text(json.dumps(before))
    script.main(argv)
    assert trained == [] and results(tmp_path) == before
    script.main([*argv, "--by_class"])
    assert trained != [] and results(tmp_path) == uninterrupted[:1]


def test_a_class_without_test_images_has_no_accuracy():
    test = Split(torch.zeros(3, 1, 8, 8), torch.tensor([0, 2, 2]))

    class Says2(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(len(images), 4)

    measured = evaluation.measure(Says2(), test, 4)
    confusion = [[0, 0, 1, 0], [0] * 4, [0, 0, 2, 0], [0] * 4]
    assert measured == Measured(2 / 3, (0.0, None, 1.0, None), confusion)
    several = evaluation.gathered([measured, measured])
    assert [each and each.mean for each in several.of_classes] == [0.0, None, 1.0, None]
    assert evaluation.gathered([measured, Measured(0.5)]).by_class == ()


def test_eval_mode_m_measures_what_fits_and_names_the_rest(argv, tmp_path, capsys):
    argv = [*argv[:2], "--num_eval", "1", "--epoch_eval_train", "1"]
    script.main([*argv, "--eval_mode", "M"])
    out = capsys.readouterr().out
    assert "--eval_mode M: ResNet18 needs 9x9 pixels, the set has 8: left out" in out
    assert "--eval_mode M: VGG11 needs 32x32 pixels, the set has 8: left out" in out
    assert [entry["model"] for entry in results(tmp_path)] == ["ConvNet", "AlexNet"]
    with pytest.raises(UserError, match="VGG11 needs 32x32 pixels: name others by --model") as no:
        script.main([*argv, "--model", "VGG11"])
    assert "--res" not in str(no.value)  # eval.py has no such flag


# eval.py, but that a process fails in its third round of networks.
FAILS = """
import runpy, sys
root, *sys.argv = sys.argv[1:]
sys.path.insert(0, root)
from utils.measure import protocol as evaluation
train, calls = evaluation._train_networks, []
def fails(*arguments):
    calls.append(1)
    if len(calls) > 2:
        raise RuntimeError
    return train(*arguments)
evaluation._train_networks = fails
runpy.run_path(f"{root}/eval.py", run_name="__main__")
"""


def test_the_networks_of_all_processes_are_kept(argv, trained, uninterrupted, tmp_path):
    argv = [*argv, "--num_eval", "6"]
    (tmp_path / "failing_eval.py").write_text(FAILS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(tmp_path / "failing_eval.py"), str(ROOT), "eval.py", *argv]
    environment = forking.environment()
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert len(json.loads((tmp_path / "eval_unfinished.json").read_text())) == 4
    assert script.main(argv) == 0
    assert trained == [[4], [5]]
    assert results(tmp_path)[0]["accs"][:4] == uninterrupted[0]["accs"]


def test_the_confusion_counts_the_answers_of_all_networks(uninterrupted):
    for entry in uninterrupted:
        rows = entry["confusion"]
        assert len(rows) == 10 and all(len(row) == 10 for row in rows)
        right = sum(row[label] for label, row in enumerate(rows))
        assert right / sum(map(sum, rows)) == pytest.approx(entry["acc_mean"])
        tested = load_dataset("digits").test.labels.bincount()
        assert [sum(row) for row in rows] == [4 * count for count in tested.tolist()]


def test_what_is_no_confusion_is_left_out_of_the_sum(argv, trained, tmp_path):
    trained.crash_at = 2
    with pytest.raises(Crash):
        script.main(argv)
    trained.crash_at = None
    unfinished = tmp_path / "eval_unfinished.json"
    begun = json.loads(unfinished.read_text())
    begun[0]["confusion"] = [[-1]]
    unfinished.write_text(json.dumps(begun))
    script.main(argv)
    (entry,) = results(tmp_path)
    assert sum(map(sum, entry["confusion"])) == 3 * 360
