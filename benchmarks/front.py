"""What the commands of all benchmarks have in common: words `key=value`, --json, and one line for a mistake."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.machine import facts
from hrm_ray import machine, memory
from hrm_ray.errors import UserError

DTYPES = ("auto", "float32", "bfloat16")
WARM_UP_STEPS = 10  # of runs whose reports are read
MOST = 10**9  # of any number in a command
THREADS = len(os.sched_getaffinity(0))


def run(
    doc: str | None,
    measure: Callable[..., dict],
    tell: Callable[[dict], str],
    known: Mapping[str, Any],
    *,
    for_train: bool = False,
) -> dict:
    """Measure what the command line says, print it and return what --json prints: the result and the `facts` before.

    Args:
        doc: what --help says.
        measure: called with every key of `known`, but for `threads`, which is set; returns a result.
        tell: what is printed for people, of the result and the facts.
        known: keys and their defaults, by which their type is known: an int from 1 on, a bool, a str; a tuple lists
            what may be chosen, the default first; a type stands where there is no default.
        for_train: other words are for `hrm-ray train`, and handed to `measure` as `words`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = ", ".join([*known, *(["and keys of `hrm-ray train`"] if for_train else [])])
    parser.add_argument("words", nargs="*", metavar="key=value", help=keys)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        values, rest = parse(args.words, known, for_train)
        if "threads" in values:
            torch.set_num_threads(_threads(values.pop("threads")))
        about = facts()
        with memory.needed_for("this benchmark", "give a smaller batch or model"):
            result = measure(**values, **({"words": rest} if for_train else {})) | about
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result) if args.json else tell(result))
    return result


def parse(
    words: list[str], known: Mapping[str, Any], for_train: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The values of all keys of `known`, and the other words, which must be none unless they are `for_train`."""
    values: dict[str, Any] = {
        key: value[0] if isinstance(value, tuple) else value for key, value in known.items()
    }
    rest = []
    for word in words:
        key, equals, text = word.partition("=")
        if key in known and equals:
            values[key] = _value(word, text, known[key])
        elif for_train and equals:
            rest.append(word)
        else:
            raise UserError(f"{word}: not one of {', '.join(f'{key}=' for key in known)}; see --help")
    for key, value in values.items():
        if isinstance(value, type) or (value == "" and isinstance(known[key], type)):
            raise UserError(f"{key}= is missing; see --help")
    return values, rest


def _value(word: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        if text not in default:
            raise UserError(f"{word}: choose from {', '.join(default)}")
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UserError(f"{word}: true or false")
        return text == "true"
    if isinstance(default, int):
        if not (text.isdecimal() and 1 <= int(text) <= MOST):
            raise UserError(f"{word}: a whole number from 1 to {MOST}")
        return int(text)
    return text


def _threads(count: int) -> int:
    if count > THREADS:
        raise UserError(f"threads={count}: there are {THREADS} cores for it")
    return count


def need_steps(steps: int) -> None:
    """Refuse runs of so few steps that nothing is left after the warm-up for quartiles."""
    if steps < 2 * WARM_UP_STEPS:
        raise UserError(
            f"steps={steps}: at least {2 * WARM_UP_STEPS}, of which {WARM_UP_STEPS} are to warm up"
        )


def dtype_of(name: str) -> torch.dtype:
    """One of `DTYPES`; "auto" is what training would take here."""
    return machine.resolve(forward_dtype=name).dtype
