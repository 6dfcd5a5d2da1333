"""What a run writes down: config.yaml, metrics.jsonl, events.jsonl, summary.json, TensorBoard, Weights & Biases.

metrics.jsonl holds one JSON object a report, each exactly once: on resuming, what was reported after the
checkpoint is cut off before the loop reports it again. events.jsonl tells what happened to the run, with the time:
every start, checkpoint passed over, rollback and end; nothing is ever cut off it.

People open and edit these files. What does not read as ours is named and left out, and the file as it was is kept
beside the new one, as NAME.before-N.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import yaml

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError, first_line
from hrm_ray.storage.storage import Storage, numbered
from hrm_ray.training.checkpoint import FOLDER

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "summary.json"
WANDB_ID_FILE = "wandb_id"
RECORDS = (CONFIG_FILE, METRICS_FILE, EVENTS_FILE, SUMMARY_FILE, WANDB_ID_FILE)


class Records:
    """The first worker's records of a run.

    Args:
        run: the run's folder.
        config: the run.
        global_step: where it starts or goes on; later reports of an earlier attempt are dropped.
        evaluates_again: drop a report of the evaluation at `global_step` too.
        on_event: called with the name of an event and a message for each file that somebody has changed.
    """

    def __init__(
        self,
        run: Storage,
        config: TrainConfig,
        global_step: int,
        *,
        evaluates_again: bool = False,
        on_event: Callable[[str, str], object] = lambda event, what: None,
    ):
        self._run, self._on_event = run, on_event
        self._keep(is_dumped, CONFIG_FILE, "has changes that are not kept in the new one")
        run.write(CONFIG_FILE, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        self._lines: list[str] = []
        self.last: dict[str, Any] = {}
        self.rewind(global_step, evaluates_again=evaluates_again)
        self._tensorboard = _tensorboard(run, config, global_step)
        self._wandb = _wandb(run, config)

    def rewind(self, global_step: int, *, evaluates_again: bool = False) -> None:
        """Drop what was reported after `global_step`; for `evaluates_again`, see the class."""
        self._keep(are_reports, METRICS_FILE, "has lines that are no reports; they are left out")
        self._lines = [
            line
            for line, report in reports(self._run)
            if report["global_step"] <= global_step
            and not (evaluates_again and report["global_step"] == global_step and '"eval/' in line)
        ]
        self.last = {}
        for line in self._lines:
            self._remember(json.loads(line))
        self._flush()

    def evaluations(self, metric: str) -> list[float]:
        """The values of `metric` in all evaluations so far."""
        return [report[metric] for report in self.reports() if metric in report]

    def reports(self) -> list[dict[str, Any]]:
        """All reports so far."""
        return [json.loads(line) for line in self._lines]

    def write(self, record: dict[str, Any]) -> None:
        """Add one report; `global_step` is among its keys."""
        self._remember(record)
        line = json.dumps(record)
        self._lines.append(line)
        if self._run.local_path is not None:
            self._run.append(METRICS_FILE, line + "\n")
        for name, value in record.items():
            if self._tensorboard and "/" in name:
                self._tensorboard.add_scalar(name, value, record["global_step"])
        if self._wandb:
            self._wandb.log(record)

    def flush(self) -> None:
        """Make what was written last: through a power cut, and on storage that cannot append."""
        if self._run.local_path is None:
            self._flush()
        else:
            self._run.sync(METRICS_FILE)

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        self.flush()
        self._keep(is_summary, SUMMARY_FILE, "is not the summary of a run; a new one is written")
        self._run.write(SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
        if self._wandb:
            self._wandb.summary.update(summary)

    def conclude(self, name: str, content: bytes) -> None:
        """Write a JSON file of what the reports come to."""
        self._keep(is_dumped, name, "has changes that are not kept in the new one")
        self._run.write(name, content)

    def close(self) -> None:
        """Let go of what is open, also when the run has failed."""
        if self._tensorboard:
            with suppress(OSError):  # a full disk is reported elsewhere
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _remember(self, record: dict[str, Any]) -> None:
        """`last` keeps the newest value of every metric."""
        self.last.update(record)

    def _keep(self, is_ours: Callable[[bytes], bool], name: str, what: str) -> None:
        """Before the file `name` is written again: keep a copy of it if it is not as we write it."""
        if (copy := keep_changed(self._run, name, is_ours)) is not None:
            self._on_event("changed_file", f"{self._run}/{name} {what}; as it was, it is kept as {copy}")

    def _flush(self) -> None:
        self._run.write(METRICS_FILE, "".join(line + "\n" for line in self._lines).encode())


def note_event(run: Storage, event: str, **values: Any) -> dict[str, Any]:
    """Add to events.jsonl what has happened, and return it: `event` and `values`, with the `time` in epoch seconds."""
    entry = {"time": round(time.time(), 3), "event": event, **values}
    run.append(EVENTS_FILE, json.dumps(entry) + "\n")
    return entry


def reports(run: Storage) -> Iterator[tuple[str, dict[str, Any]]]:
    """The reports in metrics.jsonl, with their lines; what is no report, such as a line cut short, is left out."""
    for line in (run.read(METRICS_FILE) or b"").decode(errors="replace").split("\n"):
        if (report := _report_of(line)) is not None:
            yield line, report


def _report_of(line: str) -> dict[str, Any] | None:
    """A report maps names to numbers, "global_step" to a whole one."""
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or type(report.get("global_step")) is not int:
        return None
    return report if all(type(value) in (int, float) for value in report.values()) else None


def are_reports(content: bytes) -> bool:
    """Whether `content` is a metrics.jsonl as runs leave it; a crash may have cut the last line short."""
    *lines, _ = content.decode(errors="replace").split("\n")
    return all(_report_of(line) is not None for line in lines)


def is_dumped(content: bytes) -> bool:
    """Whether `content` is a YAML or JSON file as we write them: no comments, no other layout."""
    try:
        if content.startswith(b"{"):
            return (json.dumps(json.loads(content), indent=2) + "\n").encode() == content
        values = yaml.safe_load(content)
        written = (yaml.safe_dump(values, sort_keys=False, width=width).encode() for width in (80, 1000))
        return isinstance(values, (dict, list)) and content in written
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def is_summary(content: bytes) -> bool:
    """Whether `content` is a summary.json as runs write it."""
    return bool(_summary_of(content))


def _summary_of(content: bytes) -> dict[str, Any]:
    kinds: dict[str, Any] = {
        "final": dict,
        "best": dict,
        "global_step": int,
        "finished": bool,
        "train_s": (int, float),
    }
    try:
        summary = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(summary, dict) or "stop_reason" not in summary:
        return {}
    if not all(isinstance(summary.get(key), kind) for key, kind in kinds.items()):
        return {}
    metrics = [*summary["final"].values(), *summary["best"].values()]
    return summary if all(isinstance(value, int | float) for value in metrics) else {}


def last_summary(run: Storage) -> dict[str, Any]:
    """What summary.json says; nothing if it is not there or does not read as ours."""
    return _summary_of(run.read(SUMMARY_FILE) or b"")


def keep_changed(folder: Storage, name: str, is_ours: Callable[[bytes], bool]) -> str | None:
    """Copy a file that is about to be written again to NAME.before-N, if it is not as we write it.

    Returns:
        the name of the copy; None if the file is as we write it, or not there.
    """
    content = folder.read(name)
    if content is None or is_ours(content):
        return None
    copy = f"{name}.before-{max(numbered(folder.entries(), f'{name}.before-'), default=0) + 1}"
    folder.write(copy, content)
    return copy


def check_places(run: Storage) -> None:
    """Make sure that a run can write its files, before it begins.

    Raises:
        UserError: something else has the name of one, or it may not be read and written; or they are those of
            something that is no run.
    """
    run.check_places(files=(*RECORDS, "lock"), folders=(FOLDER, "tensorboard"))
    names = run.entries()
    if FOLDER in names or EVENTS_FILE in names:
        return
    ours = {CONFIG_FILE: is_dumped, METRICS_FILE: are_reports, SUMMARY_FILE: is_summary}
    for name, is_ours in ours.items():
        if name in names and not is_ours(run.read(name) or b""):
            raise UserError(f"{run}/{name} is not of a run; choose another run_name=, or move it away")


def _tensorboard(run: Storage, config: TrainConfig, global_step: int):
    if not config.tensorboard or run.local_path is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.local_path / "tensorboard"), purge_step=global_step + 1)


def _wandb(run: Storage, config: TrainConfig):
    if config.wandb == "off":
        return None
    import wandb

    known = run.read(WANDB_ID_FILE)  # the same run goes on after a restart
    identity = known.decode(errors="replace") if known else uuid.uuid4().hex[:12]
    if not known:
        run.write(WANDB_ID_FILE, identity.encode())
    try:
        session = wandb.init(
            mode=config.wandb,
            project=config.project_name,
            name=config.run_name,
            group=config.wandb_group,
            id=identity,
            resume="allow",
            dir=str(run.local_path) if run.local_path else None,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise UserError(
            f"wandb={config.wandb}: {first_line(error)}; use wandb=offline, or wandb login"
        ) from None
    session.define_metric("*", step_metric="global_step")
    return session
