"""Puzzle files as people have them: what can mean one thing only is read, everything else is one clear line."""

import bz2
import gzip
import json
import lzma
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.layout import find_puzzles
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.data.sources import BadRows, Rows, open_source
from hrm_ray.data.tasks.base import get_task
from hrm_ray.errors import UserError, shown

SMALL, BIG = get_task("sudoku", size=4), get_task("sudoku", size=9)
Q, A = "...1.2....3.4...", "3421124321344312"
Q2, A2 = "1...............", "1234341221434321"
BIG_Q = "004300209005009001070060043006002087190007400050083000600000105003508690042910300"
BIG_A = "864371259325849761971265843436192587198657432257483916689734125713528694542916378"
TOP95 = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"


def lines(text, width=4):
    return [text[i : i + width] for i in range(0, len(text), width)]


def grid(text, width=4):
    return "\n".join(lines(text, width))


def numbers(text, width=4):
    return [[int(c.replace(".", "0")) for c in row] for row in lines(text, width)]


def read(path, *, skip=False, part="train", ratings=False):
    """(question, answer or None) of every puzzle of a source, and the bad rows."""
    bad = BadRows(skip=skip)
    source = open_source(str(path))
    text = "".join(str(file) for file in source.parts.values())
    task = BIG if "big" in text else SMALL
    rows = Rows.concat(list(source.read(part, task, bad, ratings=ratings)), task.seq_len)
    answers = [task.to_text(a) if a.any() else None for a in rows.answers]
    return list(zip(map(task.to_text, rows.questions), answers, strict=True)), bad


def dotted(text):
    return text.replace("0", ".")


# Text: what it holds, and the puzzles that are to be read

PLAIN = [(Q, None)]
SOLVED = [(Q, A)]
GRIDS = {
    "rows": grid(Q),
    "title": f"Grid 01\n{grid(Q)}",
    "spaces between": "\n".join(" ".join(row) for row in lines(Q)),
    "commas between": "\n".join(",".join(row) for row in lines(Q)),
    "empty fields": ",,,1\n,2,,\n,,3,\n4,,,",
    "spaces for blanks": "   1\n 2  \n  3 \n4   ",
    "bars": "\n".join(f"|{row[:2]}|{row[2:]}|" for row in lines(Q)),
    "dashes for blanks and frame": "---1\n-2--\n--+--\n--3-\n4---",
    "stars as frame": "*-----*\n|..|.1|\n|.2|..|\n|--+--|\n|..|3.|\n|4.|..|\n*-----*",
    "boxes drawn": "┌──┬──┐\n│..│.1│\n│.2│..│\n├──┼──┤\n│..│3.│\n│4.│..│\n└──┴──┘",
    "dots as corners": ".-----.-----.\n| .. | .1 |\n| .2 | .. |\n:-----+-----:\n| .. | 3. |\n| 4. | .. |",
    "header of cells": f"{','.join(f'c{i}' for i in range(16))}\n{','.join(Q)}",
    "numbered": f"1.\n{grid(Q)}",
    "bands": "...1\n.2..\n\n..3.\n4...",
    "double spaced": "...1\n\n.2..\n\n..3.\n\n4...\n",
    "Python": "puzzle = [\n  [0, 0, 0, 1],\n  [0, 2, 0, 0],\n  [0, 0, 3, 0],\n  [4, 0, 0, 0],\n]",
    "Python strings": "[\n  '...1',\n  '.2..',\n  '..3.',\n  '4...',\n]",
    ".sdk with a state": f"#A someone\n[Puzzle]\n{grid(Q)}\n[State]\n{grid('34' + Q[2:])}",
}
ON_ONE_LINE = {
    "plain": Q,
    "remark": f"{Q} // from a list",
    "rating": f"{Q};99.2;ED=9.2/1.2/1.2",
    "colons": f"{Q}:1:x",
    "comment": f"# hard\n\n  {Q}  # very",
    "hash before": f"0000183b305c {Q}  1.2",
    "number before": f"1. {Q}",
    "title and rules": f"My puzzles, of 2012\n======\n{Q}\n----------------",
    "cells apart": " ".join(Q),
    "cells with commas": ",".join(Q),
    "cells apart, remark": f"{' '.join(Q)} // easy",
    "empty fields": ",".join(Q).replace(".", ""),
    "rows apart": " ".join(lines(Q)),
    "spaces for blanks": Q.replace(".", " ") + "; 99.2",
    "end of file of DOS": f"{Q}\r\n\x1a",
}
WITH_ANSWER = {
    "comma": f"{Q},{A}",
    "answer first": f"{A};{Q}",
    "spaces, header": f"puzzle solution\n{Q} {A}",
    "numbered": f"1,{Q},{A},3.5",
    "cells": f"{','.join(Q)},{','.join(A)}",
    "rows apart": f"{' '.join(lines(Q))} {A}",
    "quotes": f'"{Q}","{A}"',
    "alternating": f"{Q}\n{A}",
    "letters": f"Q: {Q}\nA: {A}",
    "labels": f"Puzzle: {Q}\nSolution: {A}",
    "grids": f"Puzzle\n{grid(Q)}\nSolution\n{grid(A)}",
}


