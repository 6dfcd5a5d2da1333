"""What can be configured: list it, show it with its meaning, and check words or a file before a run."""

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from hrm_ray.cli.command import add
from hrm_ray.config.validate import Settings, abbreviated, all_fields, nearest, read_yaml_file, takes
from hrm_ray.errors import UserError

WIDTH, KEY_WIDTH = 110, 40  # of a printed line, and of the key in it
QUOTES = "'"
_RECIPE = "recipe:"  # before the name of a family
USE = {
    "experiments": "hrm-ray train experiment=NAME",
    "architectures": "hrm-ray train ... arch=NAME",
    "ways of halting": "hrm-ray train ... halting=NAME",
    "optimizers": "hrm-ray train ... optimizer=NAME",
    "recipes": "hrm-ray data build recipe=NAME out=DIR",
    "sweeps": "hrm-ray tune NAME",
    "machines": "hrm-ray scale machine=NAME",
}


def _shipped() -> dict[str, dict[str, Path]]:
    """The YAML files that ship, by what they are and by name."""
    from hrm_ray.data.recipe import recipe_folders
    from hrm_ray.tuning.config import sweep_folders

    tree = Path(str(files("hrm_ray.config")))
    folders = (
        *([tree / name] for name in ("experiment", "arch", "halting", "optimizer")),
        recipe_folders(),
        sweep_folders(),
        [tree / "machine"],
    )
    return {
        what: {file.stem: file for folder in there for file in sorted(folder.glob("*.yaml"))}
        for what, there in zip(USE, folders, strict=True)
    }


def ls(args: argparse.Namespace) -> None:
    for what, named in _shipped().items():
        print(f"{what}: {USE[what]}")
        for name, file in named.items():
            print(f"  {name:22}{_headline(file)}")


