"""The commands as a person types them: what they print, what they leave, how they say no."""

import json
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import hrm_ray
from hrm_ray import memory
from hrm_ray.cli import build_parser, main
from hrm_ray.cli.command import options_of
from hrm_ray.cli.data import build_options
from hrm_ray.cli.tune import VERBS
from hrm_ray.config.compose import choices, train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import known_keys
from hrm_ray.data.format import Manifest
from hrm_ray.data.recipe import load_recipe, recipe_class, recipe_names
from hrm_ray.data.tasks.base import get_task
from hrm_ray.data.writer import DatasetWriter, balanced_cuts
from hrm_ray.errors import UserError
from hrm_ray.scale.machine import machine_files
from hrm_ray.storage.storage import Storage
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import MODEL_FILE, Checkpoint
from hrm_ray.tuning.config import load_sweep, sweep_names
from tests.toy import ARCH, toy_config, toy_dataset

ROOT = Path(__file__).parents[1]
TEXT = "\n".join(page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
# Files that the pages tell their reader to write, by name.
EXAMPLES = dict(re.findall(r"`(\w+\.yaml)`[^`]*\n\n```yaml\n(.*?)^```", TEXT, flags=re.M | re.S))


def commands_in(text: str) -> list[list[str]]:
    """Every line `hrm-ray ...` of a text's code blocks, also behind VARIABLE=value, split into words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    lines = re.findall(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*hrm-ray (.*)$", "\n".join(blocks), flags=re.M)
    return [shlex.split(line, comments=True) for line in lines]


def examples_of(parser) -> list[list[str]]:
    """Every example in the help of every command."""
    subparsers = [action for action in parser._actions if hasattr(action, "choices") and action.choices]
    found = []
    for action in subparsers:
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                lines = (child.epilog or "").splitlines()
                found += [shlex.split(line)[1:] for line in lines if line.strip().startswith("hrm-ray ")]
                found += examples_of(child)
    return found


def is_of_own_code(words: list[str]) -> bool:
    """Whether a command needs a model or task that a page shows how to add; tests/test_extend.py runs it."""
    return "arch=gated" in words or "recipe=latin.yaml" in words


COMMANDS = [words for words in commands_in(TEXT) if not is_of_own_code(words)]
COMMANDS += examples_of(build_parser())
COMMANDS += [
    ["train", *words.split()] for words in re.findall(r"\| `(experiment=[^`]+)` \|", TEXT)
]  # in tables


@pytest.mark.parametrize("words", sorted(set(map(tuple, COMMANDS))), ids=" ".join)
def test_every_command_in_the_pages_and_in_help_is_understood(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in EXAMPLES.items():
        Path(name).write_text(content)
    args = build_parser().parse_args(words)
    if args.command == "train":
        train_config(args.words)
    if args.command == "tune" and args.sweep not in VERBS:
        load_sweep(args.sweep, args.words)
    if words[:2] == ("data", "build"):
        build_options(args.words)
    if "options" in args and all("=" in word for word in args.words):  # the others are puzzles
        options_of(args)


def test_every_command_has_an_example():
    assert len(examples_of(build_parser())) >= 12


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """A toy dataset and a finished run on it."""
    toy_dataset(tmp_path / "data")
    launch.train(TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs")), show_progress=False)
    return tmp_path / "data", tmp_path / "runs" / "toy"


def test_eval_prints_one_json_object(trained, capsys):
    data, run = trained
    assert main(["eval", str(run), f"data={data}", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics.keys() == {
        f"eval/{name}"
        for name in (
            *("accuracy", "exact_accuracy", "q_halt_accuracy", "steps"),
            *("learned_exact_accuracy", "learned_steps"),
        )
    }
    summary = json.loads((run / "summary.json").read_text())
    assert metrics == pytest.approx(summary["best"])


def test_eval_saves_outputs(trained, tmp_path, capsys):
    data, run = trained
    out = tmp_path / "outputs.npz"
    words = [f"data={data}", "num_examples=10", "save_outputs=[logits,q_halt_logits,labels,logits]"]
    assert main(["eval", str(run), *words, f"out={out}"]) == 0
    arrays = np.load(out)
    assert {n: arrays[n].shape for n in arrays} == {
        "logits": (10, 16, 6),
        "q_halt_logits": (10,),
        "labels": (10, 16),
    }


def test_checkpoint_folder_and_run_folder_mean_the_same(trained, capsys):
    data, run = trained
    best = json.loads((run / "summary.json").read_text())["checkpoint"]
    outputs = []
    for path in (run, best):
        assert main(["eval", str(path), f"data={data}", "--json"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_solve_a_puzzle_a_file_and_a_dataset(trained, tmp_path, capsys):
    data, run = trained
    puzzle = ",".join("1234" * 4)
    file = tmp_path / "puzzles.txt"
    file.write_text(f"# two of them\n{puzzle}\n\n{puzzle}\n")
    of_dataset = [f"data={data}", "index=3", "count=4", "batch_size=3"]
    for words, count in (([puzzle], 1), ([str(file)], 2), (of_dataset, 4)):
        assert main(["solve", str(run), *words, "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(rows) == count
        assert all(0 <= row["confidence"] <= 1 and row["valid"] is None for row in rows)


def test_answering_keeps_memory_on_a_cpu(trained, monkeypatch):
    data, run = trained
    kept = []
    monkeypatch.setattr(memory, "keep_memory", lambda: kept.append(True))
    for command in ("eval", "solve"):
        assert main([command, str(run), f"data={data}", "--json"]) == 0
    assert kept == ([] if torch.cuda.is_available() else [True] * 2)


def test_exported_checkpoint_comes_back_the_same(trained, tmp_path, capsys):
    data, run = trained
    assert main(["export-checkpoint", str(run), f"out={tmp_path / 'theirs'}"]) == 0
    assert (
        main(["import-checkpoint", str(tmp_path / "theirs"), f"out={tmp_path / 'ours'}", f"data={data}"]) == 0
    )
    capsys.readouterr()
    outputs = []
    for path in (run, tmp_path / "ours"):
        assert main(["eval", str(path), f"data={data}", "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == pytest.approx(outputs[1])


def test_training_goes_on_from_published_weights_as_load_checkpoint_is_answered(trained, tmp_path, capsys):
    data, run = trained
    theirs = tmp_path / "of others"
    assert main(["export-checkpoint", str(run), f"out={theirs}"]) == 0
    other = theirs / "step_20"
    (theirs / "checkpoint").rename(other)
    weights = torch.load(other, weights_only=True)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, other)
    torch.save({"model": weights, "step": 12}, theirs / "step_9")  # the one that is wanted
    words = [f"data={data}", f"storage={run.parent}", "scaling=local", "compile=false", *TINY]
    assert main(["train", *words, f"load_checkpoint={theirs / 'step_9'}"]) == 2
    said = capsys.readouterr().err
    command = re.search(r"first hrm-ray (.*), then give (.*) in its place", said)
    first, instead = (
        shlex.split(part.replace("NAME", "warm").replace("runs/", f"{run.parent}/"))
        for part in command.groups()
    )
    assert main([*first, f"data={data}"]) == 0
    assert main(["train", *words, *instead, "epochs=1", "max_steps=1", "eval_interval=null"]) == 0
    assert "from the weights of" in capsys.readouterr().err
    taken = Checkpoint(Storage(run.parent / "warm-before-1/checkpoints/step-00000000"))
    assert all(tensor.any() for tensor in taken.tensors(MODEL_FILE).values() if tensor.dim() == 2)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "training uses" in printed and "torch" in printed
    attention = next(line for line in printed.splitlines() if line.startswith("attention"))
    assert all(name in attention for name in ("is used", "flash2 needs a GPU", "sdpa"))
    assert "models compile with" in printed


def sudoku_dataset(out: Path) -> None:
    """A 4x4 Sudoku data set of one puzzle."""
    task = get_task("sudoku", size=4)
    answer = task.parse("1234341221434321")[None]
    with DatasetWriter(out) as writer:
        splits = {}
        for name in ("train", "test"):
            split = writer.split(name, task, balanced_cuts(np.ones(1, np.int64), 10))
            question = np.where(np.arange(16) == 0, answer, 1).astype(np.uint8)
            split.add(question, answer, np.zeros(1, np.int32), np.zeros(1, np.int64), np.zeros(1, np.int64))
            splits[name] = split.finish()
        manifest = Manifest(
            task="sudoku",
            task_options={"size": 4},
            vocab_size=6,
            seq_len=16,
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            num_puzzle_identifiers=1,
            seed=0,
            recipe={},
            source_digest="",
            report={},
            splits=splits,
        )
        writer.finish(manifest)


TINY = ["global_batch_size=8", "device=cpu", *(f"arch.{key}={value}" for key, value in ARCH.items())]
MISTAKES = [
    (["eval", "{run}", "data={missing}"], "no dataset folder"),
    (["eval", "{missing}", "data={data}"], "no such folder; give a checkpoint or a run folder"),
    (["eval", "{data}", "data={data}"], "checkpoint"),
    (["eval", "{run}", "data={sudoku}"], "task is sudoku, the model was trained with tokens"),
    (["eval", "{run}", "data={data}", "split=tset"], "no split 'tset'; it has: train, test"),
    (["eval", "{run}", "data={data}", "splt=test"], "unknown key 'splt'; did you mean 'split'?"),
    (["eval", "{run}", "data={data}", "save_outputs=[logits]"], "go together"),
    (["eval", "{run}", "data={data}", "save_outputs=[logit]", "out={missing}"], "unknown 'logit'"),
    (["eval", "{run}"], "eval: 'data' is not given; add data=VALUE"),
    (
        ["eval", "{run}", "data={data}", "num_examples=abc"],
        "num_examples='abc': give a whole number above 0",
    ),
    (["eval", "{run}", "data={data}", "num_examples=2.5"], "num_examples=2.5: "),
    (["eval", "{run}", "data={data}", "num_examples=-3"], "num_examples=-3: input should be greater than 0"),
    (["eval", "{run}", "data={data}", "num_examples=0"], "num_examples=0: input should be greater than 0"),
    (
        ["eval", "{run}", "data={data}", "num_examples=0x_"],
        "num_examples='0x_': give a whole number above 0",
    ),
    (["eval", "{run}", "data={data}", "num_examples="], "num_examples= is empty"),
    (["eval", "{run}", "data={data}", "batch_size=x"], "batch_size='x': give a whole number above 0"),
    (["eval", "{run}", "data={data}", "batch_size=0"], "batch_size=0: input should be greater than 0"),
    (["eval", "{run}", "data={data}", "save_outputs=[logits]", "out={missing}/x.npz"], "there is no folder"),
    (["eval", "{run}", "data={data}", "save_outputs=[logits]", "out={data}"], "is a folder; give a file"),
    (["eval", "{run}", "data={data}", "save_outputs=[logits]", "out=/proc/x.npz"], "/proc/x.npz"),
    (["eval", "{run}", "data={data}", "paths=4"], "paths=4 are all alike without noise; give noise="),
    (["eval", "{run}", "data={data}", "seed=5"], "seed=5 is of the noise, and there is none; give noise="),
    (
        ["eval", "{run}", "data={data}", "select=residual"],
        "select=residual chooses among tries, and there is one",
    ),
    (["solve", "{run}", "data={data}", "select=q"], "select=q chooses among tries, and there is one"),
    (["eval", "{run}", "data={data}", "noise=-1"], "noise=-1: input should be greater than or equal to 0"),
    (["eval", "{run}", "data={data}", "select=valid"], "select=valid: task tokens cannot check answers"),
    (["eval", "{run}", "data={data}", "paths=[]"], "paths=[] is empty"),
    (["eval", "{run}", "data={data}", "depths=[1,0]"], "depths"),
    (["eval", "{run}", "data={data}", "depths=[1]", "halt_max_steps=2"], "leave out halt_max_steps="),
    (
        ["eval", "{run}", "data={data}", "depths=[1]", "out=x.npz"],
        "out=x.npz: end the name of the plot in one of .png, .svg, .pdf",
    ),
    (["eval", "{run}", "data={data}", "depths=2", "save_outputs=logits", "out=x.png"], "not for a table"),
    (["eval", "{run}", "data={data}", "submission={missing}"], "submission= is for the test split of an ARC"),
    (["solve", "{run}", "data={data}", "paths=3", "select=first"], "select='first'"),
    (["solve", "{run}", "data={data}", "select=valid"], "select=valid: task tokens cannot check answers"),
    (["solve", "{run}", "data={data}", "index=foo"], "solve: index='foo': give a whole number from 0"),
    (["solve", "{run}", "data={data}", "count=0"], "count=0: input should be greater than 0"),
    (["solve", "{run}"], "give one puzzle (in quotes, if it has spaces), one file, or data=DIR"),
    (["solve", "{run}", "3", "-", "5"], "give one puzzle (in quotes, if it has spaces)"),
    (["solve", "{run}", "{binary}"], "is no text file"),
    (["solve", "{run}", "{binary}", "count=3"], "solve: count= is for data=DIR; leave it out"),
    (["solve", "{run}", "split=train", "1,2,3"], "split= is for data=DIR; leave it out"),
    (["solve", "{run}", "1,2,3"], "3 tokens; 16 are needed"),
    (["solve", "{run}", "data={data}", "index=24"], "holds examples 0..23"),
    (["train", "experiment=quickstrat"], "did you mean 'quickstart'?"),
    (["train", "experiment=sudoku_4x4", "data={missing}"], "no dataset folder"),
    (["train", "data={data}", "scaling=local", "storage=/proc/x", *TINY], "/proc/x"),
    (["train", "data={data}", "run_name=a/b"], "run_name=a/b must be a plain folder name"),
    (["train", "data={data}", "run_name="], "run_name= is empty"),
    (["train", "data={data}", "lrr=1"], "unknown key 'lrr'; did you mean 'lr'?"),
    (["train", "data={data}", "device=cuda", "scaling=local", "storage={missing}"], "no GPU"),
    (["import-checkpoint", "{data}", "out={missing}"], "not a published checkpoint folder"),
    (["export-checkpoint", "{run}", "out={data}"], "exists; choose another out="),
    (["data", "show", "{data}", "index=64"], "64"),
    (["data", "show", "{data}", "index=-1"], "data show: index=-1: "),
    (["data", "build", "recipe=sudoku_4x4", "out=/proc/x"], "cannot write to /proc/x"),
    (["data", "build", "recipe=sudoku_4x4", "out={missing}", "overwite=true"], "did you mean 'overwrite'?"),
    (["data", "build", "recipe=sudoku_4x4", "out={missing}", "overwrite=5"], "overwrite=5: "),
    (["data", "build", "recipe=sudoku_4x4"], "data build: 'out' is not given; add out=VALUE"),
    (["data", "build", "recipe={binary}.yaml", "out={missing}"], "is no valid YAML"),
    (["data", "import-npy", "{data}"], "data import-npy: 'out' is not given"),
    (["data", "info", "{missing}"], "no dataset folder"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_end_in_one_line_and_exit_code_2(trained, tmp_path, capsys, words, said):
    data, run = trained
    sudoku_dataset(tmp_path / "sudoku")
    for name in ("binary", "binary.yaml"):
        (tmp_path / name).write_bytes(b"\xff\x00\xfe")
    names = {name: tmp_path / name for name in ("missing", "sudoku", "binary")} | {"data": data, "run": run}
    assert main([word.format(**names) for word in words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ")
    assert said in errors[-1]
    assert not (tmp_path / "missing").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"{hrm_ray.__version__}\n"


@pytest.mark.parametrize(
    "words", [["train", "arch=trm\r"], ["data", "info", "d\r"], ["train", "data=d", "\r"]]
)
def test_a_carriage_return_at_the_end_of_a_word_is_named(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert repr(words[-1]) in said and "carriage return: the script has Windows line ends" in said
    assert said.count("\n") == 1 and "\r" not in said


@pytest.mark.parametrize(
    "words", [[], ["trian"], ["eval"], ["train", "--resume"], ["data", "x"], ["config", "validate"]]
)
def test_mistakes_of_commands_and_flags_are_one_line_too(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: ")
        and said.endswith("--help' shows how it is used\n")
        and said.count("\n") == 1
    )


def test_eval_understands_the_published_word_for_a_checkpoint(trained, capsys):
    data, run = trained
    for words in ([f"checkpoint={run}", f"data={data}"], [f"data={data}", f"checkpoint={run}"]):
        assert main(["eval", *words, "--json"]) == 0
        assert "eval/accuracy" in json.loads(capsys.readouterr().out)
    assert main(["eval", f"data={data}"]) == 2
    assert "eval needs a checkpoint before data=" in capsys.readouterr().err


def test_config_lists_and_shows_everything_that_ships(capsys):
    assert main(["config", "ls"]) == 0
    listed = capsys.readouterr().out
    for names in (choices("experiment"), choices("arch"), recipe_names(), sweep_names(), machine_files()):
        assert all(f"  {name} " in listed for name in names)
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert "lr=0.0001 " in shown and "Learning rate of all weights but puzzle embeddings" in shown
    for key in known_keys(TrainConfig):
        assert re.search(rf"^{re.escape(key)}[= ]", shown, flags=re.M), key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr"], "lr=0.0001"),
        (["scaling"], "scaling.num_workers=1"),
        (["trm"], "arch.puzzle_emb_len=16"),
        (["recipe"], "recipe:grid, recipe:sudoku:\nnum_aug=0 "),
        (["recipe"], "recipe:arc:\ntask=arc "),
        (["recipe:maze"], "task=maze "),
        (["num_aug"], "recipe:arc:\nnum_aug=1000 "),
        (["sweep"], "budget.cpu_hours=null"),
        (["sudoku_4x4_lr"], "num_trials: 32"),
        (["machine"], "flops_per_s.value=VALUE"),
        (["h200"], "price_per_hour: {value: "),
        (["quickstart"], "hidden_size: 128"),
        (["experiment=sudoku_4x4", "arch=trm", "lr=0.5"], "arch.puzzle_emb_len=16"),
    ],
)
def test_config_shows(words, said, capsys):
    assert main(["config", "show", *words]) == 0
    assert said in capsys.readouterr().out


def test_config_shows_the_recipe_of_a_family_without_those_of_others(capsys):
    assert main(["config", "show", "recipe:maze"]) == 0
    shown = capsys.readouterr().out
    keys = {line.partition("=")[0] for line in shown.splitlines() if line[0] != " "}
    assert keys == set(known_keys(recipe_class("maze")))
    assert main(["config", "show", "recipe:mace"]) == 2
    assert "unknown task 'mace'; did you mean 'maze'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown key 'zzz'; 'hrm-ray config show recipe:maze' lists all"):
        load_recipe("maze_small", {"zzz": 1})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=sudoku_4x4", "lr=1e-3"], None),
        (["experiment=sudoku_4x4", "lrr=1e-3"], "unknown key 'lrr'; did you mean 'lr'?"),
        (["sudoku_4x4_lr", "num_trials=3"], None),
        (["sudoku_4x4_lr", "num_trials=0"], "num_trials=0"),
        (["sudoku_4x4_lr", "space.lrr=[1]"], "space: unknown key 'lrr'; did you mean 'lr'?"),
        (["sudoku_4x4_lr", "zzz=1"], "train: unknown key 'zzz'; 'hrm-ray config show' lists all"),
        (["sudoku_4x4_lr", "+arch=trm", "evaluators=[]"], None),
        (["sudoku_4x4"], None),
        (["sudoku_4x4", "num_train=x"], "num_train='x'"),
        (["recipe=sudoku_4x4", "out=o"], None),
        (["recipe=sudoku_4x4"], "'out' is not given"),
        (["{sweep}"], None),
        (["{recipe}"], "num_clues"),
        (["{recipe}", "num_clues=6"], None),
        (["nothing"], "there is no recipe or sweep 'nothing'"),
        (["nothing.yaml"], "nothing.yaml does not exist"),
    ],
)
def test_config_validates(words, said, tmp_path, capsys):
    names = {"sweep": tmp_path / "s.yaml", "recipe": tmp_path / "r.yaml"}
    names["sweep"].write_text("train: experiment=sudoku_4x4\nspace: {lr: [1e-3, 1e-2]}\n")
    names["recipe"].write_text("size: 4\nsource: generator\nnum_train: 1\nnum_test: 1\n")
    code = main(["config", "validate", *(word.format(**names) for word in words)])
    printed = capsys.readouterr()
    if said is None:
        assert (code, printed.out) == (0, "ok\n")
    else:
        assert code == 2 and said in printed.err


def test_a_short_run_stays_in_the_published_warmup_and_says_so(trained, capsys):
    data, run = trained
    words = [f"data={data}", f"storage={run.parent}", "scaling=local", "run_name=short", "epochs=2", *TINY]
    assert main(["train", *words, "tensorboard=false", "compile=false", "eval_interval=1"]) == 0
    said = capsys.readouterr().err
    assert "warning: lr_warmup_steps=2000 is longer than the run's 16 steps" in said


def test_a_run_of_another_model_is_refused_before_anything_starts(trained, capsys):
    data, run = trained
    words = [f"data={data}", f"storage={run.parent}", "run_name=toy"]
    words += [*TINY, "arch.H_cycles=3"]
    assert main(["train", *words]) == 2
    assert "arch.H_cycles=2, not 3" in capsys.readouterr().err


def test_an_error_of_the_system_that_names_no_file_is_no_mistake_of_the_user(monkeypatch):
    def broken() -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hrm_ray.doctor.report", broken)
    with pytest.raises(OSError, match="Input/output"):
        main(["doctor"])


@pytest.fixture
def sudoku_run(tmp_path) -> Path:
    """A run on 4x4 Sudoku which has learned nothing."""
    sudoku_dataset(tmp_path / "sudoku")
    values = toy_config(
        tmp_path / "sudoku",
        tmp_path / "runs",
        global_batch_size=1,
        max_steps=1,
        run_name="sudoku",
        lr_warmup_steps=0,
    )
    launch.train(TrainConfig(**values), show_progress=False)
    return tmp_path / "runs" / "sudoku"


def test_thinking_time_and_votes(sudoku_run, tmp_path, capsys):
    data, puzzle = f"data={tmp_path / 'sudoku'}", "1..............."
    for words, steps in (
        ([], 4),
        (["halt_max_steps=7"], 7),
        (["votes=3"], 12),
        (["halt=learned"], None),
        (["halt=learned", "halt_threshold=0.1"], 1),
        (["halt=learned", "halt_threshold=0.9"], 4),
    ):
        assert main(["eval", str(sudoku_run), data, *words, "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["eval/steps"] == steps or (steps is None and 1 <= metrics["eval/steps"] <= 4)
        assert ("eval/learned_steps" in metrics) == ("halt=learned" not in words)
        assert main(["solve", str(sudoku_run), puzzle, *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["steps"] == (steps or metrics["eval/steps"])
    assert main(["eval", str(sudoku_run), data, "votes=25"]) == 2
    assert "4x4 Sudoku has only 24 relabelled copies" in capsys.readouterr().err


def test_paths(sudoku_run, tmp_path, capsys):
    data, puzzle, noise = f"data={tmp_path / 'sudoku'}", "1...............", ["paths=3", "noise=1"]
    for words, steps in (
        (noise, 12),
        ([*noise, "votes=2", "select=q"], 24),
        ([*noise, "select=first_halt"], None),
    ):
        assert main(["eval", str(sudoku_run), data, *words, "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["eval/steps"] == steps or steps is None
        assert ("eval/learned_steps" in metrics) == (steps is not None) and "eval/answered" not in metrics
    assert main(["eval", str(sudoku_run), data, *noise, "select=valid", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval/answered"] == 0 and metrics["eval/steps"] == 12
    assert main(["solve", str(sudoku_run), puzzle, *noise, "select=valid", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] is None and row["valid"] is False and row["steps"] == 12
    assert main(["solve", str(sudoku_run), puzzle, *noise, "select=valid"]) == 0
    assert "none of 3 tries is valid, so no answer is given: 1..............." in capsys.readouterr().out


def test_paths_are_the_same_in_every_batch(sudoku_run, tmp_path):
    saved = []
    for size in (1, 5, 256):
        out = tmp_path / f"{size}.npz"
        words = [f"data={tmp_path / 'sudoku'}", "paths=3", "noise=1", f"batch_size={size}", f"out={out}"]
        assert main(["eval", str(sudoku_run), *words, "save_outputs=[predictions,q_halt_logits]"]) == 0
        saved.append(np.load(out))
    for other in saved[1:]:
        np.testing.assert_array_equal(other["predictions"], saved[0]["predictions"])
        np.testing.assert_allclose(other["q_halt_logits"], saved[0]["q_halt_logits"], rtol=1e-4)


def test_a_table_over_depths_and_paths(sudoku_run, tmp_path, capsys):
    out, words = tmp_path / "plot.svg", [f"data={tmp_path / 'sudoku'}", "noise=1"]
    table = ["depths=[4,1]", "paths=[2,1]", f"out={out}"]
    assert main(["eval", str(sudoku_run), *words, *table, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["table"]
    assert [(row["depth"], row["paths"]) for row in rows] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert out.read_bytes().startswith(b"<?xml")
    assert main(["eval", str(sudoku_run), *words, *table]) == 0  # its plot may be replaced
    assert "any right" in capsys.readouterr().out
    out.write_text("mine")
    assert main(["eval", str(sudoku_run), *words, *table]) == 2
    assert "is there, and no plot; move it away" in capsys.readouterr().err and out.read_text() == "mine"


def test_voted_logits_are_in_the_puzzles_own_labels(sudoku_run, tmp_path):
    out = tmp_path / "out.npz"
    words = ["eval", str(sudoku_run), f"data={tmp_path / 'sudoku'}", "votes=5", f"out={out}"]
    assert main([*words, "save_outputs=[logits,predictions]"]) == 0
    saved = np.load(out)
    np.testing.assert_array_equal(saved["logits"].argmax(-1), saved["predictions"])


def test_solve_refuses_what_has_no_solution_and_remarks_on_several(sudoku_run, tmp_path, capsys):
    file = tmp_path / "puzzles.txt"
    for puzzle, said in (
        ("11..............", "its clues contradict: 1 twice in row 1"),
        ("123....4........", "it has no solution"),
    ):
        assert main(["solve", str(sudoku_run), puzzle]) == 2
        assert capsys.readouterr().err == f"error: '{puzzle}' is no file and no puzzle to solve: {said}\n"
        file.write_text(f"# one\n{puzzle}\n")
        assert main(["solve", str(sudoku_run), str(file)]) == 2
        assert capsys.readouterr().err == f"error: {file}:2: {said}\n"
    assert main(["solve", str(sudoku_run), "1...............", "--json"]) == 0
    printed = capsys.readouterr()
    assert "has several solutions" in printed.err and json.loads(printed.out)["puzzle"] == "1..............."
    assert main(["solve", str(sudoku_run), "12343412214343.."]) == 0
    assert capsys.readouterr().err == ""


PUZZLE, GRID = "...1.2....3.4...", "...1\n.2..\n..3.\n4...\n"


@pytest.mark.parametrize(
    "word", [PUZZLE.replace(".", blank) for blank in "*-=?_ "] + [GRID, " ".join(PUZZLE)]
)
def test_solve_takes_a_puzzle_with_any_character_for_a_blank(sudoku_run, capsys, word):
    assert main(["solve", str(sudoku_run), word, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["puzzle"] == PUZZLE


def test_words_that_begin_with_dashes(sudoku_run, capsys):
    for words in (
        ["data", "verify", "x", "---1"],
        ["solve", str(sudoku_run), "--jsno"],
        ["solve", str(sudoku_run), "--1", "-x"],
    ):
        assert main(words) == 2
        assert "unrecognized arguments: " + words[-1] in capsys.readouterr().err.replace("--1 ", "")
    assert main(["solve", str(sudoku_run), "---1-2"]) == 2
    assert "error: '---1-2' is no file and no puzzle to solve: " in capsys.readouterr().err


def test_solve_a_file_of_any_layout(sudoku_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["solve", str(sudoku_run), PUZZLE]) == 0
    printed = capsys.readouterr().out
    contents = {
        "lr=0.1.txt": PUZZLE,
        "index=1": GRID,
        "a.CSV": f"id;quizzes\n1;{PUZZLE}",
        "a.json": f'["{PUZZLE}"]',
    }
    for name, content in contents.items():
        Path(name).write_text(content)
        with zipfile.ZipFile("all.zip", "a") as archive:
            archive.write(name)
        assert main(["solve", str(sudoku_run), f"all.zip/{name}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["puzzle"] == PUZZLE
        assert main(["solve", str(sudoku_run), name, "--json"]) == 0
        row = capsys.readouterr().out
        assert json.loads(row)["puzzle"] == PUZZLE
    for name, content in {"a.jsonl": row, "printed.txt": printed}.items():
        Path(name).write_text(content)
        status = main(["solve", str(sudoku_run), name, "--json"])
        output = capsys.readouterr()
        if "!" in content:  # it changed a clue, which is lost
            assert status == 2 and "a digit marked ! is not the clue" in output.err
        else:
            assert status == 0 and json.loads(output.out)["puzzle"] == PUZZLE


def test_solve_names_file_and_line_of_what_it_cannot_read(sudoku_run, tmp_path, capsys):
    file = tmp_path / "a"
    for content, said in {
        f"q,a\n{PUZZLE},\n\n12,\n": ":4: 2 characters; a 4x4 Sudoku has 16",
        GRID + "\n...1\n.2..\n": ":6: 2 rows of 4 cells; a grid has 4",
        f"{PUZZLE}\n\x1b[31m\n": ":2: impossible digit '\\x1b' in row 1, column 1",
        "# nothing": " holds no puzzle",
    }.items():
        file.write_text(content)
        assert main(["solve", str(sudoku_run), str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {file}{said}")


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_an_interrupt_at_the_start_is_not_lost(tmp_path, handler):
    """Where an import, say, takes any exception for something missing; or in a script's background job, which starts
    with SIGINT ignored."""
    code = """
import os, signal, time
from hrm_ray import cli
from hrm_ray.training import launch

def announce(self):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except BaseException:
        pass
    return "went on"

launch.Launch.__init__ = lambda self, config: None
launch.Launch.announce = announce
cli.main(["train", "data=DATA", "storage=DATA"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code.replace("DATA", str(tmp_path))],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert run.returncode == -signal.SIGINT
    assert "went on" not in run.stderr


def test_train_leaves_the_handlers_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", f"data={tmp_path}"]) == 2
    assert signal.getsignal(signal.SIGINT) is before
