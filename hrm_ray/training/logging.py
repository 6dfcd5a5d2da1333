"""What a run writes down: config.yaml, metrics.jsonl, events.jsonl, summary.json, TensorBoard, Weights & Biases.

metrics.jsonl holds one JSON object a report, each exactly once: on resuming, what was reported after the
checkpoint is cut off before the loop reports it again. events.jsonl tells what happened to the run, with the time:
every start, checkpoint passed over, rollback and end; nothing is ever cut off it.
"""

import json
import sys
import time
import uuid
from contextlib import suppress
from typing import Any

import yaml

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError, first_line
from hrm_ray.training.storage import Storage

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "summary.json"
WANDB_ID_FILE = "wandb_id"


class Records:
    """The first worker's records of a run.

    Args:
        run: the run's folder.
        config: the run.
        global_step: where it starts or goes on; later reports of an earlier attempt are dropped.
        evaluates_again: drop a report of the evaluation at `global_step` too.
    """

    def __init__(self, run: Storage, config: TrainConfig, global_step: int, *, evaluates_again: bool = False):
        self._run = run
        run.write("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        self._lines: list[str] = []
        self.last: dict[str, Any] = {}
        self.rewind(global_step, evaluates_again=evaluates_again)
        self._tensorboard = _tensorboard(run, config, global_step)
        self._wandb = _wandb(run, config)

    def rewind(self, global_step: int, *, evaluates_again: bool = False) -> None:
        """Drop what was reported after `global_step`; for `evaluates_again`, see the class."""
        self._lines = [
            line
            for line in (self._run.read(METRICS_FILE) or b"").decode(errors="replace").splitlines()
            if (step := _step_of(line)) <= global_step
            and not (evaluates_again and step == global_step and '"eval/' in line)
        ]
        self.last = {}
        for line in self._lines:
            self._remember(json.loads(line))
        self._flush()

    def evaluations(self, metric: str) -> list[float]:
        """The values of `metric` in all evaluations so far."""
        reports = (json.loads(line) for line in self._lines)
        return [report[metric] for report in reports if metric in report]

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
        self._run.write(SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
        if self._wandb:
            self._wandb.summary.update(summary)

    def close(self) -> None:
        """Let go of what is open, also when the run has failed."""
        if self._tensorboard:
            with suppress(OSError):  # a full disk is told of elsewhere
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _remember(self, record: dict[str, Any]) -> None:
        """`last` keeps the newest value of every metric."""
        self.last.update(record)

    def _flush(self) -> None:
        self._run.write(METRICS_FILE, "".join(line + "\n" for line in self._lines).encode())


def note_event(run: Storage, event: str, **values: Any) -> dict[str, Any]:
    """Add to events.jsonl what has happened, and return it: `event` and `values`, with the `time` in epoch seconds."""
    entry = {"time": round(time.time(), 3), "event": event, **values}
    run.append(EVENTS_FILE, json.dumps(entry) + "\n")
    return entry


def _step_of(line: str) -> int:
    """The step of a report; a line cut short by a crash belongs to no step."""
    try:
        return json.loads(line)["global_step"]
    except (ValueError, KeyError, TypeError, IndexError):
        return sys.maxsize


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
    identity = known.decode() if known else uuid.uuid4().hex[:12]
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