def _headline(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")), "")


def show(args: argparse.Namespace) -> None:
    if words := [word for word in args.what if "=" in word]:
        if len(words) < len(args.what):
            raise UserError("give names, or words of train, not both")
        _show_values(words)
    else:
        for name in args.what or ["train"]:
            _show(name)


def _show_values(words: Sequence[str]) -> None:
    from hrm_ray.config.compose import CHOSEN_BY_NAME, train_config
    from hrm_ray.config.schema import TrainConfig

    config = train_config(words)
    values = dict(_flat(config.model_dump(mode="json")))
    kinds = {group: type(getattr(config, group)) for group in CHOSEN_BY_NAME}
    for key, field in all_fields(TrainConfig, inside=kinds).items():
        if key in values:
            print(_told(f"{key}={abbreviated(values[key]).strip(QUOTES)}", field))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(name: str) -> None:
    """The keys of a kind of configuration, a key or those that begin with it, or a file that ships."""
    kinds = _keys()
    if name == "recipe":
        _print_by_kind({kind: fields for kind, fields in kinds.items() if kind.startswith(_RECIPE)})
        return
    if name in kinds or name.startswith(_RECIPE):
        _print_by_kind({name: kinds.get(name) or _keys_of_recipe(name.removeprefix(_RECIPE))})
        return
    found = {
        kind: {key: f for key, f in fields.items() if key == name or key.startswith(f"{name}.")}
        for kind, fields in kinds.items()
    }
    shipped = {label: file for named in _shipped().values() for label, file in named.items()}
    if any(found.values()):
        _print_by_kind(found)
    elif name in shipped:
        print(shipped[name].read_text(encoding="utf-8"), end="")
    else:
        keys = {key for fields in kinds.values() for key in fields}
        raise UserError(
            f"there is nothing called {abbreviated(name)}; "
            + nearest(name, {*kinds, "recipe", *keys, *shipped}, "hrm-ray config ls")
        )


def _keys() -> dict[str, dict[str, FieldInfo]]:
    """All keys, by the kind of configuration that they belong to: train, an architecture, a family's recipe, ..."""
    from hrm_ray.config.compose import CHOSEN_BY_NAME
    from hrm_ray.config.schema import TrainConfig
    from hrm_ray.data.recipe import recipe_classes
    from hrm_ray.scale.machine import Machine
    from hrm_ray.tuning.config import SweepConfig

    return {
        "train": all_fields(TrainConfig),
        **{
            name: all_fields(kind, f"{group}.")
            for group, (_, all_kinds) in CHOSEN_BY_NAME.items()
            for name, kind in all_kinds().items()
        },
        **{f"{_RECIPE}{kind.model_fields['task'].default}": all_fields(kind) for kind in recipe_classes()},
        "sweep": all_fields(SweepConfig),
        "machine": all_fields(Machine),
    }


def _keys_of_recipe(task: str) -> dict[str, FieldInfo]:
    """Those of a family that does not ship. Raises UserError: there is none."""
    from hrm_ray.data.recipe import recipe_class

    return all_fields(recipe_class(task))


def _print_by_kind(kinds: Mapping[str, Mapping[str, FieldInfo]]) -> None:
    """Keys with their defaults. What is the same in several kinds comes once, under the names of them all."""
    having: dict[str, list[str]] = {}
    for kind, fields in kinds.items():
        for key, field in fields.items():
            having.setdefault(_with_default(key, field), []).append(kind)
    groups: dict[tuple[str, ...], list[str]] = {}
    for text, owners in having.items():
        groups.setdefault(tuple(owners), []).append(text)
    for number, (names, texts) in enumerate(sorted(groups.items(), key=lambda group: -len(group[0]))):
        if len(groups) > 1:
            print("\n" * bool(number) + ", ".join(names) + ":")
        print("\n".join(texts))


def _with_default(key: str, field: FieldInfo) -> str:
    if isinstance(field.default, Settings) or field.default_factory is not None:
        return _told(key, field)
    if field.is_required():
        return _told(f"{key}=VALUE", field)
    return _told(f"{key}={abbreviated(field.default).strip(QUOTES)}", field)


def _told(key: str, field: FieldInfo) -> str:
    """The key, and beside it its meaning and what it takes."""
    text = f"{' '.join((field.description or '').split())} ({takes(field)})"
    lines = textwrap.wrap(text, WIDTH - KEY_WIDTH)
    if len(key) >= KEY_WIDTH:
        lines.insert(0, "")
    return "\n".join(
        f"{'' if number else key:{KEY_WIDTH}}{line}".rstrip() for number, line in enumerate(lines)
    )


def validate(args: argparse.Namespace) -> None:
    first, *words = args.words
    if "=" not in first:
        _check_file(first, words)
    elif any(word.startswith("recipe=") for word in args.words):
        from hrm_ray.cli.data import build_options

        build_options(args.words)
    else:
        from hrm_ray.config.compose import train_config

        train_config(args.words)
    print("ok")


def _check_file(name: str, words: Sequence[str]) -> None:
    """Check a recipe or a sweep, which the keys of a YAML file tell apart."""
    from hrm_ray.config.validate import read_words
    from hrm_ray.data.recipe import load_recipe, recipe_class_of, recipe_names
    from hrm_ray.tuning.config import load_sweep, sweep_names
    from hrm_ray.tuning.points import Points

    if Path(name).suffix in (".yaml", ".yml"):
        values = read_yaml_file(Path(name), "YAML")
        is_recipe = isinstance(values, dict) and not values.keys() & {"space", "train"}
    elif name in recipe_names():
        is_recipe = True
    elif name in sweep_names():
        is_recipe = False
    else:
        known = [*recipe_names(), *sweep_names()]
        raise UserError(
            f"there is no recipe or sweep {abbreviated(name)}; {nearest(name, known, 'hrm-ray config ls')}"
        )
    if is_recipe:
        load_recipe(name, read_words(words, recipe_class_of(name)))
    else:
        Points(load_sweep(name, words)).check_keys()


def register(commands: Any) -> None:
    config = commands.add_parser("config", help="list, show and check what can be configured")
    kinds = config.add_subparsers(dest="kind", required=True, metavar="COMMAND")
    add(kinds, "ls", ls, "list experiments, architectures, recipes, sweeps and machines", "hrm-ray config ls")
    p = add(
        kinds,
        "show",
        show,
        "print keys with their values and meanings, or a file that ships",
        "hrm-ray config show\n"
        "hrm-ray config show lr_warmup_steps scaling\n"
        "hrm-ray config show trm\n"
        "hrm-ray config show recipe:maze\n"
        "hrm-ray config show sudoku_extreme\n"
        "hrm-ray config show experiment=quickstart arch=trm",
    )
    p.add_argument(
        "what",
        nargs="*",
        metavar="NAME",
        help="train (the default), recipe, recipe:TASK, sweep, machine, an architecture, a key, the name of a file "
        "that ships; or words of train, to see every value that they give",
    )
    p = add(
        kinds,
        "validate",
        validate,
        "check words of train, or a recipe or sweep, without running it",
        "hrm-ray config validate experiment=quickstart lr=1e-3\n"
        "hrm-ray config validate my_sweep.yaml num_trials=6\n"
        "hrm-ray config validate recipe=sudoku_4x4 out=data/mine num_train=50",
    )
    p.add_argument(
        "words", nargs="+", metavar="key=value", help="words of train, or a YAML file or name and its words"
    )
