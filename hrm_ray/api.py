"""Library use: load a trained model, solve puzzles with it, measure it; train one, run a sweep.

import hrm_ray
for solution in hrm_ray.load("runs/quickstart").solve(["1...|..."]):
    print(solution.answer, solution.confidence, solution.is_valid)
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hrm_ray import machine, memory
from hrm_ray.config.compose import train_config
from hrm_ray.config.halting import halting_of
from hrm_ray.config.inference import Inference
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import as_text, validated
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.data.tasks.base import Task, get_task
from hrm_ray.errors import UserError
from hrm_ray.evaluation.evaluate import OUTPUTS, evaluate, thinker_of
from hrm_ray.evaluation.scores import Score
from hrm_ray.evaluation.survey import Row, survey
from hrm_ray.models.act import IGNORE, Batch
from hrm_ray.models.inference import Thinker
from hrm_ray.models.registry import build_model
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import Checkpoint, find
from hrm_ray.training.state import identifiers_of
from hrm_ray.world import World

if TYPE_CHECKING:
    from hrm_ray.tuning.config import SweepConfig
    from hrm_ray.tuning.sweep import SweepResult


class Puzzle(NamedTuple):
    """A question of a data set.

    Attributes:
        tokens: uint8 [seq_len].
        identifier: number of its puzzle identifier, by which a model may know it.
    """

    tokens: np.ndarray
    identifier: int


@dataclass(frozen=True)
class Solution:
    """A model's answer to one puzzle.

    Attributes:
        puzzle, answer: one-line texts of the task; no answer, None, where none is valid and `select` is "valid".
        tokens: the answer, uint8 [seq_len]; or None.
        confidence: the model's own probability that the answer is exactly right, 0..1, by its Q head, or without one
            by its logits; of several that vote, the mean over all, where those that disagree count 0.
        num_steps: ACT steps it took, over all copies and paths.
        is_valid: whether the answer obeys the rules and keeps the clues; None if the task cannot tell.
    """

    puzzle: str
    answer: str | None
    tokens: np.ndarray | None
    confidence: float
    num_steps: int
    is_valid: bool | None


class Steps(NamedTuple):
    """A model's answers to n puzzles after each of its S ACT steps.

    tokens uint8 [n, S, seq_len]; confidence float32 [n, S], see `Solution`; halts bool [n, S], whether its Q head would
    stop there: never without one.
    """

    tokens: np.ndarray
    confidence: np.ndarray
    halts: np.ndarray


class Solver:
    """A trained model with what it needs to read and check puzzles; made by `load`."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto", forward_dtype: str | None = None):
        self.checkpoint = checkpoint
        manifest = checkpoint.manifest
        self.task: Task = get_task(manifest.dataset.task, **manifest.dataset.task_options)
        self.setup = machine.resolve(
            device=device,
            forward_dtype=forward_dtype or manifest.config.get("forward_dtype", "auto"),
            num_tokens=manifest.arch.num_tokens(manifest.dataset.seq_len),
            head_dim=manifest.arch.hidden_size // manifest.arch.num_heads,
        )
        halting = halting_of(manifest.config, str(checkpoint.folder))
        with memory.needed_for(f"the model on {self.setup.device}", "free some, or take another device"):
            self.model = build_model(manifest.arch, manifest.dataset, self.setup, halting)
            self.model.inner.load_state_dict(checkpoint.weights())
        self.model.eval()

    def parse(self, puzzle: str, where: str = "") -> np.ndarray:
        """Tokens uint8 [seq_len] of a puzzle's text.

        Raises:
            UserError: no puzzle of the task, or one without solution as far as the task can tell; begins with `where`.
        """
        where = where or repr(puzzle)
        try:
            question = self.task.parse(puzzle)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if contradiction := self.task.contradiction(question):
            raise UserError(f"{where}: {contradiction}")
        if self.task.num_solutions(question) == 0:
            raise UserError(f"{where}: it has no solution")
        return question

    def questions(
        self, data: str | Path, *, split: str = "test", index: int = 0, count: int = 1
    ) -> list[Puzzle]:
        """Puzzles number index..index+count-1 of a dataset, to be solved.

        Raises:
            UserError: the dataset is of another kind than the model's, or has no such examples.
        """
        dataset = open_dataset(data)
        self.check(dataset)
        examples = dataset.split(split)
        if not 0 <= index < index + count <= examples.num_examples:
            raise UserError(
                f"index={index} count={count}: split {split} holds examples 0..{examples.num_examples - 1}"
            )
        rows = examples.rows(np.arange(index, index + count))
        return list(map(Puzzle, rows["inputs"], rows["puzzle_identifiers"].tolist()))

    def solve(
        self, puzzles: Sequence[str | np.ndarray | Puzzle], *, batch_size: int = 256, **inference: Any
    ) -> list[Solution]:
        """Answer puzzles given as texts, as tokens (integers [seq_len]) or with their identifiers (`Puzzle`).

        To a model that knows puzzles by their identifiers, the first two are unknown ones.

        Args:
            batch_size: puzzles, or tries at them, at once.
            inference: `halt`, `halt_max_steps`, `votes`, `paths`, `noise`, ...; see `Inference`.

        Raises:
            UserError: a text that is no puzzle of this task, or has no solution; or task or model cannot be used so.
        """
        use = validated(Inference, inference, "solve")
        questions = [self._as_puzzle(puzzle) for puzzle in puzzles]
        thinker = thinker_of(self.model, self.task, use, rows_at_once=batch_size, with_logits=False)
        solutions = []
        with self._room_for(batch_size):
            at_once = use.puzzles_at_once(batch_size)
            for start in range(0, len(questions), at_once):
                solutions += self._solve_batch(questions[start : start + at_once], thinker)
        return solutions

    def every_step(
        self,
        questions: np.ndarray,
        puzzle_identifiers: np.ndarray,
        *,
        batch_size: int = 256,
        on_batch: Callable[[int], object] | None = None,
    ) -> Steps:
        """What the model answers to questions uint8 [n, seq_len], with identifiers int32 [n], step by step.

        Args:
            on_batch: called with the number of questions after each batch.
        """
        parts: list[Steps] = []
        thinker = Thinker(self.model, with_logits=False)
        depths = range(1, self.model.halt_max_steps + 1)
        has_q_head = self.checkpoint.manifest.arch.has_q_head
        with self._room_for(batch_size):
            for start in range(0, len(questions), batch_size):
                inputs, identifiers = (
                    torch.from_numpy(rows[start : start + batch_size].astype(np.int32))
                    for rows in (questions, puzzle_identifiers)
                )
                batch = Batch(inputs, torch.full(inputs.shape, IGNORE), identifiers).to(self.setup.device)
                by_step = [kept["last"] for kept in thinker.survey(batch, depths)]
                columns = (
                    torch.cat([tries.answer.tokens for tries in by_step], 1).to(torch.uint8),
                    torch.cat([tries.answer.q_halt for tries in by_step], 1).sigmoid(),
                    torch.cat([tries.halted for tries in by_step], 1) & has_q_head,
                )
                parts.append(Steps(*(column.cpu().numpy() for column in columns)))
                if on_batch:
                    on_batch(len(inputs))
        return Steps(*map(np.concatenate, zip(*parts, strict=True)))

    def _as_puzzle(self, puzzle: str | np.ndarray | Puzzle) -> Puzzle:
        if isinstance(puzzle, Puzzle):
            return puzzle
        tokens = self.parse(puzzle) if isinstance(puzzle, str) else np.asarray(puzzle, np.uint8)
        return Puzzle(tokens, self.task.blank_identifier_id)

    def _solve_batch(self, puzzles: Sequence[Puzzle], thinker: Thinker) -> list[Solution]:
        questions = np.stack([puzzle.tokens for puzzle in puzzles])
        inputs = torch.from_numpy(questions.astype(np.int32))
        identifiers = torch.tensor([puzzle.identifier for puzzle in puzzles], dtype=torch.int32)
        batch = Batch(inputs, torch.full(inputs.shape, IGNORE), identifiers).to(self.setup.device)
        answer = thinker.think(batch).last
        answers = answer.tokens.cpu().numpy().astype(np.uint8)
        valid = (
            self.task.is_solution(questions, answers).tolist()
            if self.task.checkable
            else [None] * len(answers)
        )
        rows = zip(
            questions, answers, answer.q_halt.sigmoid().tolist(), answer.steps.tolist(), valid, strict=True
        )
        abstains = thinker.use.select == "valid"
        return [
            Solution(self.task.to_text(q), None, None, c, n, v)
            if abstains and not v
            else Solution(self.task.to_text(q), self.task.to_text(a), a, c, n, v)
            for q, a, c, n, v in rows
        ]

    def evaluate(
        self,
        data: str | Path,
        *,
        split: str = "test",
        num_examples: int | None = None,
        batch_size: int = 256,
        hides_identifiers: bool = False,
        save_outputs: Sequence[str] = (),
        on_batch: Callable[[int], object] | None = None,
        on_scores: Callable[[Sequence[Score]], object] | None = None,
        **inference: Any,
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics over a split of the dataset `data`, and the arrays named in `save_outputs` (see `OUTPUTS`).

        Args:
            hides_identifiers: the model is not told which puzzle it sees.
            batch_size: puzzles, or tries at them, at once.
            on_scores: called at the end with the scores, such as `PassAtK` with its votes.
            inference: `halt`, `halt_max_steps`, `votes`, `paths`, `noise`, ...; see `Inference`.

        Raises:
            UserError: the dataset is damaged, its task or vocabulary is not the model's, an output of unknown name, or
                task or model cannot be used so.
        """
        use = validated(Inference, inference, "evaluate")
        unknown = [name for name in save_outputs if name not in OUTPUTS]
        if unknown:
            raise UserError(f"save_outputs: unknown '{unknown[0]}'; known: {', '.join(OUTPUTS)}")
        dataset = open_dataset(data)
        self.check(dataset)
        if hides_identifiers and not self.checkpoint.manifest.arch.puzzle_emb_ndim:
            raise UserError(
                "ablate=puzzle_id: this model has no embedding of puzzles; it is not told which one it sees"
            )
        dataset.split(split).check_files()
        with self._room_for(batch_size):
            return evaluate(
                self.model,
                dataset,
                split=split,
                inference=use,
                batch_size=batch_size,
                num_examples=num_examples,
                world=World(),
                hides_identifiers=hides_identifiers,
                save_outputs=save_outputs,
                on_batch=on_batch,
                on_scores=on_scores,
            )

    def survey(
        self,
        data: str | Path,
        *,
        depths: Sequence[int] = (),
        paths: Sequence[int] = (1,),
        split: str = "test",
        num_examples: int | None = None,
        batch_size: int = 256,
        on_batch: Callable[[int], object] | None = None,
        **inference: Any,
    ) -> list[Row]:
        """Accuracy over a split of `data` at each number of ACT steps and of paths; see `hrm_ray.evaluation.survey`.

        Args:
            depths: numbers of ACT steps; none: `halt_max_steps` alone.
            paths: numbers of paths.
            inference: `halt`, `halt_max_steps`, `votes`, `noise`, ...; see `Inference`.

        Raises:
            UserError: the dataset is damaged or of another kind, or task or model cannot be used so.
        """
        use = validated(Inference, {**inference, "paths": max(paths)}, "survey")
        depths = tuple(depths) or (use.halt_max_steps or self.model.halt_max_steps,)
        use = use.model_copy(update={"halt_max_steps": max(depths)})
        dataset = open_dataset(data)
        self.check(dataset)
        dataset.split(split).check_files()
        with self._room_for(batch_size):
            return survey(
                self.model,
                dataset,
                inference=use,
                depths=depths,
                paths=paths,
                batch_size=batch_size,
                split=split,
                num_examples=num_examples,
                on_batch=on_batch,
            )

    def _room_for(self, batch_size: int) -> AbstractContextManager[None]:
        """Inside, too little memory for so many puzzles is a UserError."""
        what = f"{batch_size} puzzles at once on {self.setup.device}"
        return memory.needed_for(what, "give a smaller batch_size or fewer paths")

    def check(self, dataset: Dataset) -> None:
        """Raise UserError if `dataset` is of another kind than the model's."""
        trained, given = self.checkpoint.manifest.dataset, dataset.manifest
        keys = ["task", "vocab_size", "seq_len"]
        if self.checkpoint.manifest.arch.puzzle_emb_ndim:
            keys.append("num_puzzle_identifiers")
        values = [(key, getattr(trained, key), getattr(given, key)) for key in keys]
        if trained.task == given.task:
            values += [(key, self.task.options[key], dataset.task.options[key]) for key in self.task.meaning]
        for key, own, other in values:
            if own != other:
                raise UserError(
                    f"{dataset.path} does not fit {self.checkpoint.folder}: {key} is {other}, "
                    f"the model was trained with {own}; give a data set of that kind"
                )
        names = trained.identifiers, identifiers_of(given)
        if self.checkpoint.manifest.arch.puzzle_emb_ndim and None not in names and names[0] != names[1]:
            raise UserError(
                f"{dataset.path} is another build than the one {self.checkpoint.folder} was trained on: its puzzle "
                "identifiers mean other puzzles; give the data set of the training"
            )


def load(checkpoint: str | Path, *, device: str = "auto", forward_dtype: str | None = None) -> Solver:
    """Load a model from a checkpoint folder, or the best one of a run folder.

    Args:
        device: "auto", "cpu" or "cuda".
        forward_dtype: "auto", "float32" or "bfloat16"; None: as the model was trained.

    Raises:
        UserError: no such checkpoint, a damaged one, or too little memory for it.
    """
    return Solver(find(str(checkpoint)), device=device, forward_dtype=forward_dtype)


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    Attributes:
        folder: of the run; `load` takes it.
        summary: what summary.json holds: `best` and `final` metrics, `global_step`, `finished`, ...
        stopped_by: the signal that stopped it early, if one did.
    """

    folder: Storage
    summary: dict[str, Any]
    stopped_by: int | None


def train(
    config: TrainConfig | Sequence[str] | str, *, show_progress: bool = False, **keys: Any
) -> TrainResult:
    """Train, or continue, a run, as ``hrm-ray train`` does.

    Args:
        config: words of ``hrm-ray train`` ("experiment=quickstart lr=1e-3", or a list of them), or a configuration.
        keys: more of them, as ``max_steps=100``; a key with a dot goes in ``**{"arch.H_cycles": 4}``.

    Raises:
        UserError: a mistake in them, before anything starts.
        RunFailed: the run cannot go on.
    """
    from hrm_ray.training import launch

    if not isinstance(config, TrainConfig):
        config = train_config([*_words(config), *_as_words(keys)], by_hand=True)
    elif keys:
        raise UserError("give keys with words, or a whole TrainConfig")
    summary, stopped_by = launch.train(config, show_progress=show_progress)
    return TrainResult(launch.run_folder(config), summary, stopped_by)


def tune(
    sweep: "SweepConfig | Mapping[str, Any] | str",
    words: Sequence[str] | str = (),
    *,
    yes: bool = False,
    show_progress: bool = False,
    **keys: Any,
) -> "SweepResult":
    """Begin or continue a sweep, as ``hrm-ray tune`` does.

    Args:
        sweep: a name of `tune_configs/`, the path of a YAML, what such a YAML holds, or a configuration.
        words: ``key=value`` words on top of it.
        yes: begin though the estimate exceeds the budget.
        keys: more of them, as ``num_trials=6``.

    Raises:
        UserError: a mistake in them, before a trial starts.
        RunFailed: three trials failed with the same error.
    """
    from hrm_ray.tuning.config import SETTABLE, SweepConfig, load_sweep, sweep_config
    from hrm_ray.tuning.sweep import run_sweep
    from hrm_ray.tuning.view import View

    view = View()
    if show_progress:
        from hrm_ray.tuning.console import ConsoleView

        view = ConsoleView()
    given = [*_words(words), *_as_words(keys)]
    if isinstance(sweep, SweepConfig):
        if given:
            raise UserError("give words with a name, a file or a mapping, or a whole SweepConfig")
        config = sweep
    else:
        config = load_sweep(sweep, given) if isinstance(sweep, str) else sweep_config(sweep, given)
    settings = {word.partition("=")[0].partition(".")[0] for word in given} & set(SETTABLE)
    result = run_sweep(config, given=settings, yes=yes, view=view)
    assert result is not None  # it is no dry run
    return result


def _words(words: Sequence[str] | str) -> list[str]:
    return shlex.split(words) if isinstance(words, str) else list(words)


def _as_words(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={as_text(value) if not isinstance(value, Path) else value}" for key, value in keys.items()
    ]
