"""Histories: from reports to their file and back, and those of others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.grokking.history import FILE, History, Source
from hrm_ray.grokking.read import read_run
from hrm_ray.grokking.verdict import judge
from tests.toy import toy_config

REPORTS = [
    {"global_step": 5, "epoch": 0.5, "train/lm_loss": 3.0, "train/exact_accuracy": 0.2},
    {"global_step": 10, "epoch": 1.0, "train/lm_loss": 2.0, "train/exact_accuracy": 0.4},
    {"global_step": 10, "epoch": 1.0, "eval/exact_accuracy": 0.1, "eval/loss": 4.0},
    {"global_step": 20, "epoch": 2.0, "train/lm_loss": 1.0, "train/exact_accuracy": 0.9},
    {"global_step": 20, "epoch": 2.0, "eval/exact_accuracy": 0.3, "eval/loss": 5.0},
]
NORMS = {"norm/embedding": 3.0, "norm/blocks": 4.0, "norm/output": 5.0}


def test_of_reports_an_evaluation_is_a_row():
    made = History.of_reports(REPORTS)
    assert (made.steps.tolist(), made.epochs.tolist()) == ([10, 20], [1, 2])
    assert {name: made[name].tolist() for name in made.columns} == {
        "train_loss": [2.0, 1.0],
        "train_acc": [0.4, 0.9],
        "test_loss": [4.0, 5.0],
        "test_acc": [0.1, 0.3],
    }
    evaluated = {"eval_train/exact_accuracy": 0.5, "eval_train/loss": 1.5}
    more = History.of_reports([report | evaluated | NORMS for report in REPORTS])
    assert more["train_acc"].tolist() == [0.5, 0.5] and more["train_loss"].tolist() == [1.5, 1.5]
    assert more["last_layer_norm"].tolist() == more["output_norm"].tolist() == [5, 5]


def test_the_file_has_the_layout_of_the_replications(tmp_path):
    made = History.of_reports([report | NORMS for report in REPORTS[1:]])
    source = Source(0.01, 47, 9362, 0.0)
    (tmp_path / FILE).write_bytes(made.render(judge(made, source).summary()))
    content = json.loads((tmp_path / FILE).read_bytes())
    norms = ["embedding_norm", "transformer_norm", "output_norm", "last_layer_norm"]
    curves = ["train_loss", "train_acc", "test_loss", "test_acc"]
    assert list(content) == ["epoch", *curves, *norms, "step", "grokking_summary"]
    assert all(len(content[name]) == 2 for name in ("epoch", *curves, *norms, "step"))
    assert content["grokking_summary"]["outcome"] == "did not learn" or content["grokking_summary"]["verdict"]
    again = read_run(str(tmp_path / FILE))
    assert again.source == source and again.history.clock == "step"
    assert again.history.render({}) == made.render({})


def test_what_is_not_known_is_null(tmp_path):
    made = History.of_reports([{"global_step": 1, "eval/exact_accuracy": 0.0}])
    (tmp_path / FILE).write_bytes(made.render({}))
    content = json.loads((tmp_path / FILE).read_text())
    assert content["train_acc"] == content["test_loss"] == content["epoch"] == [None]
    assert np.isnan(read_run(str(tmp_path)).history["train_acc"]).all()


def test_what_is_not_finite_is_null():
    made = History.of_reports([{"global_step": 1, "eval/exact_accuracy": 0.0, "eval/loss": np.inf}])
    content = json.loads(made.render({}), parse_constant=pytest.fail)
    assert content["test_loss"] == [None]


# Our runs


def our_run(folder, source: Source, reports=REPORTS):
    made = History.of_reports(reports)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    (folder / FILE).write_bytes(made.render(judge(made, source).summary()))
    return folder


def test_what_a_run_has_said_itself_is_not_read_from_its_data_set(tmp_path, monkeypatch):
    def opened(path):
        raise AssertionError("opened")

    monkeypatch.setattr("hrm_ray.grokking.read.open_dataset", opened)
    source = Source(0.01, 47, 9362, 0.0, 5, finished=False)
    folder = our_run(tmp_path, source)
    (folder / "config.yaml").write_text("data_path: data\n")
    assert read_run(str(folder)).source == source


def test_before_a_run_has_ended_its_data_set_says_it(tmp_path, monkeypatch):
    dataset = SimpleNamespace(
        task=SimpleNamespace(chance=0.2, options={}), splits={"train": SimpleNamespace(num_examples=25)}
    )
    monkeypatch.setattr("hrm_ray.grokking.read.open_dataset", lambda path: dataset)
    folder = our_run(tmp_path, Source())
    (folder / FILE).unlink()
    config = TrainConfig(**toy_config("data", tmp_path))
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert read_run(str(folder)).source == Source(0.2, 25, 0, config.weight_decay, finished=False)


def test_ours_are_never_divided(tmp_path):
    folder = our_run(tmp_path, Source())
    for path in (folder, folder / FILE):
        assert read_run(str(path), percent=True).history["test_acc"].tolist() == [0.1, 0.3]


def test_a_run_without_validation_has_nothing_to_draw(tmp_path):
    folder = our_run(tmp_path, Source(1 / 97, 9409, 0), REPORTS[:1])
    with pytest.raises(UserError, match="this run has no validation equations"):
        read_run(str(folder))


# Those of others


def theirs(tmp_path, **values):
    lists = {
        "epoch": [0, 100, 200],
        "train_loss": [3, 1, 0.1],
        "train_acc": [0.1, 1.0, 1.0],
        "test_loss": [4, 5, 1],
        "test_acc": [0.01, 0.02, 0.995],
    }
    folder = tmp_path / "03_nanda_2023" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(lists | values))
    return folder.parent


def test_a_history_of_others(tmp_path):
    summary = {"grokked": True, "finished": 1}
    run = read_run(str(theirs(tmp_path, rqi=[1, 2, 3], grokking_summary=summary)), chance=1 / 113)
    assert run.name == "03_nanda_2023" and run.source == Source(chance=1 / 113)
    assert run.history.clock == "epoch" and run.history["test_acc"].tolist() == [0.01, 0.02, 0.995]
    assert "epoch 200" in judge(run.history, run.source).text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"test_acc": [1.0, 2.0, 99.5]}, "holds an accuracy of 99.5, and .* fractions; add percent=true"),
        ({"test_acc": [1.0, 2.0, 101]}, "an accuracy of 101, which is no percent; leave"),
        ({"test_acc": [1.0, 2.0, -1]}, "an accuracy of -1, below 0"),
        ({"test_acc": [0.5]}, "its lists are not of one length"),
        ({"test_acc": [0.5, "x", 0.5]}, "is no history of a run: not all are numbers"),
        ({"test_acc": None}, "it has no list test_acc"),
        ({"epoch": [3, 2, 1]}, "its epochs do not rise"),
        ({"epoch": [3, 4, 10**40]}, "or are no numbers of epochs"),
        ({"epoch": [3, 4, 10**400]}, "is no history of a run: int too large"),
    ],
)
def test_what_is_wrong_with_a_history(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        read_run(str(theirs(tmp_path, **values)))


def test_percent_is_divided_if_it_is_said(tmp_path):
    folder = theirs(tmp_path, train_acc=[10, 100, 100], test_acc=[0.54, 0.6, 0.67])
    run = read_run(str(folder), percent=True)
    assert run.history["train_acc"].tolist() == [0.1, 1.0, 1.0]
    assert run.history["test_acc"].tolist() == [0.54 / 100, 0.6 / 100, 0.67 / 100]


def test_fractions_are_not_divided(tmp_path):
    with pytest.raises(UserError, match="no accuracy is above 1, so they are hardly in percent; leave"):
        read_run(str(theirs(tmp_path)), percent=True)


def metrics_csv(tmp_path, num_train: int, num_test: int, right: list[int]):
    """As Lightning's logger writes it: a row for each call, empty where it has nothing to say; float32, in percent."""
    lines = ["epoch,full_train_acc,learning_rate,step,train_accuracy,train_loss,val_accuracy,val_loss"]
    for row, count in enumerate(right):
        train = np.float32(100 * min(num_train, 3 * row) / num_train)
        lines.append(f"{row},,0.001,{10 * row},{train},{2.0 - row / 50},,")
        lines.append(f"{row},{train},,{10 * row},,,{np.float32(100 * count / num_test)},{4.0 + row}")
        lines.append(f"{row},,,{10 * row},,,nan,")
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "metrics.csv"


