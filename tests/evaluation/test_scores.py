"""Scores: what each task reports, from one worker and from several."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hrm_ray import api
from hrm_ray.batch import make_batch
from hrm_ray.cli import main
from hrm_ray.config.inference import AS_TRAINED
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.arc.builder import ArcRecipe
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.grid.builder import GridRecipe
from hrm_ray.data.tasks.maze import FREE, PATH
from hrm_ray.data.tasks.maze.builder import MazeRecipe
from hrm_ray.data.tasks.modular.builder import ModularRecipe
from hrm_ray.errors import UserError
from hrm_ray.evaluation.evaluate import evaluate
from hrm_ray.evaluation.held_out import read_held_out
from hrm_ray.evaluation.pass_at_k import pass_at_k
from hrm_ray.evaluation.scores import arc as arc_scores
from hrm_ray.evaluation.scores import check_best_metric, directions, scores_of
from hrm_ray.evaluation.scores.answered import Answered
from hrm_ray.evaluation.scores.arc import PassAtK
from hrm_ray.evaluation.scores.exact import Exact
from hrm_ray.evaluation.scores.maze import Path as PathScore
from hrm_ray.evaluation.votes import Votes
from hrm_ray.models.act import IGNORE, Batch
from hrm_ray.models.inference import Answers
from hrm_ray.training import launch
from hrm_ray.world import World
from tests.toy import toy_config, toy_dataset
from tests.training.processes import start

CPU = torch.device("cpu")


def answers_of(tokens, q_halt=None):
    tokens = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    q = torch.zeros(len(tokens)) if q_halt is None else torch.from_numpy(q_halt)
    one = SimpleNamespace(tokens=tokens, q_halt=q, steps=torch.ones(len(tokens), dtype=torch.int64))
    return Answers(one, one)


def batch_of(rows):
    labels = torch.from_numpy(rows["labels"].astype(np.int64))
    labels[labels == 0] = IGNORE
    ids = torch.from_numpy(rows["puzzle_identifiers"])
    return Batch(torch.from_numpy(rows["inputs"].astype(np.int32)), labels, ids)


@pytest.fixture(scope="module")
def mazes(tmp_path_factory):
    out = tmp_path_factory.mktemp("mazes") / "data"
    recipe = MazeRecipe(source="generator", size=6, num_train=12, num_test=8, unique=False)
    build(recipe, out, show_progress=False)
    return open_dataset(out)


@pytest.fixture(scope="module")
def arc(tmp_path_factory):
    out = tmp_path_factory.mktemp("arc") / "data"
    recipe = ArcRecipe(
        source="tests/golden/arc/source", subsets=("tiny", "tinyeval"), test_subset="tinyeval", num_aug=4
    )
    build(recipe, out, show_progress=False)
    return open_dataset(out)


def test_every_task_has_its_scores(mazes):
    assert set(scores_of("sudoku")) == {Exact, Answered}
    assert set(scores_of("maze")) == {Exact, Answered, PathScore}
    assert "eval/pass@2" in directions("arc") and "eval/pass@2" not in directions("maze")
    check_best_metric("eval/valid_path", mazes)
    with pytest.raises(UserError, match="best_metric=eval/valid_pth is no metric of task maze; did you mean"):
        check_best_metric("eval/valid_pth", mazes)
    with pytest.raises(UserError, match="best_metric=eval/steps is no metric"):  # fewer are better
        check_best_metric("eval/steps", mazes)


def test_paths(mazes):
    rows = mazes.split("test").rows(np.arange(8))
    tokens = rows["labels"].copy()
    tokens[0][tokens[0] == PATH] = FREE  # no path
    tokens[1] = np.where(tokens[1] == FREE, PATH, tokens[1])  # everything is path: valid if all is connected
    wall = np.flatnonzero(rows["inputs"][2] == 1)[0]
    tokens[2][wall] = PATH  # a wall is broken
    batch = batch_of(rows)
    halves = []
    for part in (slice(0, 3), slice(3, 8)):  # two workers
        score = PathScore(mazes, AS_TRAINED, CPU)
        score.add(batch.rows(part), answers_of(tokens[part]))
        halves.append(score.state())
    metrics = PathScore(mazes, AS_TRAINED, CPU).metrics(halves)
    task = mazes.task
    assert metrics["valid_path"] == task.is_solution(rows["inputs"], tokens).mean() < 1
    assert metrics["shortest_path"] == 5 / 8
    assert metrics["free_exact_accuracy"] == 6 / 8  # the broken wall is no free cell
    whole = PathScore(mazes, AS_TRAINED, CPU)
    whole.add(batch, answers_of(tokens))
    assert whole.metrics([whole.state()]) == metrics


def test_votes_of_two_workers_are_those_of_one(arc):
    split = arc.split("test")
    rows = split.rows(np.arange(split.num_examples))
    random = np.random.default_rng(0)
    tokens = np.where(random.random((split.num_examples, 1)) < 0.5, rows["labels"], rows["inputs"])
    q_halt = random.normal(size=split.num_examples).astype(np.float32)
    batch = batch_of(rows)
    states = []
    for part in (slice(0, 11), slice(11, split.num_examples)):
        score = PassAtK(arc, AS_TRAINED, CPU)
        score.add(batch.rows(part), answers_of(tokens[part], q_halt[part]))
        states.append(score.state())
    metrics = PassAtK(arc, AS_TRAINED, CPU).metrics(states)
    held_out = read_held_out(str(arc.root))
    votes = Votes(held_out.names)
    votes.add(rows["inputs"], tokens, rows["puzzle_identifiers"], q_halt)
    assert metrics == pass_at_k(votes, held_out)
    assert 0 < metrics["pass@1"] <= metrics["pass@1000"] == 1.0


FEW = {"batch_size": 8, "num_examples": 20}  # the second worker has fewer


def _evaluating_worker(rank: int, size: int, meeting_point: str, run: str, data: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    metrics, _ = evaluate(api.load(run).model, open_dataset(data), world=World(rank, size, rank), **FEW)
    Path(run, f"{rank}.json").write_text(json.dumps(metrics))
    dist.barrier()
    os._exit(0)


def test_two_workers_evaluate_as_one_does(tmp_path, arc):
    run = tmp_path / "runs/toy"
    config = TrainConfig(**toy_config(arc.path, run.parent, max_steps=1, num_eval_examples=1))
    launch.train(config, show_progress=False)
    start(_evaluating_worker, 2, str(run), str(arc.path))
    one, _ = api.load(run).evaluate(arc.path, **FEW)
    assert one["pass@1000"] >= 0
    assert [json.loads((run / f"{rank}.json").read_text()) for rank in range(2)] == [one, one]


def test_names_are_read_once_a_run(tmp_path, arc, monkeypatch):
    read = []
    monkeypatch.setattr(arc_scores, "read_held_out", lambda path: read.append(path) or read_held_out(path))
    arc_scores._held_out.cache_clear()
    for _ in range(3):  # evaluations, the data set opened before each
        PassAtK(open_dataset(arc.path), AS_TRAINED, CPU)
    assert read == [str(arc.root)]
    build(
        ArcRecipe(**json.loads(json.dumps(arc.manifest.recipe)) | {"seed": 7}),
        tmp_path / "other",
        show_progress=False,
    )
    PassAtK(open_dataset(tmp_path / "other"), AS_TRAINED, CPU)
    assert read == [str(arc.root), str(tmp_path / "other")]


def test_a_run_reports_the_scores_of_its_task_and_is_judged_by_one(tmp_path, mazes):
    values = {"arch": {**toy_config(tmp_path, tmp_path)["arch"], "puzzle_emb_ndim": 0}, "max_steps": 4}
    config = toy_config(mazes.path, tmp_path / "runs", **values, best_metric="eval/valid_path")
    summary, _ = launch.train(TrainConfig(**config), show_progress=False)
    assert {"eval/valid_path", "eval/shortest_path", "eval/exact_accuracy"} <= summary["final"].keys()
    solver = api.load(tmp_path / "runs/toy")
    metrics, _ = solver.evaluate(mazes.path, votes=8, num_examples=2)
    assert metrics.keys() == {name.removeprefix("eval/") for name in directions("maze")} - {"answered"}
    with pytest.raises(UserError, match="votes=9: a maze has only 8"):
        solver.evaluate(mazes.path, votes=9)
    with pytest.raises(UserError, match="best_metric=eval/valid is no metric of task maze"):
        launch.train(TrainConfig(**config | {"best_metric": "eval/valid"}), show_progress=False)


def test_arc_is_trained_with_moving_grids_evaluated_by_votes_and_blinded(tmp_path, arc):
    out = tmp_path / "data"
    recipe = ArcRecipe(**json.loads(json.dumps(arc.manifest.recipe)) | {"translate": "visit"})
    build(recipe, out, show_progress=False)
    config = TrainConfig(**toy_config(out, tmp_path / "runs", max_steps=2, num_eval_examples=20))
    summary, _ = launch.train(config, show_progress=False)
    assert "eval/pass@1" in summary["final"] and "eval/hrm_pass@2" in summary["final"]
    solver = api.load(tmp_path / "runs/toy")
    # Training hardly moved the puzzles' embeddings: make it matter which one is seen.
    solver.model.inner.puzzle_emb.weights.copy_(torch.randn_like(solver.model.inner.puzzle_emb.weights))
    _, told = solver.evaluate(out, save_outputs=["logits", "puzzle_identifiers"], num_examples=9)
    _, blind = solver.evaluate(out, save_outputs=["logits"], num_examples=9, hides_identifiers=True)
    assert not np.array_equal(told["logits"], blind["logits"])
    assert told["puzzle_identifiers"].min() > 0


def test_what_an_evaluation_of_arc_saves_is_what_votes(tmp_path, arc, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = toy_config(arc.path, tmp_path / "runs", max_steps=1, num_eval_examples=1, global_batch_size=1)
    config = TrainConfig(**small | {"arch": {**small["arch"], "halt_max_steps": 1}})
    launch.train(config, show_progress=False)
    capsys.readouterr()
    outputs = "save_outputs=[inputs,predictions,puzzle_identifiers,q_halt_logits]"
    words = [f"data={arc.path}", outputs, "out=outputs.npz", "submission=of_eval.json", "batch_size=5"]
    assert main(["eval", "runs/toy", *words, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    arrays, test = np.load("outputs.npz"), arc.split("test")
    assert arrays["inputs"].dtype == arrays["predictions"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["inputs"], test.rows(np.arange(test.num_examples))["inputs"])
    assert main(["vote", "outputs.npz", f"data={arc.path}", "submission=of_vote.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).items() <= metrics.items()
    assert Path("of_eval.json").read_bytes() == Path("of_vote.json").read_bytes()


def test_solving_examples_of_a_data_set_tells_the_model_which_puzzle_it_is(tmp_path):
    toy_dataset(tmp_path / "data", num_identifiers=5)
    config = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", max_steps=2))
    launch.train(config, show_progress=False)
    solver = api.load(tmp_path / "runs/toy")
    solver.model.inner.puzzle_emb.weights.normal_(std=10)
    puzzles = solver.questions(tmp_path / "data", count=8)
    assert len({puzzle.identifier for puzzle in puzzles}) > 1
    solutions = solver.solve(puzzles)
    _, arrays = solver.evaluate(tmp_path / "data", save_outputs=["predictions"], num_examples=8)
    assert [s.tokens.tolist() for s in solutions] == arrays["predictions"].tolist()
    unknown = solver.solve([puzzle.tokens for puzzle in puzzles])
    assert [s.tokens.tolist() for s in unknown] != arrays["predictions"].tolist()


def test_a_table_leaves_out_puzzles_without_labels_as_an_evaluation_does(tmp_path, monkeypatch):
    toy_dataset(tmp_path / "data")
    config = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", max_steps=2))
    launch.train(config, show_progress=False)
    solver = api.load(tmp_path / "runs/toy")
    _, arrays = solver.evaluate(tmp_path / "data", save_outputs=["predictions"])
    answers = torch.from_numpy(arrays["predictions"].astype(np.int64))

    def labelled(examples, ids, *args, **options):
        """A third has no labels, and a third those that the model gives."""
        batch = make_batch(examples, ids, *args, **options)
        labels = batch.labels.clone()
        labels[ids % 3 == 0] = IGNORE
        labels[ids % 3 == 1] = answers[ids[ids % 3 == 1]]
        return batch._replace(labels=labels)

    for module in ("evaluate", "survey"):
        monkeypatch.setattr(f"hrm_ray.evaluation.{module}.make_batch", labelled)
    metrics, _ = solver.evaluate(tmp_path / "data")
    (row,) = solver.survey(tmp_path / "data")
    assert row["vote/exact_accuracy"] == row["path"] == row["any"] == metrics["exact_accuracy"] == 0.5
    assert row["vote/steps"] == metrics["steps"]


def test_a_visit_moves_both_grids_of_an_example_together(arc):
    split = arc.split("test")  # whose grids lie in the corner
    rows = split.rows(np.arange(20))
    keys = np.random.Philox(key=1).random_raw(20)
    still = arc.task.vary(rows["inputs"], rows["labels"], keys)
    np.testing.assert_array_equal(still[0], rows["inputs"])
    moving = get_task("arc", translate=True)
    inputs, labels = moving.vary(rows["inputs"], rows["labels"], keys)
    again = moving.vary(rows["inputs"][7:8], rows["labels"][7:8], keys[7:8])
    np.testing.assert_array_equal(again[0][0], inputs[7])
    moved = 0
    for i in range(20):
        corners = []
        for before, after in ((rows["inputs"][i], inputs[i]), (rows["labels"][i], labels[i])):
            old, new = (np.argwhere(tokens.reshape(30, 30) > 1) for tokens in (before, after))
            np.testing.assert_array_equal(old - old.min(0), new - new.min(0))
            corners.append(tuple(new.min(0)))
        assert corners[0] == corners[1]
        moved += corners[0] != (0, 0)
    assert moved > 10


def test_a_model_is_not_used_with_the_identifiers_of_another_build(tmp_path, arc):
    """As many identifiers, that mean other copies."""
    recipe = ArcRecipe(**json.loads(json.dumps(arc.manifest.recipe)) | {"seed": 7})
    build(recipe, tmp_path / "other", show_progress=False)
    config = TrainConfig(**toy_config(arc.path, tmp_path / "runs", max_steps=1, num_eval_examples=4))
    launch.train(config, show_progress=False)
    solver = api.load(tmp_path / "runs/toy")
    with pytest.raises(UserError, match="other is another build than the one"):
        solver.evaluate(tmp_path / "other")
    assert solver.evaluate(arc.path, num_examples=4)[0]["accuracy"] >= 0


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (
            {"op": "+", "p": 5},
            {"op": "-", "p": 5},
            r"op is -, the model was trained with \+; give a data set",
        ),
        ("abc/cba", "abd/dba", "alphabet is abd, the model was trained with abc"),
        ("abc/cba", "ab/cc/ba", "height is 3, the model was trained with 2"),
    ],
)
def test_a_model_is_not_used_where_as_many_tokens_mean_something_else(tmp_path, own, other, said):
    def built(name, values):
        if isinstance(values, str):
            (tmp_path / f"{name}.csv").write_text(f"question,answer\n{values},{values[::-1]}\n")
            recipe = GridRecipe(source=str(tmp_path / f"{name}.csv"), num_test=0)
        else:
            recipe = ModularRecipe(**values)
        build(recipe, tmp_path / name, show_progress=False)
        return open_dataset(tmp_path / name)

    config = toy_config(built("own", own).path, tmp_path / "runs", max_steps=1, eval_interval=None)
    launch.train(TrainConfig(**config), show_progress=False)
    solver = api.load(tmp_path / "runs/toy")
    solver.check(built("alike", own))
    with pytest.raises(UserError, match=f"other does not fit .*: {said}"):
        solver.check(built("other", other))


def test_of_some_rows_the_tasks_count_that_were_seen(arc):
    split = arc.split("test")
    rows = split.rows(np.arange(split.num_examples))
    first = json.loads((arc.root / "identifiers.json").read_text())[rows["puzzle_identifiers"][0]]
    num_of_first = len(json.loads((arc.root / "test_puzzles.json").read_text())[first]["test"])
    score = PassAtK(arc, AS_TRAINED, CPU)
    score.is_whole = False
    part = slice(0, num_of_first)
    score.add(batch_of(rows).rows(part), answers_of(rows["labels"][part], np.zeros(num_of_first)))
    assert score.metrics([score.state()])["pass@1"] == 1.0


def test_what_is_not_known_of_a_data_set_is_no_best_metric(arc, tmp_path):
    check_best_metric("eval/pass@2", arc)
    shutil.copytree(arc.root, tmp_path / "data")
    (tmp_path / "data" / "test_puzzles.json").unlink()
    without = SimpleNamespace(task=arc.task, root=tmp_path / "data", path="data")
    with pytest.raises(UserError, match="best_metric=eval/pass@2 is not known for data"):
        check_best_metric("eval/pass@2", without)


def test_hiding_identifiers_from_a_model_without_any_is_refused(tmp_path, mazes):
    arch = toy_config(tmp_path, tmp_path)["arch"] | {"puzzle_emb_ndim": 0}
    config = TrainConfig(**toy_config(mazes.path, tmp_path / "runs", arch=arch, max_steps=1))
    launch.train(config, show_progress=False)
    with pytest.raises(UserError, match="ablate=puzzle_id: this model has no embedding of puzzles"):
        api.load(tmp_path / "runs/toy").evaluate(mazes.path, hides_identifiers=True)