@pytest.mark.parametrize("text", GRIDS.values(), ids=GRIDS)
def test_grids(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt")[0] == PLAIN


@pytest.mark.parametrize("text", ON_ONE_LINE.values(), ids=ON_ONE_LINE)
def test_puzzles_on_one_line(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt")[0] == PLAIN


@pytest.mark.parametrize("text", WITH_ANSWER.values(), ids=WITH_ANSWER)
def test_answers_beside_puzzles(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt")[0] == SOLVED


@pytest.mark.parametrize("blank", "*-?_xX#/:=+~@ ·□AO")
def test_any_character_as_blank(tmp_path, blank):
    (tmp_path / "a.txt").write_text(Q.replace(".", blank) + "\n")
    (tmp_path / "big.txt").write_text(TOP95.replace(".", blank) + "\n")
    assert read(tmp_path / "a.txt")[0] == PLAIN
    assert read(tmp_path / "big.txt")[0] == [(TOP95, None)]
    assert SMALL.to_text(SMALL.parse(Q.replace(".", blank))) == Q


def test_several_grids(tmp_path):
    for between in ("\n", "\n\n", "\n\n\n", "\n====\n", "\nGrid 02\n", "\n# next\n"):
        (tmp_path / "a.txt").write_text(grid(Q) + between + grid(Q2) + between + Q)
        assert [q for q, _ in read(tmp_path / "a.txt")[0]] == [Q, Q2, Q], repr(between)


def test_a_heading_that_only_sounds_like_a_solution(tmp_path):
    (tmp_path / "a.txt").write_text(f"{grid(Q)}\nSolved in 5 minutes\n{grid(Q2)}\n")
    assert read(tmp_path / "a.txt")[0] == [(Q, None), (Q2, None)]


def test_numbers_are_the_lines_where_puzzles_begin():
    text = f"Grid 1\n{grid(Q)}\n\n{Q2}\nGrid 2\n+--+--+\n{grid(Q)}\n"
    assert [found.line for found in find_puzzles(text.splitlines(), SMALL.cells)] == [2, 7, 10]


@settings(deadline=None)
@given(
    given_cells=st.lists(st.booleans(), min_size=81, max_size=81).filter(any),
    blank=st.sampled_from(".0*-_?x"),
    between=st.sampled_from(["", " ", ",", "\t", "|"]),
    framed=st.booleans(),
    gap=st.sampled_from(["\n", "\n\n", "\nGrid\n"]),
)
def test_grids_of_any_look(given_cells, blank, between, framed, gap):
    question = "".join(c if kept else blank for c, kept in zip(BIG_A, given_cells, strict=True))
    rows = [between.join(row) for row in lines(question, 9)]
    if framed:
        rows = [f"| {row} |" for row in rows]
        rows = ["+===+", *rows[:3], "+---+---+---+", *rows[3:], "+===+"]
    text = gap.join(["\n".join(rows)] * 2)
    found = list(find_puzzles(text.splitlines(), BIG.cells))
    expected = "".join(c if kept else "." for c, kept in zip(BIG_A, given_cells, strict=True))
    assert [dotted(one.question) for one in found] == [expected] * 2


@settings(deadline=None)
@given(st.text(alphabet="123450.*x|+- \n\tab#,;:'\"!", max_size=300))
def test_every_cell_that_is_read_was_written(text):
    """Whatever is in a text: nothing is made up, and what is no puzzle is a problem or fails the task's check."""
    for found in find_puzzles(text.split("\n"), SMALL.cells):
        if not found.problem and SMALL.cells.plain(found.question):
            digits = [c for c in found.question if c in "1234"]
            assert all(text.count(d) >= digits.count(d) for d in "1234")


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"^```puzzle\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_of_the_page_is_read(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert read(tmp_path / "a")[0] == (SOLVED if A in text else PLAIN)


# What our own commands print


@pytest.mark.parametrize(("task", "question", "answer"), [(SMALL, Q, A), (BIG, dotted(BIG_Q), BIG_A)])
def test_what_we_print_is_read_back(tmp_path, task, question, answer):
    file = tmp_path / ("big.txt" if task is BIG else "a.txt")
    tokens, solved = task.parse(question), task.parse(answer)
    shown_both = [
        f"{left}   {right}"
        for left, right in zip(
            task.render(tokens).splitlines(), task.render(solved, tokens).splitlines(), strict=True
        )
    ]
    wrong = solved.copy()
    i = int(np.flatnonzero(tokens == 1)[0])
    wrong[i] = 2 + (solved[i] - 1) % task.size
    for text, expected in {
        task.render(tokens): (question, None),
        f"{task.render(solved, tokens)}\nvalid, confidence 99.9%: {answer}\n\n1 of 1 valid": (
            question,
            answer,
        ),
        f"{task.render(wrong, tokens)}\nNOT valid, confidence 9.9%: {task.to_text(wrong)}\n": (
            question,
            None,
        ),
        "\n".join(
            ["train example 2: group 2, puzzle 2", *shown_both, f"question {question}", f"answer   {answer}"]
        ): (question, answer),
    }.items():
        file.write_text(text)
        assert read(file)[0] == [expected]
    clue = solved.copy()
    i = int(np.flatnonzero(tokens != 1)[0])
    clue[i] = 2 + (solved[i] - 1) % task.size
    file.write_text(task.render(clue, tokens))
    with pytest.raises(UserError, match=r"line 2: a digit marked ! is not the clue"):
        read(file)


def test_lines_of_solve_json(tmp_path):
    right = {"puzzle": Q, "answer": A, "confidence": 0.9, "steps": 4, "valid": True}
    wrong = right | {"answer": A2, "valid": False}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (right, wrong)))
    assert read(tmp_path / "a.jsonl")[0] == [(Q, A), (Q, None)]


# Tables

CSV = {
    "published": f"source,question,answer,rating\nweb,{BIG_Q},{BIG_A},7",
    "kaggle 1m": f"quizzes,solutions\n{BIG_Q},{BIG_A}",
    "kaggle 3m": f"id,puzzle,solution,clues,difficulty\n1,{BIG_Q},{BIG_A},33,0.0",
    "no header": f"{BIG_Q},{BIG_A}",
    "capitals": f"Question,Answer\n{BIG_Q},{BIG_A}",
    "semicolon": f"question;answer\n{BIG_Q};{BIG_A}",
    "tab": f"question\tanswer\n{BIG_Q}\t{BIG_A}",
    "bar": f"quizzes|solutions\n{BIG_Q}|{BIG_A}",
    "qqwing": f"Puzzle,Solution,Count,\n{dotted(BIG_Q)},{BIG_A},1,",
    "columns swapped": f"solutions,quizzes\n{BIG_A},{BIG_Q}",
    "quoted": f'"id","quizzes","solutions"\n"1","{BIG_Q}","{BIG_A}"',
    "same name twice": f"q,q\n{BIG_Q},{BIG_A}",
    "comment": f"# from kaggle\n\nquizzes,solutions\n{BIG_Q},{BIG_A}",
    "stars": f"puzzle,solution\n{BIG_Q.replace('0', '*')},{BIG_A}",
    "spaces for blanks": f"question,answer\n{BIG_Q.replace('0', ' ')},{BIG_A}",
    "cells apart": f"question,answer\n{' '.join(BIG_Q)},{BIG_A}",
    "grid in a field": f'id,question,answer\n1,"{grid(BIG_Q, 9)}",{BIG_A}',
    "as Python prints it": f'id,question,answer\n1,"{numbers(BIG_Q, 9)}",{BIG_A}',
}


@pytest.mark.parametrize("name", CSV)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_columns_are_known_by_what_they_hold(tmp_path, name, ending):
    if name == "grid in a field" and ending == "\r":
        pytest.skip("the csv module wants newlines there")
    (tmp_path / "big.csv").write_text(CSV[name] + "\n", newline=ending)
    assert read(tmp_path / "big.csv")[0] == [(dotted(BIG_Q), BIG_A)]


def test_ratings_by_their_column(tmp_path):
    rows = [f"{Q},{A},2.7", f"{Q2},{A2},11"]
    (tmp_path / "a.csv").write_text("\n".join(["puzzle,solution,difficulty", *rows]))
    bad = BadRows(skip=False)
    chunks = list(open_source(str(tmp_path / "a.csv")).read("train", SMALL, bad, ratings=True))
    assert chunks[0].ratings.tolist() == [2, 11]


def test_rows_in_quotes_over_several_lines_keep_their_line(tmp_path):
    (tmp_path / "a.csv").write_text(f'id,question\n1,"{grid(Q)}"\n2,"{Q}"\n3,"12"\n')
    with pytest.raises(UserError, match=r"a\.csv, line 7: question '12': 2 characters"):
        read(tmp_path / "a.csv")


JSON = {
    "records": [{"quiz": Q, "solution": A}],
    "one record": {"quiz": Q, "solution": A},
    "columns": {"quizzes": [Q], "solutions": [A]},
    "columns of pandas": {"quizzes": {"0": Q}, "solutions": {"0": A}},
    "nested": {
        "newboard": {
            "grids": [{"value": numbers(Q), "solution": numbers(A), "difficulty": "Easy"}],
            "results": 1,
        }
    },
    "rows": [{"q": lines(Q), "a": lines(A)}],
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("indent", [None, 1])
def test_json(tmp_path, name, indent):
    (tmp_path / "a.json").write_text(json.dumps(JSON[name], indent=indent))
    assert read(tmp_path / "a.json")[0] == SOLVED


@pytest.mark.parametrize(
    "value", [Q, numbers(Q), [None if c == "." else int(c) for c in Q], lines(Q)], ids=repr
)
def test_json_of_puzzles_alone(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps([value]))
    (tmp_path / "b.jsonl").write_text(json.dumps(value) + "\n" + json.dumps(value) + "\n")
    assert read(tmp_path / "a.json")[0] == PLAIN
    assert read(tmp_path / "b.jsonl")[0] == PLAIN * 2


def test_parquet(tmp_path):
    tables = {
        "text": {"id": [1, 2], "quiz": [Q, Q2], "solution": [A, A2]},
        "lists": {"q": [numbers(Q), numbers(Q2)], "a": [numbers(A), numbers(A2)], "more": [{"k": 1}, None]},
        "categories": {"question": pa.array([Q, Q2]).dictionary_encode(), "answer": [A, A2]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet")[0] == [(Q, A), (Q2, A2)], name
    packed = gzip.compress((tmp_path / "text.parquet").read_bytes())
    (tmp_path / "packed.parquet.gz").write_bytes(packed)
    assert read(tmp_path / "packed.parquet.gz")[0] == [(Q, A), (Q2, A2)]


def test_tokens_are_read_one_a_line_or_by_column(tmp_path):
    task = get_task("tokens", vocab_size=12, seq_len=4)
    (tmp_path / "a.txt").write_text("# two\n0, 1 11 2\n\n3 3 3 3  # last\n")
    (tmp_path / "b.jsonl").write_text(
        '{"puzzle": "0 1 11 2", "answer": "1 1 1 1"}\n{"puzzle": "3 3 3 3", "answer": "1 1 1 1"}\n'
    )
    assert list(PuzzleFile(tmp_path / "a.txt", task).questions()) == [(2, "0, 1 11 2"), (4, "3 3 3 3")]
    assert list(PuzzleFile(tmp_path / "b.jsonl", task).questions()) == [(1, "0 1 11 2"), (2, "3 3 3 3")]


# Encodings and packed files


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(f"# café\r\n{Q}\r\n{Q2}  # é\r\n".encode(encoding))
    assert [q for q, _ in read(tmp_path / "a.txt")[0]] == [Q, Q2]
    (tmp_path / "a.csv").write_bytes(f"note,quizzes,solutions\r\né,{Q},{A}\r\n".encode(encoding))
    assert read(tmp_path / "a.csv")[0] == SOLVED


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, lambda b: gzip.compress(gzip.compress(b))]
)
def test_packed_files_whatever_their_name(tmp_path, pack):
    for name in ("PUZZLES.CSV.GZ", "puzzles", "puzzles.txt"):
        (tmp_path / name).write_bytes(pack(f"question,answer\n{Q},{A}\n".encode()))
        assert read(tmp_path / name)[0] == SOLVED


def pack_zip(path, **files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return path


def test_zip(tmp_path):
    two = pack_zip(tmp_path / "two.zip", a_csv=f"{Q}\n", b_csv=f"{Q2}\n")
    parts = pack_zip(tmp_path / "parts.zip", in__train_csv=f"{Q}\n", in__test_csv=f"{Q2}\n")
    with pytest.raises(UserError, match=r"holds 2 files \(a\.csv, b\.csv\); name one, as .*two\.zip/a\.csv"):
        read(two)
    assert read(tmp_path / "two.zip" / "b.csv")[0] == [(Q2, None)]
    assert read(parts)[0] == PLAIN and read(parts, part="test")[0] == [(Q2, None)]
    assert open_source(str(parts)).digest() == open_source(str(parts)).digest()


def test_zip_of_one_file_and_what_a_mac_adds(tmp_path):
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("sudoku.csv", f"quizzes,solutions\n{Q},{A}\n")
        archive.writestr("__MACOSX/._sudoku.csv", b"\0")
    assert read(tmp_path / "one.zip")[0] == SOLVED


@pytest.mark.parametrize(
    "name", ["train.csv", "TRAIN.TXT", "train.json.gz", "Train.sdk", "train-00000-of-00001.parquet"]
)
def test_folder_with_files_of_any_kind(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "README.md").write_text("train")
    content = {"parquet": b"", "gz": gzip.compress(json.dumps([Q]).encode())}.get(
        name.rpartition(".")[2], Q.encode()
    )
    (folder / name).write_bytes(content)
    if not content:
        pq.write_table(pa.table({"q": [Q]}), folder / name)
    assert read(tmp_path)[0] == PLAIN
    (folder / "train.tsv").write_text(Q)
    with pytest.raises(UserError, match=r"holds several train files \(.*\); keep one, or name one file"):
        read(tmp_path)


# What cannot be read: one line, which says what is wrong, where, and what to do

BAD = {
    "other blanks mixed": (
        "a.txt",
        "..x1.2....3.4...",
        "line 1: question '..x1.2....3.4...': impossible digit 'x' in row 1",
    ),
    "digit of a larger puzzle": ("a.txt", Q.replace(".", "5"), "impossible digit '5' in row 1, column 1"),
    "grid without a row": (
        "a.txt",
        f"{grid(Q)}\n\n{grid(Q[:12])}",
        "line 6: 3 rows of 4 cells; a grid has 4: one may be",
    ),
    "short row": (
        "a.txt",
        f"Grid\n...1\n.2.\n..3.\n4...\nGrid\n{grid(Q)}",
        "line 3: '.2.' is no row of 4 cells",
    ),
    "cut with a remark": (
        "a.txt",
        f"{Q}\n{Q[:12]} // from a list",
        "line 2: question '...1.2....3. // from a list'",
    ),
    "letters in it": ("a.txt", "1***2*ab**3*4***", "line 1: question '1***2*ab**3*4***'"),
    "an index before the cells": (
        "a.txt",
        ",".join("0" + Q.replace(".", "0")),
        "line 1: 17 fields, a grid has 16",
    ),
    "an index before the rows": ("a.txt", f"0001 {' '.join(lines(Q))}", "line 1: 5 fields, a grid has 4"),
    "two on a line": ("a.txt", f"{Q} {Q2}", "line 1: 2 puzzles on one line; give each a line of its own"),
    "question cut, answer whole": (
        "a.csv",
        f"{Q[1:]},{A}",
        f"line 1: '{Q[1:]}' stands beside a puzzle, but is no puzzle or answer",
    ),
    "answer cut": (
        "a.csv",
        f"{Q},{A[1:]}",
        f"line 1: '{A[1:]}' stands beside a puzzle, but is no puzzle or answer",
    ),
    "two columns of puzzles": (
        "a.csv",
        f"a,b\n{Q},{Q2}",
        "the columns 'a' and 'b' may both be the question; name one",
    ),
    "two answers": (
        "a.csv",
        f"q,a,b\n{Q},{A},{A2}",
        "the columns 'a' and 'b' may both be the answer; name one",
    ),
    "no column of puzzles": (
        "a.csv",
        "a,b\n1,2",
        "has no column 'question' (it has: a, b), and none that holds",
    ),
    "answer of another": ("a.csv", f"q,a\n{Q},{A2}", f"line 2: answer '{A2}': it does not fit its question"),
    "extra field far below": (
        "a.csv",
        "q,a\n" + f"{Q},{A}\n" * 300 + "1,2,3\x1b[31m",
        "line 302: 3 columns instead of 2 ('1,2,3\\x1b[31m')",
    ),
    "open quote": (
        "a.csv",
        'question,answer,rating\n"x,....341221434321,1\n....341221434321,1234341221434321,1\n',
        "line 2: 1 columns instead of 3 ('x,....341221434321,1\\n')",
    ),
    "control characters": (
        "a.txt",
        f"{Q}\n\x1b[31mred",
        "line 2: question '\\x1b[31mred': impossible digit '\\x1b'",
    ),
    "one long line": ("a.txt", "1" * 3_000_000, "line 1 is longer than a puzzle can be"),
    "web page": ("a.csv", "<!DOCTYPE html>\n<html><body>Sign in</body></html>", "holds no puzzles"),
    "Git LFS": ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run: git lfs pull"),
    "train and test in JSON": (
        "a.json",
        json.dumps({"train": [Q], "test": [Q, Q2]}),
        "under several names ('train', 'test')",
    ),
    "JSON cut": ("a.json", '{"a": [', "is no readable JSON: "),
    "JSON too deep": ("a.json", "[" * 100_000, "is nested too deeply"),
    "JSON of something else": ("a.json", "[1, 2, 3]", "entry 1: question '123': 3 characters"),
    "line of JSON cut": ("a.jsonl", f'{{"puzzle": "{Q}"}}\n{{"puzz', "line 2: no JSON: "),
    "no JSON entries": ("a.json", "[]", "holds no puzzles"),
    "empty JSON": ("a.json", "{}", "holds no puzzles"),
    "bytes": ("a.txt", bytes(range(256)) * 9, "is no text file, and no JSON, Parquet, gzip or zip file"),
    "gzip cut": ("a.csv.gz", gzip.compress(b"question\n" * 99)[:-9], "is damaged, or cut short"),
    "zip cut": ("a.zip", b"PK\x03\x04" + b"\0" * 40, "is damaged, or cut short"),
    "Parquet cut": ("a.parquet", b"PAR1" + b"\0" * 40, "is damaged, or cut short"),
    "extra field, not UTF-8": (
        "a.csv",
        f"q,a\n{Q},{A}\ncafé,,\n".encode("cp1252"),
        "line 3: 3 columns instead of 2 ('café,,')",
    ),
    "empty when unpacked": ("a.txt.gz", gzip.compress(b""), "is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(tmp_path, name):
    file, content, said = BAD[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path / file)
    message = str(error.value)
    assert said in message and file in message
    assert message.isprintable() and len(message) < 500


def test_parquet_with_a_changed_byte(tmp_path):
    pq.write_table(pa.table({"q": [Q] * 9}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for at in range(4, len(content), 5):
        (tmp_path / "a.parquet").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        try:
            puzzles, _ = read(tmp_path / "a.parquet", skip=True)
            assert len(puzzles) <= 9
        except UserError as error:
            assert str(error).isprintable()


def test_spreadsheets_and_passwords(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "")
        archive.writestr("xl/workbook.xml", "")
    with pytest.raises(UserError, match="is a spreadsheet or a document; save its puzzles as CSV"):
        read(tmp_path / "a.xlsx")
    pack_zip(tmp_path / "b.zip", a_csv=Q)
    content = bytearray((tmp_path / "b.zip").read_bytes())
    for at in (6, content.rindex(b"PK\x01\x02") + 8):  # the flag of an encrypted file, in both headers
        content[at] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.zip: .*password.*; unpack it"):
        read(tmp_path / "b.zip")


def test_skipping_goes_on_behind_what_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_text(f"Grid\n...1\n.2.\n..3.\n4...\nGrid\n{grid(Q)}\n{Q} {Q2}\nxyz\n{Q2}\n")
    puzzles, bad = read(tmp_path / "a.txt", skip=True)
    assert puzzles == [(Q, None), (Q2, None)] and bad.count == 2  # xyz is a heading
    assert [line.partition(":")[0] for line in bad.listed()] == ["a.txt, line 3", "a.txt, line 11"]


def test_shown():
    assert shown("a\nb\x1b[0m\u202ec é") == "a\\nb\\x1b[0m\\u202ec é"
    assert shown("x" * 500, 10) == "x" * 7 + "..."
