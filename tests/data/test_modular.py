"""Equations: those of the published code, its shuffle and noise; a plain reference; what is printed and refused."""

import hashlib
import json
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.batch import make_batch
from hrm_ray.cli import main
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.inspect import describe, show
from hrm_ray.data.pipeline import build
from hrm_ray.data.puzzle_files import PuzzleFile
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.tasks.modular import EOS, EQUALS, LARGEST_P, Modular, is_prime
from hrm_ray.data.tasks.modular.builder import ModularRecipe, shuffled
from hrm_ray.data.tasks.modular.operators import OPERATORS, operator
from hrm_ray.data.verify import verify
from hrm_ray.errors import UserError
from hrm_ray.models.act import IGNORE
from hrm_ray.training.launch import Launch
from tests.toy import toy_config

GOLDEN = json.loads(Path("tests/golden/grok/operators.json").read_text())
PLUS = Modular("+")
OF_NUMBERS = [op for op in OPERATORS if not op.of_permutations]
OF_PERMUTATIONS = [op for op in OPERATORS if op.of_permutations]

# A plain reference. Numbers: what the answer c has to fulfil; permutations: as dictionaries.
HOLDS = {
    "+": lambda a, b, c: a + b - c,
    "-": lambda a, b, c: a - b - c,
    "*": lambda a, b, c: a * b - c,
    "/": lambda a, b, c: a - b * c,
    "x^2+y": lambda a, b, c: a * a + b - c,
    "x^3+y": lambda a, b, c: a * a * a + b - c,
    "x^2+y^2": lambda a, b, c: a * a + b * b - c,
    "x^2+xy+y^2": lambda a, b, c: a * a + a * b + b * b - c,
    "x^2+xy+y^2+x": lambda a, b, c: a * a + a * b + b * b + a - c,
    "x^3+xy": lambda a, b, c: a * a * a + a * b - c,
    "x^3+xy^2+y": lambda a, b, c: a * a * a + a * b * b + b - c,
    "+*": lambda a, b, c: a * b - c if a % 2 else a + b - c,
    "+-": lambda a, b, c: a - b - c if a % 2 else a + b - c,
    "/-": lambda a, b, c: a - b * c if b % 2 else a - b - c,
}


def product(name, a, b):
    """Of permutations as texts of five digits; a is applied first."""
    first, second = ({i: int(digit) for i, digit in enumerate(text)} for text in (a, b))
    back = {first[i]: i for i in first}
    last = {"s5": lambda i: i, "s5conj": back.get, "s5aba": first.get}[name]
    return "".join(str(last(second[first[i]])) for i in range(5))


def recipe(**values):
    return load_recipe("modular", values)


def built(path, **values):
    build(recipe(**values), path, show_progress=False)
    return open_dataset(path)


def sha256(task, equations):
    quads = np.insert(equations, 1, task.op_token, axis=1)
    return hashlib.sha256(quads.astype("<i2").tobytes()).hexdigest()


# The published code


@pytest.mark.parametrize("name", GOLDEN["operators"])
def test_equations_shuffle_noise_and_split_are_the_published_ones(name):
    golden = GOLDEN["operators"][name]
    op, _, noise = name.partition("_noisy_")
    made = recipe(op=op, draws="published", noise=int(noise or 0))
    task = made.make_task()
    assert len(task.equations) == golden["size"]
    counts = Counter(task.equations[:, 2].tolist())
    assert len(counts) == golden["distinct_answers"] and task.chance == max(counts.values()) / golden["size"]
    assert sha256(task, shuffled(made)) == golden["sha256_shuffled"]
    if not noise:
        assert sha256(task, task.equations) == golden["sha256"]
        inputs, _ = task.examples(task.equations[1:2])
        assert f"<|eos|> {task.to_text(inputs[0])}" == golden["first_text"].partition(" =")[0]
    for percent, count in golden["train_rows"].items():
        assert recipe(op=op, train_data_pct=float(percent)).num_train == count


def test_the_vocabulary_is_the_published_one():
    for op in OPERATORS:
        assert Modular(op.name, vocabulary="published").symbols[1:] == GOLDEN["tokens"][1:]


def test_operators_have_names_of_their_own():
    for op in OPERATORS:
        assert {operator(name) for name in (op.name, op.published, *op.other_names)} == {op}
    published = {name for name in GOLDEN["operators"] if "noisy" not in name}
    assert {op.published for op in OPERATORS} == published


