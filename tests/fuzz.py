"""Random words and damaged files for every command: each must work, or end in one clear line.

    python -m tests.fuzz [--seed N] [--count N]

Everything runs in this process and without Ray, up to where the work of a command would begin. What fails is printed
with the fewest words that still fail.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from hrm_ray import cli
from hrm_ray.config.compose import GROUPS, aliases
from hrm_ray.config.inference import Inference
from hrm_ray.config.published_words import ABSENT, KEYS
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import known_keys
from hrm_ray.data.recipe import recipe_classes, recipe_folders, recipe_names
from hrm_ray.data.tasks.arc import place
from hrm_ray.errors import LONGEST
from hrm_ray.scale.work import Model, Pass
from hrm_ray.training.plan import Plan
from hrm_ray.tuning.config import SweepConfig, sweep_folders, sweep_names
from tests.damage import MANIFEST, damaged
from tests.toy import toy_config, toy_dataset

CPU_S = 20  # of one input, before it counts as a hang
EXAMPLES = SimpleNamespace(num_groups=1000, info=SimpleNamespace(mean_puzzle_examples=1.0))

NASTY = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "2.5",
        "1e3",
        "1e-3",
        "-0.0",
        "1e308",
        "-1e308",
        "1e999",
        ".inf",
        "inf",
        "nan",
        ".nan",
    ),
    *(
        "9" * 30,
        "-" + "9" * 30,
        "9" * 400,
        "9" * 5000,
        "0x1F",
        "0b1",
        "010",
        "1_000",
        "1:30",
        "2001-01-01",
        "1,2",
        "+1",
    ),
    *(
        "true",
        "false",
        "True",
        "yes",
        "off",
        "null",
        "None",
        "~",
        "NULL",
        "auto",
        "fast",
        "maybe",
        "x" * 3000,
    ),
    *(
        "[]",
        "[1]",
        "[1,2]",
        "[2,1]",
        "[1,2,3]",
        "[true,2]",
        "[1,null]",
        "[[1]]",
        "['a','b']",
        "[1e308,2]",
        "[" * 2000,
    ),
    *(
        "{}",
        "{a: 1}",
        "{name: x}",
        "{log: [1, 2]}",
        "{1: 2}",
        "{[1]: 2}",
        "{a: {b: {c: 1}}}",
        "{a:1}",
        "{" * 500,
    ),
    *(
        "!x",
        "!!python/object:os.system",
        "!!set {a}",
        "!!binary aGk=",
        "!!int x",
        "!!float .",
        "!!timestamp 1",
    ),
    *(
        "&a [*a]",
        "[&a 1, *a]",
        "*a",
        "<<",
        "{<<: 1}",
        "a: b: c",
        "'",
        '"',
        "'a",
        "- 1",
        "? 1",
        "|",
        ">",
        "%",
        "@x",
        "`x",
    ),
    *(
        "${lr}",
        "${.hidden_size}",
        "${",
        "${x",
        "${oc.env:NOPE}",
        "${arch}",
        "${epochs}",
        "${nope:1}",
        "$",
        "${${lr}}",
    ),
    *(
        "a\nb",
        "a\rb",
        "trm\r",
        "\t",
        "\x00",
        "\x1b[31m",
        "\x85",
        "\u2028",
        "\ud800",
        "é",
        "日本",
        "🧩",
        "\u202e",
        "a=b",
    ),
    *(
        "..",
        ".",
        "/",
        "a/b",
        "~",
        "~/x",
        "/dev/null",
        "/proc/self/mem",
        "s3://b/p",
        "file:///x",
        "x://",
        "://",
        "?",
        "a?b",
    ),
)
NAMES = (
    "quickstart",
    "trm",
    "hrm_v1",
    "hrm",
    "act",
    "q_learning",
    "fixed",
    "local",
    "ray",
    "tpe",
    "grid",
    "none",
    "median",
)
FLAGS = ("--json", "--yes", "--dry-run", "--nope", "-x", "--", "-", "--help", "--version", "--seed=1", "-1")


class WorkBegins(Exception):
    """The words are understood."""


class Hang(BaseException):
    """An input took too long."""


def begin(*args: object, **keys: object) -> None:
    raise WorkBegins


class Inputs:
    """Draws command lines, some of which name damaged files below `folder`; by `seed` alone."""

    def __init__(self, seed: int, folder: Path):
        self.rng = random.Random(seed)
        self.folder = folder
        data = f"data={folder / 'data'}"
        arch = [
            f"arch.{key}"
            for key in ("H_cycles", "L_layers", "H_layers", "mlp_t", "puzzle_emb_len", "num_layers")
        ]
        train = [
            *known_keys(TrainConfig),
            *arch,
            *GROUPS,
            *aliases(),
            *KEYS,
            *ABSENT,
            "data_paths",
            "hydra.run.dir",
        ]
        sweep = [
            *known_keys(SweepConfig),
            "space.lr",
            "sampler.seed",
            "pruner.metric",
            "sampler.n_startup_trials",
        ]
        use = [*Inference.model_fields, "split", "batch_size"]
        self.commands: list[
            tuple[list[str], list[str], list[str]]
        ] = [  # what comes first, keys, words that go well
            (
                ["train"],
                train,
                [data, "experiment=sudoku_4x4", "arch=trm", "halting=q_learning", "scaling=local"],
            ),
            (["train"], train, [data, "experiment=sudoku_extreme_trm", "+run_name=x", "lr=1e-3"]),
            (["train", data], train, []),
            (
                ["config", "validate"],
                [*train, "recipe", "out"],
                [data, "experiment=sudoku_4x4", "sudoku_4x4_lr"],
            ),
            (["config", "show"], train, ["recipe", "sweep", "lr", "experiment=sudoku_4x4", "trm"]),
            (
                ["eval", str(folder / "run"), data],
                [*use, "depths", "num_examples", "save_outputs", "out"],
                [],
            ),
            (["solve", str(folder / "run")], [*use, "data", "index", "count"], [data, "1,2,3", "count=2"]),
            (
                ["data", "build"],
                [
                    *{key for kind in recipe_classes() for key in kind.model_fields},
                    "recipe",
                    "out",
                    "overwrite",
                ],
                ["recipe=sudoku_4x4", "out=o"],
            ),
            (["data", "show", str(folder / "data")], ["split", "index"], ["split=test"]),
            (
                ["data", "show", str(folder / "data")],
                ["split", "index", "out", "count", "copies", "run", "batch_size"],
                ["out=page.html", f"run={folder / 'run'}", "split=test"],
            ),
            (["data", "import-npy", str(folder)], ["out"], ["out=o"]),
            (["import-checkpoint", str(folder)], ["out", "data"], ["out=o"]),
            (["export-checkpoint", str(folder / "run")], ["out"], ["out=o"]),
            (["tune"], [*sweep, *train], ["sudoku_4x4_lr", "seeds", "num_trials=3", "lr=1e-3"]),
            (["tune", "sudoku_4x4_lr"], [*sweep, *train], ["budget.cpu_hours=2", "sampler=random"]),
            (["tune", "set", str(folder / "nowhere")], sweep, []),
            (["scale"], [*train, "machine", "workers"], [data, "workers=[1,4]", "machine=l40s", "--json"]),
            (
                ["vote", str(folder / "votes/outputs.npz"), f"data={folder / 'votes'}"],
                ["data", "submission"],
                ["submission=s.json", "--json"],
            ),
            (["vote", str(folder / "votes/outputs.npz")], ["data", "submission"], []),
            (
                ["plot", "grokking", str(folder / "history")],
                ["out", "percent", "chance"],
                ["out=x.svg", "percent=true", str(folder / "history/metrics.csv")],
            ),
            (["doctor", "x"], ["lr"], []),
            ([], ["lr"], ["train", "eval", "data", "tune"]),
        ]

    def line(self) -> list[str]:
        """A command line."""
        first, keys, good = self.rng.choice(self.commands)
        words = [self._word(keys, good) for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3, 5)))]
        return [*first, *self.rng.sample(good, self.rng.randint(0, len(good))), *words]

    def _word(self, keys: Sequence[str], good: Sequence[str]) -> str:
        draw = self.rng.random()
        if draw < 0.03:
            return self.rng.choice(FLAGS)
        if draw < 0.06:
            return self.value()
        key = self.rng.choice(keys)
        if draw < 0.15:
            key = self._misspelt(key)
        return f"{key}={self.value()}"

    def _misspelt(self, key: str) -> str:
        at = self.rng.randrange(len(key))
        more = self.rng.choice(("", "x", ".", "+", "~", "\r", "=", " ", "_", "é", "++", "..", "x" * 900))
        return self.rng.choice(
            (key[:at] + more + key[at + 1 :], more + key, key.upper(), key[:at] + more + key[at:])
        )

    def value(self) -> str:
        draw = self.rng.random()
        if draw < 0.75:
            return self.rng.choice(NASTY)
        if draw < 0.9:
            return self.rng.choice(NAMES)
        return "".join(
            self.rng.choice("019.eE+-_,:[]{}!&*#|>'\"%@`~ \n\\$abtruefalsn")
            for _ in range(self.rng.randint(1, 12))
        )

    def yaml_line(self) -> list[str]:
        """A command line that reads a damaged recipe or sweep."""
        is_recipe = self.rng.random() < 0.5
        folders, names = (recipe_folders(), recipe_names()) if is_recipe else (sweep_folders(), sweep_names())
        text = (folders[0] / f"{self.rng.choice(names)}.yaml").read_text()
        file = self.folder / ("recipe.yaml" if is_recipe else "sweep.yaml")
        file.write_bytes(self._damaged(text))
        lines = [["config", "validate", str(file)]]
        lines += [["data", "build", f"recipe={file}", "out=o"]] if is_recipe else [["tune", str(file)]]
        return self.rng.choice(lines)

    def _damaged(self, text: str) -> bytes:
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        for _ in range(self.rng.randint(1, 3)):
            at = self.rng.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            kind = self.rng.randrange(6)
            if kind < 3:
                lines[at] = f"{key}: {self.value()}" if colon else self.value()
            elif kind == 3:
                lines.insert(at, f"{self._misspelt(key or 'x')}: {self.value()}")
            elif kind == 4:
                lines[at] = lines[at].replace(self.rng.choice("[]{}:,"), self.value(), 1)
            else:
                del lines[at:]
                lines.append(self.value())
        content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
        if self.rng.random() < 0.2 and content:
            content[self.rng.randrange(len(content))] = self.rng.randrange(256)
        return bytes(content)


HISTORIES = ("training_history.json", "metrics.csv")


def make_files(folder: Path) -> None:
    """A data set, a run of a few steps, and saved outputs with what they are compared to, to be named and damaged."""
    from hrm_ray.training import launch

    toy_dataset(folder / "data", num_train=8, num_test=8, rows_per_shard=8)
    arch = {
        "hidden_size": 8,
        "num_heads": 1,
        "H_layers": 1,
        "L_layers": 1,
        "halt_max_steps": 1,
        "puzzle_emb_ndim": 0,
    }
    config = toy_config(folder / "data", folder, run_name="run", arch=arch, max_steps=1, lr_warmup_steps=0)
    launch.train(TrainConfig(**config), show_progress=False)
    history = folder / "history"
    history.mkdir()
    shutil.copy(folder / "data" / MANIFEST, history)  # what damages folders looks for one
    lists = {name: [0.1, 0.5, 1.0] for name in ("train_loss", "train_acc", "test_loss", "test_acc")}
    as_json, as_csv = (history / name for name in HISTORIES)
    as_json.write_text(json.dumps({"epoch": [1, 2, 3], **lists}))
    as_csv.write_text("step,epoch,train_accuracy,val_accuracy\n1,1,50,2\n2,2,100,54\n")
    votes = folder / "votes"
    votes.mkdir()
    shutil.copy(folder / "data" / MANIFEST, votes)
    (votes / "identifiers.json").write_text('["<blank>", "a", "a|||t1|||0213456789"]')
    pairs = '[{"input": [[1, 2]], "output": [[3]]}, {"input": [[4]], "output": [[5, 6]]}]'
    (votes / "test_puzzles.json").write_text(f'{{"a": {{"train": [], "test": {pairs}}}}}')
    tokens = np.stack([place(np.array([[1, 2]]))] * 4)
    np.savez(
        votes / "outputs.npz",
        inputs=tokens,
        preds=tokens,
        puzzle_identifiers=np.ones(4, np.int32),
        q_halt_logits=np.zeros(4, np.float32),
    )


@contextlib.contextmanager
def no_work(folder: Path) -> Iterator[None]:
    """Inside, commands go as far as their work."""

    def launch(config: TrainConfig) -> None:
        plan = Plan.of(config, EXAMPLES)  # type: ignore[arg-type]
        plan.describe(), plan.warnings(), plan.values(1), plan.evaluates(1)
        raise WorkBegins

    parser = cli.build_parser()
    solver = cli.evaluate.load_solver(str(folder / "run"))
    counted = Model(1_000_000, Pass(1e9, 100), Pass(3e8, 40))
    with contextlib.ExitStack() as stack:
        for name, replacement in {
            "hrm_ray.cli.build_parser": lambda: parser,
            "hrm_ray.cli.train.interrupts_end_the_process": contextlib.nullcontext,
            "hrm_ray.cli.tune.interrupts_end_the_process": contextlib.nullcontext,
            "hrm_ray.training.launch.Launch": launch,
            "hrm_ray.tuning.sweep.run_sweep": begin,
            "hrm_ray.data.pipeline.build": begin,
            "hrm_ray.cli.solve.load_solver": lambda checkpoint: solver,
            "hrm_ray.cli.data.load_solver": lambda checkpoint: solver,
            "hrm_ray.api.Solver.solve": begin,
            "hrm_ray.api.Solver.every_step": begin,
            "hrm_ray.api.Solver.evaluate": begin,
            "hrm_ray.api.Solver.survey": begin,
            "hrm_ray.interop.checkpoint.import_checkpoint": begin,
            "hrm_ray.interop.checkpoint.export_checkpoint": begin,
            "hrm_ray.interop.dataset.import_npy": begin,
            "hrm_ray.evaluation.votes.Votes.add": begin,
            "hrm_ray.scale.work.Model.of": lambda *args: counted,
            "hrm_ray.grokking.figure.draw": begin,
            "hrm_ray.doctor.report": begin,
        }.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def outcome(line: Sequence[str]) -> str:
    """What a command line comes to: "done", "refused", or what is wrong with how it ended."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(line)
    except WorkBegins:
        return "done"
    except SystemExit as end:
        return "done" if not end.code else f"exits with {end.code}"
    except Hang:
        return f"takes more than {CPU_S} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    said = err.getvalue().removesuffix("\n").split("\n")
    if code == 0:
        return "done"
    if code not in (1, 2):
        return f"exits with {code}"
    for text in said:
        if not text.startswith("error: ") or not text.removeprefix("error: ").strip():
            return f"says {text[:200]!r}"
        if not text.isprintable():
            return f"control characters in {text[:200]!r}"
        if len(text) > LONGEST + len("error: "):
            return f"{len(text)} characters: {text[:100]}"
    return "refused" if len(said) == 1 or line[:2] == ["data", "verify"] else f"{len(said)} lines"


