"""The numbers of a machine: each with its unit in its name, and with where it comes from."""

from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from hrm_ray.config.validate import PositiveFloat, PositiveInt, Settings, nearest, read_yaml_file, validated
from hrm_ray.errors import UserError

KINDS = ("measured", "assumed")  # of a number's source, its first word


class Number(Settings):
    """A number and where it comes from."""

    value: float = Field(ge=0)
    """The number, in the unit that its key names."""
    source: str
    """"measured" or "assumed", then by what or why."""

    @field_validator("source")
    @classmethod
    def _says_which_kind(cls, source: str) -> str:
        if not source.startswith(KINDS):
            raise ValueError(f"source='{source[:40]}' must begin with {' or '.join(KINDS)}")
        return source


class Rate(Number):
    """A number that is divided by."""

    value: PositiveFloat
    """The number, in the unit that its key names."""


class Machine(Settings):
    """A machine and the numbers of one worker on it: a GPU, or some cores."""

    listed_by: ClassVar[str] = "hrm-ray config show machine"

    about: str
    """What it is, in a line."""
    workers: PositiveInt
    """Workers of one machine; more workers take more machines."""
    runs_ahead: bool
    """Whether launching a product and doing it overlap (a GPU), or one follows the other (a CPU)."""
    flops_per_s: Rate
    """Operations of products a second in whole steps, with all that happens between the products."""
    launch_s: Number
    """Seconds to launch a product and what belongs to it."""
    optimizer_bytes_per_s: Rate
    """Rate of memory in the optimizer, which moves 28 bytes a parameter."""
    crowded: Rate
    """Times as long that a worker computes when all workers of its machine do."""
    inside_bytes_per_s: Rate
    """All-reduce between the workers of one machine: bytes a second that each sends."""
    inside_latency_s: Number
    """The same: seconds of a message to the next worker."""
    between_bytes_per_s: Rate
    """All-reduce between machines: bytes a second that a machine sends."""
    between_latency_s: Number
    """The same: seconds of a message to the next machine."""
    data_s: Number
    """Seconds that a step waits for its puzzles."""
    copy_bytes_per_s: Rate
    """Copying the state aside for a checkpoint, while training waits."""
    store_bytes_per_s: Rate
    """Writing a checkpoint, beside training."""
    start_s: Number
    """Seconds from the command to the first step."""
    price_per_hour: Number
    """Of a worker, on demand."""
    spot_price_per_hour: Number
    """Of a worker that may be taken away."""
    interruptions_per_hour: Number
    """How often a spot machine is taken away."""
    replace_s: Number
    """Seconds until another machine is there in its place."""

    def numbers(self) -> dict[str, Number]:
        """All numbers by key."""
        return {key: value for key, value in self if isinstance(value, Number)}


def machine_files() -> dict[str, Path]:
    """The machines that ship with hrm_ray, by name."""
    folder = Path(str(files("hrm_ray.config"))) / "machine"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_machine(name_or_file: str) -> Machine:
    """A machine by name, or from a YAML file.

    Raises:
        UserError: no such machine, unreadable YAML, a key that is unknown or not given, a value that does not fit.
    """
    file = Path(name_or_file)
    if file.suffix not in (".yaml", ".yml"):
        shipped = machine_files()
        if name_or_file not in shipped:
            raise UserError(
                f"unknown machine '{name_or_file}'; {nearest(name_or_file, shipped)} (or a file, machine=FILE.yaml)"
            )
        file = shipped[name_or_file]
    values = read_yaml_file(file, "machine")
    if not isinstance(values, dict):
        raise UserError(f"machine {file} must hold 'key: value' lines")
    return validated(Machine, values, f"machine {file.stem}")