# Rules


@given(
    st.sampled_from(OF_NUMBERS), st.integers(2, LARGEST_P).filter(is_prime), st.integers(0), st.integers(0)
)
def test_numbers_are_reckoned_modulo_p(op, p, a, b):
    a, b = a % p, b % p
    task = get_task("modular", op=op.name, p=p)
    if op.name == "/" and b == 0:
        with pytest.raises(UserError, match="0 has no inverse"):
            task.parse(f"{a} / 0")
        return
    question = task.parse(f"{a} {op.name} {b}")
    answers = [c for c in range(p) if HOLDS[op.name](a, b, c) % p == 0]
    tokens = np.stack([task.parse(str(c)) for c in range(p)])
    right = task.is_solution(np.tile(question, (p, 1)), tokens)
    assert np.flatnonzero(right).tolist() == answers and len(answers) == 1


@given(st.sampled_from(OF_PERMUTATIONS), *2 * [st.permutations("01234").map("".join)])
def test_permutations_follow_one_another(op, a, b):
    task = get_task("modular", op=op.name)
    answer = product(op.name, a, b)
    assert task.problem(f"{a} {op.name} {b}", answer) is None
    assert task.problem(f"{a} {op.name} {b}", answer[::-1]) == "answer: it does not solve the question"


@given(st.sampled_from(OPERATORS), st.booleans(), st.sampled_from(["compact", "published"]), st.integers(0))
def test_text_and_tokens_mean_the_same(op, predict_end, vocabulary, index):
    task = Modular(op.name, predict_end=predict_end, vocabulary=vocabulary)
    equation = task.equations[[index % len(task.equations)]]
    (question,), (label,) = task.examples(equation)
    assert task.vocab_size <= 256 and max(question.max(), label.max()) < task.vocab_size
    for tokens in (question, label):
        np.testing.assert_array_equal(task.parse(task.to_text(tokens)), tokens)
    a, b, c = (task.symbols[token] for token in equation[0])
    sign = task.symbols[task.op_token]
    assert task.render(label, question) == f"{a} {sign} {b} = {c}" and task.to_text(label) == c
    np.testing.assert_array_equal(task.parse(f"{a}{op.name}{b} =")[:5], question[:5])
    assert task.is_solution(question[None], label[None].astype(np.int64)).all()
    assert (label[: -task.answer_cells] == task.ignore_label_id).all()
    assert (label[-task.answer_cells :] != task.ignore_label_id).all()


def test_an_answer_to_no_question_is_none():
    question, label = (tokens[0] for tokens in PLUS.examples(PLUS.equations[100:101]))
    for cell, token in ((0, EQUALS), (1, EOS), (1, 255), (2, EQUALS), (3, 2), (4, EOS)):
        broken = question.copy()
        broken[cell] = token
        assert not PLUS.is_solution(broken[None], label[None]).any(), (cell, token)
    assert not PLUS.is_solution(question[None], label[None].astype(np.int64) + 256).any()