def smallest(line: list[str], found: str) -> list[str]:
    """The line without the words that it fails without."""
    kind = found.partition(":")[0]
    for at in reversed(range(len(line))):
        shorter = line[:at] + line[at + 1 :]
        if outcome(shorter).partition(":")[0] == kind:
            line = shorter
    return line


def fuzz(seed: int, count: int, say: Callable[[str], object] = print) -> tuple[Counter[str], list[str]]:
    """Try `count` inputs.

    Returns:
        how many were done and refused, and what is wrong with the others, each a kind with its smallest input.
    """
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}

    def took_too_long(*args: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, took_too_long)
    folder = Path(tempfile.mkdtemp(prefix="hrm-ray-fuzz-"))
    here = Path.cwd()
    try:
        make_files(folder)
        inputs = Inputs(seed, folder)
        checkpoint = next((folder / "run" / "checkpoints").iterdir())
        votes, history = folder / "votes", folder / "history"
        on_folders = [  # a folder, and command lines that read it
            (folder / "data", [["data", kind, str(folder / "data")] for kind in ("info", "verify", "show")]),
            (checkpoint, [["eval", str(folder / "run"), f"data={folder / 'data'}"]]),
            (votes, [["vote", str(votes / "outputs.npz"), f"data={votes}"]]),
            (history, [["plot", "grokking", str(history / name)] for name in HISTORIES]),
        ]
        with no_work(folder), contextlib.chdir(folder):
            for number in range(count):
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
                about, shrink = "", True
                if number % 10 == 0:
                    line = inputs.yaml_line()
                    file = folder / (
                        "recipe.yaml" if "recipe" in line[-1] or "recipe" in line[-2] else "sweep.yaml"
                    )
                    about, shrink = f" holding {file.read_bytes()!r:.600}", False
                    found = outcome(line)
                elif number % 10 == 1:
                    there, lines = on_folders[number // 10 % len(on_folders)]
                    line = inputs.rng.choice(lines)
                    with damaged(there, inputs.rng.randrange(10**6)) as what:
                        found, about, shrink = outcome(line), f" after {what}", False
                else:
                    line = inputs.line()
                    found = outcome(line)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                counts[found if found in ("done", "refused") else "failed"] += 1
                if found not in ("done", "refused") and found[:60] not in failures:
                    line = smallest(line, found) if shrink else line
                    failures[found[:60]] = f"{found}\n    {line!r:.700}{about}"
                    say(failures[found[:60]])
    finally:
        signal.signal(signal.SIGVTALRM, before)
        shutil.rmtree(folder, ignore_errors=True)
        assert Path.cwd() == here
    return counts, list(failures.values())


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    options.add_argument("--count", type=int, default=50_000)
    given = options.parse_args()
    print(f"--seed {given.seed} --count {given.count}")
    totals, wrong = fuzz(given.seed, given.count)
    print(", ".join(f"{number:,} {what}" for what, number in sorted(totals.items())))
    sys.exit(bool(wrong))
