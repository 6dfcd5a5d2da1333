"""Builds equations: all that an operator has, in a random order, the first ones to train on, the others to validate."""

from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from hrm_ray.data.builder import Builder, Examples, Part, Workers
from hrm_ray.data.keyed_random import row_keys
from hrm_ray.data.recipe import Recipe
from hrm_ray.data.tasks.modular import Modular, modulus
from hrm_ray.data.tasks.modular.operators import operator

# Purposes of random keys.
_ORDER, _NOISE = 1, 2


class ModularRecipe(Recipe):
    """A recipe of task modular."""

    task: Literal["modular"] = "modular"
    """Puzzle family."""
    source: Literal["generator"] = "generator"
    """Equations are made, not read."""
    op: str = "+"
    """The operator: + - * / x^2+y x^3+y x^2+y^2 x^2+xy+y^2 x^2+xy+y^2+x x^3+xy x^3+xy^2+y, by parity +* +- /-, on
    permutations s5 (xy), s5conj (xyx^-1), s5aba (xyx); or its name in openai/grok."""
    p: int | None = None
    """Modulus, 2 to 253, a prime where op divides; null: 97. Permutations have none."""
    train_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of the equations to train on; the others are the test split."""
    train_data_pct: float | None = Field(default=None, gt=0, le=100)
    """The same in percent, as openai/grok calls it."""
    noise: int = Field(default=0, ge=0)
    """Training equations whose answers are replaced by those of others, drawn at random."""
    predict_end: bool = False
    """Whether the end behind the answer is predicted too, as published; only a causal model can learn that."""
    draws: Literal["keyed", "published"] = "keyed"
    """keyed: by seed, in a vocabulary of what op needs; published: vocabulary, order and noise of openai/grok, which
    always draws with seed 0."""

    @field_validator("op")
    @classmethod
    def _op_has_one_name(cls, op: str) -> str:
        return operator(op).name

    @field_validator("p")
    @classmethod
    def _p_fits(cls, p: int | None, info: ValidationInfo) -> int | None:
        return modulus(operator(info.data.get("op", "+")), p)

    @field_validator("train_fraction", mode="before")
    @classmethod
    def _fraction_is_no_percent(cls, fraction: Any) -> Any:
        if type(fraction) in (int, float) and 1 < fraction <= 100:
            raise ValueError(
                f"train_fraction={fraction:g} is a share, at most 1; {fraction:g} percent are train_fraction="
                f"{fraction / 100:g}"
            )
        return fraction

    @model_validator(mode="before")
    @classmethod
    def _percent_is_a_fraction(cls, values: dict[str, Any]) -> dict[str, Any]:
        percent = values.get("train_data_pct")
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 1 <= percent <= 100:
            return values  # what is not None is refused below
        if "train_fraction" in values:
            raise ValueError("'train_data_pct' and 'train_fraction' say the same; leave one of them out")
        return values | {"train_data_pct": None, "train_fraction": percent / 100}

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        count, fraction = len(self.make_task().equations), self.train_fraction
        if (percent := self.train_data_pct) is not None:
            few, many = round(count * percent / 100), round(count * percent)
            raise ValueError(
                f"train_data_pct={percent:g} is {percent:g} percent, {few:,} of {count:,} equations to train on; write "
                f"train_fraction={percent:g} for {many:,} of them, train_fraction={percent / 100:g} for {few:,}"
            )
        if not self.num_train:
            raise ValueError(
                f"train_fraction={fraction:g} leaves none of {count:,} equations to train on; give more"
            )
        if self.num_train == count and fraction < 1:
            raise ValueError(
                f"train_fraction={fraction:g} leaves none of {count:,} equations to validate; give less, or 1 to train "
                "on all"
            )
        if self.noise > self.num_train:
            raise ValueError(f"noise={self.noise}: only {self.num_train:,} equations are trained on")
        if self.draws == "published" and self.seed:
            raise ValueError(f"seed={self.seed}: draws=published always has seed 0; leave one of the two out")
        return self

    @property
    def num_train(self) -> int:
        """How many equations are trained on."""
        return round(len(self.make_task().equations) * self.train_fraction)

    def make_task(self) -> Modular:
        vocabulary = "published" if self.draws == "published" else "compact"
        return Modular(self.op, self.p, self.predict_end, vocabulary, self.noise)


class ModularBuilder(Builder, recipe=ModularRecipe):
    """See the module. Every equation is a group of its own."""

    recipe: ModularRecipe
    task: Modular

    def __init__(self, recipe: ModularRecipe):
        super().__init__(recipe)
        self.task = recipe.make_task()

    def digest(self) -> str:
        return "generator-1"

    def parts(self, workers: Workers) -> Iterator[Part]:
        equations, num_train = shuffled(self.recipe), self.recipe.num_train
        for split, some in (("train", equations[:num_train]), ("test", equations[num_train:])):
            if len(some):
                numbers = np.arange(len(some))
                rows = Examples(*self.task.examples(some), np.zeros(len(some), np.int32), numbers, numbers)
                yield Part(split, np.ones(len(some), np.int64), iter([rows]))

    def report(self) -> dict[str, Any]:
        return {"equations": len(self.task.equations), "replaced_answers": self.recipe.noise}

    def notes(self) -> Iterator[str]:
        num_train = self.recipe.num_train
        yield from self.task.about({"train": num_train, "test": len(self.task.equations) - num_train})


def shuffled(recipe: ModularRecipe) -> np.ndarray:
    """All equations of a recipe as tokens, uint8 [n, 3], in their random order, the noise among the first.

    The order does not depend on `train_fraction`: what a smaller one trains on, a larger one does too.
    """
    equations = recipe.make_task().equations
    count = len(equations)
    if recipe.draws == "published":
        random = np.random.RandomState(recipe.seed)
        equations = equations[random.permutation(count)]
        others = random.randint(0, count, recipe.noise)
    else:
        equations = equations[np.argsort(row_keys(recipe.seed, _ORDER, np.arange(count)), kind="stable")]
        others = (row_keys(recipe.seed, _NOISE, np.arange(recipe.noise)) % np.uint64(count)).astype(np.int64)
    equations[: recipe.noise, 2] = equations[others, 2]
    return equations