def test_metrics_of_openai_grok(tmp_path):
    """Of the run with 47 equations, which the file does not name: its accuracies are whole numbers of them."""
    right = np.random.default_rng(0).integers(50, 98, 40).tolist()
    run = read_run(str(metrics_csv(tmp_path, 47, 9362, right)))
    assert run.source == Source(1 / 97, 47, 9362)
    assert run.history.steps.tolist() == [10 * row for row in range(40)]
    np.testing.assert_allclose(run.history["test_acc"], np.array(right) / 9362, rtol=1e-6)
    np.testing.assert_allclose(run.history["train_loss"], 2 - np.arange(40) / 50)
    verdict = judge(run.history, run.source)
    assert verdict.outcome == "memorised only" and "47 of 9,409 equations" in verdict.text


def test_counts_that_fit_in_several_ways_are_not_known(tmp_path):
    assert read_run(str(metrics_csv(tmp_path, 47, 9362, [0, 9362]))).source == Source()


def test_a_csv_without_a_percent_above_one_is_not_guessed(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,epoch,train_accuracy,val_accuracy\n1,1,0.5,0.2\n2,2,1.0,0.54\n")
    with pytest.raises(UserError, match=r"openai/grok writes them in percent; add percent=false if"):
        read_run(str(file))
    with pytest.raises(UserError, match="they are hardly in percent"):
        read_run(str(file), percent=True)
    assert read_run(str(file), percent=False).history["test_acc"].tolist() == [0.2, 0.54]
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match="it has not the columns step or epoch, and val_accuracy"):
        read_run(str(file))


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such run; give a run folder"):
        read_run(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no metrics.jsonl, training_history.json or metrics.csv"):
        read_run(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "train/loss": 1}\n{"glob')
    with pytest.raises(UserError, match="holds no evaluation yet"):
        read_run(str(tmp_path))
