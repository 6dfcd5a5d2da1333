"""Whole builds on a real Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data import pipeline
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.sudoku import builder
from hrm_ray.data.tasks.sudoku.builder import SudokuRecipe
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError

pytestmark = pytest.mark.ray

SHARED = Path(__file__).parents[3] / "shared" / "data"
TASK = get_task("sudoku", size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source: train.csv and test.csv of 4x4 puzzles; row r of train is rated r, test repeats train's row 5."""
    root = tmp_path_factory.mktemp("source")
    questions, answers = TASK.generate(1, 0, 80, 7, 100)
    lines = [
        f"web,{TASK.to_text(q)},{TASK.to_text(a)},{r}"
        for r, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    header = "source,question,answer,rating"
    (root / "train.csv").write_text("\n".join([header, *lines[:60]]))
    (root / "test.csv").write_text("\n".join([header, *lines[60:], lines[5]]))
    return root


def recipe(source, **values):
    return SudokuRecipe(source=str(source), size=4, **values)


def run(out, *args, **values):
    return build(recipe(*args, **values), out, show_progress=False)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(out, split):
    part = open_dataset(out).split(split)
    return part.rows(np.arange(part.num_examples))


def texts(tokens):
    return [TASK.to_text(row) for row in tokens]


def test_recipe_4x4(tmp_path, ray_cluster):
    wanted = load_recipe("sudoku_4x4", {"num_train": 700, "num_test": 50, "num_aug": 0})
    manifest = build(wanted, tmp_path / "data", show_progress=False)
    train, test = rows(tmp_path / "data", "train"), rows(tmp_path / "data", "test")
    assert len(train["inputs"]) == manifest.splits["train"].num_groups == 700
    everything = np.concatenate([train["inputs"], test["inputs"]])
    assert len(np.unique(everything, axis=0)) == 750
    assert ((everything > 1).sum(axis=1) == 6).all()
    assert (TASK.solve(everything)[1] == 1).all()

    more = build(wanted.model_copy(update={"num_train": 900}), tmp_path / "more", show_progress=False)
    assert more.splits["train"].num_examples == 900
    assert (rows(tmp_path / "more", "test")["inputs"] == test["inputs"]).all()
    assert (rows(tmp_path / "more", "train")["inputs"][:700] == train["inputs"]).all()


def test_augmented_groups_and_no_training_example_in_test(tmp_path, folder, ray_cluster):
    """4x4 has few puzzles, so with many copies some fall on test puzzles: they are dropped, and counted."""
    manifest = run(tmp_path / "data", folder, num_aug=500, rows_per_shard=4000)
    split = open_dataset(tmp_path / "data").split("train")
    train, test = rows(tmp_path / "data", "train"), rows(tmp_path / "data", "test")
    assert not set(texts(train["inputs"])) & set(texts(test["inputs"]))
    assert manifest.report["train_puzzles_dropped_in_test"] == 1
    dropped = manifest.report["train_augmentations_dropped_in_test"]
    assert dropped > 0 and split.num_examples == 59 * 501 - dropped
    assert split.num_groups == 59 and split.num_puzzles == split.num_examples
    assert len(manifest.splits["train"].shards) == 8

    firsts = split.puzzle_starts[split.group_starts[:-1]]
    originals = [line.split(",")[1] for line in (folder / "train.csv").read_text().splitlines()[1:]]
    assert texts(train["inputs"][firsts]) == originals[:5] + originals[6:]
    assert TASK.is_solution(train["inputs"], train["labels"]).all()
    assert verify(tmp_path / "data") == []


def test_bytes_do_not_depend_on_cpus_blocks_or_chunks(tmp_path, folder, ray_cluster, monkeypatch):
    values = {"subsample_size": 30, "num_aug": 100, "rows_per_shard": 1000, "rate": True, "seed": 5}
    run(tmp_path / "two", folder, **values)
    script = (
        "import sys, ray; from hrm_ray.data import pipeline, puzzle_files, rows;"
        "from hrm_ray.data.tasks.sudoku.builder import SudokuRecipe;"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False);"
        "rows._BYTES_PER_TASK = 22_400; puzzle_files._CSV_BLOCK_BYTES = 500;"
        f"pipeline.build(SudokuRecipe(source={str(folder)!r}, size=4, **{values!r}), sys.argv[1], show_progress=False)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "one")], check=True, env=os.environ)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_selection(tmp_path, folder, ray_cluster):
    run(tmp_path / "a", folder, subsample_size=20, min_difficulty=30, seed=1)
    originals = {
        line.split(",")[1]: r for r, line in enumerate((folder / "train.csv").read_text().splitlines()[1:])
    }
    chosen = [originals[text] for text in texts(rows(tmp_path / "a", "train")["inputs"])]
    assert len(chosen) == 20 and min(chosen) >= 30 and chosen == sorted(chosen)
    assert open_dataset(tmp_path / "a").split("test").num_examples == 20  # the repeated row is rated 5

    run(tmp_path / "b", folder, subsample_size=20, min_difficulty=30, seed=2)
    assert texts(rows(tmp_path / "b", "train")["inputs"]) != texts(rows(tmp_path / "a", "train")["inputs"])
    assert texts(rows(tmp_path / "b", "test")["inputs"]) == texts(rows(tmp_path / "a", "test")["inputs"])


def test_ratings_are_kept_where_that_is_asked_for(tmp_path, folder, ray_cluster):
    lines = [line.split(",") for line in (folder / "train.csv").read_text().splitlines()[1:]]
    rating_of = {question: int(rating) for _, question, _, rating in lines}
    run(tmp_path / "kept", folder, subsample_size=20, num_aug=3, keep_ratings=True, rows_per_shard=30)
    split = open_dataset(tmp_path / "kept").split("train")
    firsts = split.puzzle_starts[split.group_starts[:-1]]
    asked = texts(rows(tmp_path / "kept", "train")["inputs"][firsts])
    assert split.ratings.tolist() == [rating_of[text] for text in asked] and len(split.info.shards) > 1
    assert (
        verify(tmp_path / "kept") == [] and len(open_dataset(tmp_path / "kept").split("test").ratings) == 21
    )

    run(tmp_path / "solved", folder, keep_ratings=True, rate=True)
    guesses = TASK.solve(rows(tmp_path / "solved", "train")["inputs"])[2]
    assert open_dataset(tmp_path / "solved").split("train").ratings.tolist() == guesses.tolist()

    manifest = run(tmp_path / "plain", folder, subsample_size=20)
    assert open_dataset(tmp_path / "plain").split("train").ratings is None
    older = {
        key: value for key, value in manifest.recipe.items() if key != "keep_ratings"
    }  # before there was one
    manifest = manifest.model_copy(update={"recipe": older})
    for keeps, same in ((None, True), (True, False)):
        wanted = recipe(folder, subsample_size=20, keep_ratings=keeps)
        assert pipeline._is_of(manifest, wanted, manifest.source_digest) == same
    with pytest.raises(ValueError, match="'keep_ratings' does nothing with source=generator"):
        SudokuRecipe(source="generator", size=4, num_clues=6, num_train=1, num_test=0, keep_ratings=True)


def test_source_without_test_part_is_split(tmp_path, folder, ray_cluster):
    source = folder / "train.csv"
    with pytest.raises(UserError, match=r"has no test part; pass num_test=NUMBER"):
        run(tmp_path / "a", source)
    run(tmp_path / "a", source, num_test=15, subsample_size=25)
    train, test = (texts(rows(tmp_path / "a", name)["inputs"]) for name in ("train", "test"))
    assert (len(train), len(test)) == (25, 15) and not set(train) & set(test)
    assert set(run(tmp_path / "b", source, num_test=0).splits) == {"train"}


def test_missing_answers_are_solved_and_rated(tmp_path, folder, ray_cluster):
    questions = [line.split(",")[1] for line in (folder / "train.csv").read_text().splitlines()[1:]]
    (tmp_path / "a.txt").write_text("\n".join(questions))
    run(tmp_path / "data", tmp_path / "a.txt", num_test=0, rate=True, min_difficulty=0)
    train = rows(tmp_path / "data", "train")
    assert TASK.is_solution(train["inputs"], train["labels"]).all() and len(train["inputs"]) == 60


UNSOLVABLE = {
    "no solution": "123....4" + "." * 8,
    "several solutions": "1" + "." * 15,
}


@pytest.mark.parametrize("reason", UNSOLVABLE)
def test_puzzles_without_one_solution(tmp_path, folder, ray_cluster, reason):
    good = (folder / "train.csv").read_text().splitlines()[1:4]
    bad = UNSOLVABLE[reason]
    (tmp_path / "a.csv").write_text("\n".join(["source,question,answer,rating", *good, f"x,{bad},,1"]))
    with pytest.raises(UserError) as error:
        run(tmp_path / "data", tmp_path / "a.csv", num_test=0)
    assert str(error.value) == (
        f"{tmp_path}/a.csv, line 5: question '{bad}' has {reason}; mend it, or pass on_bad=skip to leave it out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    manifest = run(tmp_path / "data", tmp_path / "a.csv", num_test=0, on_bad="skip")
    assert manifest.report["bad_rows_skipped"] == 1
    assert manifest.report["bad_rows"] == [f"a.csv, line 5: question '{bad}' has {reason}"]
    assert manifest.splits["train"].num_examples == 3


def test_skipping_is_told(tmp_path, folder, ray_cluster, capfd):
    lines = (folder / "train.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([*lines[:5], "x,12,,1"]))
    build(recipe(tmp_path / "a.csv", num_test=0, on_bad="skip"), tmp_path / "data")
    told = capfd.readouterr().err
    assert "skipped 1 bad rows:\n  a.csv, line 6: question '12': 2 characters" in told


def test_skipping_everything_says_what_and_why(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("Grid 01\n12\n" * 30)
    with pytest.raises(UserError) as error:
        build(recipe(tmp_path / "a.txt", num_test=0, on_bad="skip"), tmp_path / "data")
    reason = "question '12': 2 characters; a 4x4 Sudoku has 16"
    assert f"no training puzzles are left; 30 bad rows were skipped: a.txt, line 2: {reason}; a.txt" in str(
        error.value
    )
    assert str(error.value).endswith("; and 27 more") and "\n" not in str(error.value)
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "skipped 30 bad rows:" and len(told) == 22 and told[-1] == "  and 10 more"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_generator_that_cannot(tmp_path, ray_cluster, monkeypatch):
    generator = {"source": "generator", "size": 4, "num_test": 0}
    with pytest.raises(
        UserError, match=r"found only \d+ different 4x4 puzzles with 16 clues, 300 are wanted"
    ):
        build(SudokuRecipe(**generator, num_train=300, num_clues=16), tmp_path / "data", show_progress=False)
    monkeypatch.setattr(builder, "MAX_TRIES", 1)
    nine = {**generator, "size": 9}
    with pytest.raises(UserError, match="no 9x9 puzzle with 17 clues and one solution found"):
        build(SudokuRecipe(**nine, num_train=2, num_clues=17), tmp_path / "data", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_finished_build_is_reused_and_never_clobbered(tmp_path, folder, ray_cluster, capfd):
    out = tmp_path / "data"
    first = run(out, folder)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert build(recipe(folder), out) == first
    assert capfd.readouterr().err == f"{out} is up to date\n"
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        UserError, match="already holds another dataset; give another out=, or overwrite=true"
    ):
        run(out, folder, seed=9)
    assert verify(out) == []
    build(recipe(folder, num_test=3), out, overwrite=True, show_progress=False)
    assert open_dataset(out).split("test").num_examples == 3


def test_bad_input_leaves_nothing(tmp_path, folder):
    """Told before Ray is even started."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("question\n12\n")
    for source in (tmp_path / "in" / "a.csv", tmp_path / "nowhere.csv", tmp_path / "in"):
        with pytest.raises(UserError):
            run(tmp_path / "data", source, num_test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_killed_build_starts_again_cleanly(tmp_path, ray_cluster):
    """SIGKILL in the middle of writing; the same command then gives what an undisturbed build gives."""
    questions, _ = get_task("sudoku", size=9).generate(0, 0, 40, 30, 100)
    (tmp_path / "a.txt").write_text("\n".join(get_task("sudoku", size=9).to_text(q) for q in questions))
    values = {"source": str(tmp_path / "a.txt"), "num_test": 5, "num_aug": 20_000, "rows_per_shard": 20_001}
    script = (
        "import sys; from hrm_ray.data.pipeline import build;"
        "from hrm_ray.data.tasks.sudoku.builder import SudokuRecipe;"
        f"build(SudokuRecipe(**{values!r}), sys.argv[1], show_progress=False)"
    )
    out = tmp_path / "data"
    process = subprocess.Popen([sys.executable, "-c", script, str(out)])
    deadline = time.monotonic() + 120
    while not (tmp_path / "data.building" / "train" / "shard-00001.arrow").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and (tmp_path / "data.building").exists()
    with pytest.raises(UserError, match="no dataset folder"):
        open_dataset(out)
    with pytest.raises(UserError, match="build did not finish"):
        open_dataset(tmp_path / "data.building")

    again = build(SudokuRecipe(**values), out, show_progress=False)
    undisturbed = build(SudokuRecipe(**values), tmp_path / "other", show_progress=False)
    assert again == undisturbed and not (tmp_path / "data.building").exists()


# Real files


@pytest.mark.skipif(not (SHARED / "sudoku_hard").is_dir(), reason=f"{SHARED}/sudoku_hard is not there")
def test_hard_9x9_csv(tmp_path, ray_cluster):
    values = {"source": str(SHARED / "sudoku_hard"), "subsample_size": 50, "num_aug": 20, "num_test": 100}
    manifest = build(load_recipe("sudoku_9x9", values), tmp_path / "data", show_progress=False)
    assert manifest.splits["train"].num_examples == 50 * 21 and manifest.splits["test"].num_examples == 100
    assert manifest.report["bad_rows_skipped"] == 0


@pytest.mark.skipif(not (SHARED / "sudoku").is_dir(), reason=f"{SHARED}/sudoku is not there")
def test_plain_text_9x9(tmp_path, ray_cluster):
    source = SHARED / "sudoku" / "magictour_top1465.txt"
    manifest = build(SudokuRecipe(source=str(source), num_test=65), tmp_path / "data", show_progress=False)
    assert manifest.splits["train"].num_examples == 1400 and manifest.splits["test"].num_examples == 65
