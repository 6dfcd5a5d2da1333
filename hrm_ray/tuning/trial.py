"""A trial as Ray Tune runs it: the ordinary loop in a thread of an actor, which serves one trial after another.

Tune asks for one result after another (`step`); the loop goes on meanwhile. What a trial has learned is in its run
folder alone: an actor that starts again, here or on another node, goes on from the newest checkpoint there.
"""

import gc
import json
import queue
import threading
import time
import traceback
from typing import Any

import ray
from ray import tune

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import NonFiniteLoss, OutOfMemory, Unseen, UserError, first_line, notes
from hrm_ray.ray_metrics import RunMetrics
from hrm_ray.training.driver import run_folder
from hrm_ray.training.logging import reports
from hrm_ray.training.shared import check_seen
from hrm_ray.tuning.lineage import take_over
from hrm_ray.worker_logs import MAX_FRAMES

HEARTBEAT_S = 1.0  # a result comes at least so often
STOP_TIMEOUT_S = 600.0  # how long a run may take for its step and checkpoint when it is told to stop


class Run:
    """One run of the loop, in a thread.

    Args:
        config: of the run; with several workers it starts them as Ray Train's, inside the trial's reservation.
        cpus: threads of this process, if it trains itself.
        owner: see `Hooks`.
        sweep: of which it is a trial.
        unmade: why the driver could not make its folder; None: it did, or there is none to make.
    """

    def __init__(self, config: TrainConfig, cpus: int, owner: str, sweep: str, unmade: str | None):
        self._config, self._cpus, self._owner, self._sweep = config, cpus, owner, sweep
        self._unmade = unmade
        self._stop: str | None = None
        self.reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.step, self.phase = 0, "start"
        self.setup = ""
        self.outcome: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def stop(self, reason: str) -> None:
        """End after the step at hand, with a checkpoint; returns when that is done."""
        self._stop = reason
        self._thread.join(STOP_TIMEOUT_S)

    def wait(self, timeout_s: float) -> None:
        """Until it has ended, at most so long."""
        self._ended.wait(timeout_s)

    def _train(self) -> None:
        try:
            self.outcome = {"kind": "ended", "summary": self._trained()}
        except (NonFiniteLoss, OutOfMemory) as error:  # of this point
            self.outcome = {"kind": "refused", "reason": str(error)}
        except Unseen as error:
            self.outcome = {"kind": "unseen", "reason": str(error)}
        except UserError as error:
            self.outcome = {"kind": "failed", "reason": str(error), "log": "\n".join(notes(error))}
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            log = traceback.format_exc(limit=-MAX_FRAMES).strip()
            self.outcome = {"kind": "failed", "reason": reason, "log": log}
        finally:
            self._ended.set()

    def _trained(self) -> dict[str, Any]:
        import torch

        from hrm_ray.training.hooks import Hooks, Progress
        from hrm_ray.training.loop import TrainingLoop
        from hrm_ray.training.signals import StopRequest
        from hrm_ray.world import World

        deadline = StopRequest(self._config.max_time_s)

        def progress(at: Progress) -> None:
            self.step, self.phase, self.setup = at.step, at.phase, at.setup

        def reason() -> str | None:
            return self._stop or deadline.reason()

        run = run_folder(self._config)
        if self._unmade is not None:
            raise UserError(self._unmade)
        check_seen("data", self._config.data_path)
        check_seen("storage", self._config.storage, run)
        for _, record in reports(run):  # of which the driver may have been killed before it heard
            self.reports.put(record)
        if self._config.scaling.max_workers > 1:
            from hrm_ray.tuning.workers import train_in_reservation

            return train_in_reservation(
                self._config, run, progress, self.reports.put, reason, self._owner, self._sweep
            )
        torch.set_num_threads(self._cpus)  # of this thread
        hooks = Hooks(progress=progress, report=self.reports.put, stop=reason, owner=self._owner)
        try:
            with RunMetrics(self._config, self._sweep) as metrics:
                return TrainingLoop(self._config, run, World(), metrics.heard_by(hooks)).train()
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Trial(tune.Trainable):
    """Its `config`: `number`, `run` (a TrainConfig as a mapping), `cpus`, `metrics` to report, the `owner` (the sweep's
    driver), the name of the `sweep`, why its folder is `unmade` (or None), and for a population the number of the
    `copy` that it goes on from."""

    def setup(self, config: dict[str, Any]) -> None:
        self._run: Run | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial, when the one before has written its checkpoint."""
        self._end()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._point = config

    def step(self) -> dict[str, Any]:
        """What has come since the last call: `reports` [(global_step, metrics)], and at the end the `outcome`."""
        if self._run is None:
            config = TrainConfig.model_validate(self._point["run"])
            take_over(run_folder(config), self._point["copy"], STOP_TIMEOUT_S)
            given = (self._point[name] for name in ("cpus", "owner", "sweep", "unmade"))
            self._run = Run(config, *given)
        run = self._run
        reports = self._new_reports(run)
        result: dict[str, Any] = {
            "number": self._point["number"],
            "global_step": run.step,
            "phase": run.phase,
            "reports": reports,
            "node": ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
        }
        if run.outcome is not None and run.reports.empty():
            result |= {"outcome": json.dumps(run.outcome), "done": True}  # text, since Tune flattens
        return result

    def _new_reports(self, run: Run) -> list[list[Any]]:
        """Wait for a report with a metric, for the end, or for the next heartbeat."""
        deadline = time.monotonic() + HEARTBEAT_S
        found: list[list[Any]] = []
        while not found and (left := deadline - time.monotonic()) > 0:
            try:
                record = run.reports.get(timeout=min(left, 0.1))
            except queue.Empty:
                if run.outcome is not None:
                    break
                continue
            told = {name: record[name] for name in self._point["metrics"] if name in record}
            if told:
                found.append([record["global_step"], told])
        return found

    def let_go(self) -> None:
        """End the loop, with a checkpoint, since the trial is to pause."""
        self._end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the loop writes its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the loop goes on from its newest."""

    def cleanup(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._run is not None:
            self._run.stop("trial")
            self._run = None
