"""What a checkpoint costs training: the time it stops for, and how much slower the steps are while it is written.

    python -m benchmarks.checkpoint [arch=hrm_v1 global_batch_size=32 checkpoints=6] --json
    python -m benchmarks.checkpoint checkpoints=3 interval=100 identifiers=1000000 arch.hidden_size=128 \
        arch.num_heads=4 arch.puzzle_emb_ndim=512 global_batch_size=32

Trains on random puzzles with a checkpoint every few steps. A checkpoint's cost is the time that the loop is blocked
(copying the state, making the checkpoint valid) and the excess of the steps during its writing over the median of the
others; `percent_at_50` is that cost against 50 steps, `percent_at_5_min` against five minutes. Beside it,
`write_cpu_s`: the processor's time of the writing, which depends less on what else the machine does; and
`synchronous_ms`: what training would wait for if the same files were written in the step.
"""

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import front
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.training import saver
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import toy_dataset


class TimedTrainer(TrainingLoop):
    """Notes the seconds of every step, the seconds blocked for checkpoints in it, and whether one was being written."""

    def __init__(self, config: TrainConfig):
        self.steps: list[tuple[float, float, bool]] = []
        self.write_s: list[float] = []
        self._blocked_s = 0.0
        self._began = 0.0
        self.synchronous_s = 0.0
        super().__init__(config, run_folder(config), World(), Hooks())

    def _run(self) -> None:
        super()._run()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            super()._save()
            super()._finish_saving()
            times.append(time.perf_counter() - started)
        self.synchronous_s = statistics.median(times)

    def _advance(self) -> None:
        writing, self._blocked_s = self._saver.is_writing, 0.0
        started = time.perf_counter()
        super()._advance()
        self.steps.append((time.perf_counter() - started, self._blocked_s, writing))

    def _save(self) -> None:
        self._began = time.perf_counter()
        super()._save()
        self._blocked_s += time.perf_counter() - self._began

    def _finish_saving(self) -> None:
        if not self._saver.is_pending:
            return
        written = not self._saver.is_writing
        started = time.perf_counter()
        super()._finish_saving()
        self._blocked_s += time.perf_counter() - started
        if written:
            self.write_s.append(started - self._began)


class TimedWrite:
    """Writes a worker's part of a checkpoint, and notes the seconds of processor that this took its thread."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self._write = saver._write

    def __call__(self, *args):
        started = time.thread_time()
        entries = self._write(*args)
        self.cpu_s.append(time.thread_time() - started)
        return entries


def measure(checkpoints: int, interval: int, identifiers: int, words: list[str]) -> dict:
    words = words or ["arch=hrm_v1", "global_batch_size=32"]
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        toy_dataset(
            Path(folder) / "data",
            num_train=2000,
            num_test=1,
            seq_len=81,
            vocab_size=11,
            num_identifiers=identifiers,
        )
        config = train_config(
            [
                *words,
                f"data={folder}/data",
                f"storage={folder}/runs",
                "run_name=checkpoint",
                "scaling=local",
                "epochs=100000",
                "eval_interval=null",
                f"max_steps={interval * (checkpoints + 1)}",
                f"checkpoint_interval={interval}",
                "checkpoint_interval_s=null",
                "tensorboard=false",
            ]
        )
        trainer, write = TimedTrainer(config), TimedWrite()
        with patch.object(saver, "_write", write):
            trainer.train()
        last = finished(run_folder(config))[-1]
        size = sum(info.bytes for info in last.manifest.files.values())
    steps = trainer.steps[2:-1]  # the first ones warm up; the last one waits for its checkpoint
    quiet_s = statistics.median(total - blocked for total, blocked, writing in steps if not writing)
    blocked_s = sum(blocked for _, blocked, _ in steps) / checkpoints
    excess = sum(max(0.0, total - blocked - quiet_s) for total, blocked, writing in steps if writing)
    cost_s = blocked_s + excess / checkpoints
    return {
        "benchmark": "checkpoint",
        "step_ms": round(quiet_s * 1e3, 1),
        "checkpoint_mb": round(size / 1e6, 1),
        "blocked_ms": round(blocked_s * 1e3, 1),
        "slower_steps_ms": round(excess / checkpoints * 1e3, 1),
        "write_s": round(statistics.median(trainer.write_s), 2),
        "write_cpu_s": round(statistics.median(write.cpu_s), 2),
        "synchronous_ms": round(trainer.synchronous_s * 1e3, 1),
        "percent_at_50": round(cost_s / (50 * quiet_s) * 100, 2),
        "percent_at_5_min": round(cost_s / 300 * 100, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "checkpoints": checkpoints,
        "global_batch_size": config.global_batch_size,
    }


def tell(result: dict) -> str:
    return (
        f"a checkpoint of {result['checkpoint_mb']} MB stops training for {result['blocked_ms']} ms and slows "
        f"steps by {result['slower_steps_ms']} ms in all: {result['percent_at_50']} % at one every 50 steps of "
        f"{result['step_ms']} ms (written in the step: {result['synchronous_ms']} ms)"
    )


def main() -> None:
    # One is written in less than four steps of the 27M model.
    front.run(__doc__, measure, tell, {"checkpoints": 6, "interval": 4, "identifiers": 1}, for_train=True)


if __name__ == "__main__":
    main()