@pytest.mark.parametrize(
    ("task", "text", "problem"),
    [
        (PLUS, "3 - 5", "no equation: '3 - 5'; write a question as '95 + 96'"),
        (PLUS, "", "no equation"),
        (PLUS, "3 + 97", "'97' is no number from 0 to 96"),
        (PLUS, "3 +", "'' is no number"),
        (PLUS, "3 + 5 = 8", "its answer, 8, is given already; write '3 + 5'"),
        (Modular("s5"), "01234 s5 01233", "'01233' is no permutation of the digits 01234"),
        (Modular("/", 7), "3 / 0", "3 / 0 has no answer: 0 has no inverse"),
    ],
)
def test_what_is_no_question_is_said(task, text, problem):
    with pytest.raises(UserError) as caught:
        task.parse(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("predict_end", [False, True])
def test_an_answer_is_no_question(predict_end):
    task = Modular("-", predict_end=predict_end)
    assert task.contradiction(task.parse("3 - 5")) is None
    assert task.problem("8") == "question: it is an answer, no question; write '95 - 96'"


def test_questions_are_read_from_a_file(tmp_path):
    (tmp_path / "questions.txt").write_text("3 + 5\n96+96 =\n\n0 + 0  # easy\n")
    texts = [text for _, text in PuzzleFile(tmp_path / "questions.txt", PLUS).questions()]
    assert [PLUS.to_text(PLUS.parse(text)) for text in texts] == ["3 + 5", "96 + 96", "0 + 0"]


# Data sets


@pytest.mark.parametrize("draws", ["keyed", "published"])
@pytest.mark.parametrize("predict_end", [False, True])
def test_a_data_set_holds_every_equation_once(tmp_path, draws, predict_end):
    dataset = built(tmp_path / "data", op="-", draws=draws, predict_end=predict_end)
    assert verify(tmp_path / "data") == []
    task, manifest = dataset.task, dataset.manifest
    assert manifest.vocab_size == (239 if draws == "published" else 100)
    assert (manifest.seq_len, task.answer_cells) == ((6, 2) if predict_end else (5, 1))
    found = []
    for split, count in (("train", 4704), ("test", 4705)):
        part = dataset.split(split)
        assert manifest.splits[split].num_groups == part.num_examples == count
        batch = make_batch(part, np.arange(count), manifest.ignore_label_id)
        labels = batch.labels.numpy()
        assert (labels[:, : -task.answer_cells] == IGNORE).all()
        if predict_end:
            assert (labels[:, -1] == EOS).all() and (batch.inputs.numpy()[:, -1] == labels[:, -2]).all()
        found.append(np.column_stack([batch.inputs.numpy()[:, [1, 3]], labels[:, 4]]))
    rows = np.concatenate(found)
    assert sorted(rows.tolist()) == sorted(task.equations.tolist())
    made = shuffled(recipe(op="-", draws=draws))
    np.testing.assert_array_equal(rows, made)


def test_smaller_fractions_are_part_of_larger_ones_and_seeds_differ():
    orders = [
        shuffled(recipe(train_fraction=fraction, seed=seed))
        for fraction, seed in ((0.1, 3), (0.9, 3), (0.9, 4))
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[1] != orders[2]).any()
    assert sorted(orders[1].tolist()) == sorted(orders[2].tolist())


def test_noise_is_in_training_alone(tmp_path):
    dataset = built(tmp_path / "data", op="*", noise=200)
    assert verify(tmp_path / "data") == []  # wrong as they are
    clean, noisy = (shuffled(recipe(op="*", noise=noise)) for noise in (0, 200))
    wrong = (clean != noisy).any(axis=1)
    assert 180 < wrong.sum() <= 200 and not wrong[200:].any()
    for split, right in (("train", 4704 - wrong.sum()), ("test", 4705)):
        rows = dataset.split(split).rows(np.arange(dataset.split(split).num_examples))
        assert dataset.task.is_solution(rows["inputs"], rows["labels"]).sum() == right
    label = dataset.task.parse("5")
    label[4] = dataset.task.op_token  # no number
    assert not dataset.task.labels_fit(rows["inputs"][:1], label[None]).any()


def test_all_can_be_trained_on(tmp_path):
    dataset = built(tmp_path / "data", op="s5", train_fraction=1)
    assert {name: info.num_examples for name, info in dataset.manifest.splits.items()} == {"train": 14400}


def test_a_data_set_is_shown(tmp_path):
    dataset = built(tmp_path / "data", op="x^2+y", p=7, seed=2)
    assert "modular (op=x^2+y, p=7" in describe(tmp_path / "data") and "equations: 49" in describe(
        tmp_path / "data"
    )
    row = dataset.split("test").rows(np.array([3]))
    a, b = (int(row["inputs"][0, cell]) - 3 for cell in (1, 3))
    lines = show(dataset, "test", 3).splitlines()
    assert lines[1] == f"{a} x^2+y {b}   {a} x^2+y {b} = {(a * a + b) % 7}"
    assert lines[2:] == [f"question {a} x^2+y {b}", f"answer   {(a * a + b) % 7}"]


# The command


def test_the_build_says_how_many_equations_there_are(tmp_path, capsys):
    out = str(tmp_path / "data")
    assert main(["data", "build", "recipe=modular", "op=+", "p=97", "train_fraction=0.5", f"out={out}"]) == 0
    assert "9,409 equations: 4,704 to train on (50 %), 4,705 to validate\n" in capsys.readouterr().err
    assert main(["data", "build", "recipe=modular", "op=+", "train_data_pct=50", f"out={out}"]) == 0
    assert "is up to date" in capsys.readouterr().err


def test_too_few_equations_are_warned_of():
    (counts, warning) = PLUS.about({"train": 47, "test": 9362})
    assert counts == "9,409 equations: 47 to train on (0.5 %), 9,362 to validate"
    assert warning.startswith(
        "warning: 47 equations are so few that a model can only memorise them and stays at chance (1.0%)"
    )
    assert len(PLUS.about({"train": 941, "test": 8468})) == 1
    assert PLUS.about({"train": 9409}) == ["9,409 equations: 9,409 to train on (100 %), 0 to validate"]


def test_a_run_says_so_too(tmp_path):
    built(tmp_path / "data", train_fraction=0.005)
    config = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs"))
    lines = Launch(config).announce().splitlines()
    assert "9,409 equations: 47 to train on (0.5 %), 9,362 to validate" in lines
    assert [line for line in lines if line.startswith("warning: 47 equations are so few")]


def test_a_run_without_validation_says_what_is_in_vain(tmp_path):
    built(tmp_path / "data", train_fraction=1)
    config = toy_config(tmp_path / "data", tmp_path / "runs") | {"stop_at": 0.9, "log_norms": True}
    warning = f"warning: {tmp_path / 'data'} holds no examples out, so nothing is evaluated: stop_at, log_norms have"
    assert warning in Launch(TrainConfig(**config)).announce()


BAD = [
    (["op=%"], "op=%: no such operator; known: +, -, *, /, x^2+y,"),
    (["op=s5con"], "op=s5con: no such operator; did you mean 's5conj'?"),
    (["op=sort"], "op=sort: the published code names it, but fails to make its equations"),
    (["op=/", "p=100"], "p=100 is no prime, and op=/ divides; choose p=97 or p=101"),
    (["op=/-", "p=252"], "choose p=251"),
    (["p=254"], "p=254: choose 2 to 253, for a vocabulary has 256 tokens; the largest prime is 251"),
    (["p=1"], "p=1: choose 2 to 253"),
    (["p=9.5"], "p=9.5: give a whole number"),
    (["op=s5", "p=97"], "p=97 does nothing with op=s5"),
    (["p=113", "draws=published"], "p=113: the published equations are modulo 97"),
    (["seed=1", "draws=published"], "seed=1: draws=published always has seed 0"),
    (
        ["train_data_pct=0.5"],
        "train_data_pct=0.5 is 0.5 percent, 47 of 9,409 equations to train on; write train_fraction=0.5 for 4,704 of "
        "them, train_fraction=0.005 for 47",
    ),
    (["train_data_pct=50", "train_fraction=0.5"], "'train_data_pct' and 'train_fraction' say the same"),
    (["train_data_pct=150"], "train_data_pct=150"),
    (["train_data_pct=0"], "train_data_pct=0"),
    (["train_fraction=50"], "train_fraction=50 is a share, at most 1; 50 percent are train_fraction=0.5"),
    (["train_fraction=0.00001"], "train_fraction=1e-05 leaves none of 9,409 equations to train on"),
    (["train_fraction=0.99999"], "leaves none of 9,409 equations to validate"),
    (["noise=5000"], "noise=5000: only 4,704 equations are trained on"),
    (["source=equations.csv"], "source="),
]


@pytest.mark.parametrize(("words", "problem"), BAD)
def test_bad_input_is_one_line(tmp_path, capsys, words, problem):
    assert main(["data", "build", "recipe=modular", *words, f"out={tmp_path / 'data'}"]) == 2
    said = capsys.readouterr().err
    assert problem in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_manifest_that_fits_no_operator_is_refused():
    with pytest.raises(UserError, match="vocabulary=large: known: compact, published"):
        get_task("modular", vocabulary="large")


def test_recipe_and_task_agree():
    made = ModularRecipe(op="**3+")
    assert (made.op, made.p, made.train_fraction) == ("x^3+y", 97, 0.5)
    assert get_task("modular", **made.make_task().options).options == made.make_task().options
    assert ModularRecipe(op="xyx^-1").p is None
    assert len({tuple(row) for row in permutations(range(5))}) == Modular("s5").vocab_size - 3
