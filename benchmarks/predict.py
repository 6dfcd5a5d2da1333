"""Does the model of docs/scale.md predict steps on this machine? Its few numbers, its prediction, and real training.

    python -m benchmarks.predict --json
    python -m benchmarks.predict rounds=3 steps=40 out=my_machine.yaml
    hrm-ray scale experiment=sudoku_4x4 machine=my_machine.yaml workers=[1,2]

Measured for the model, in two processes of one thread each: training steps of a quarter and of one and a half batches,
in one process while the other waits, and in both side by side; AdamATan2 alone; all-reduces of two sizes. From these it
predicts a step of the whole batch with one worker, and with two that share it. Then Ray Train does both. All in turns,
since machines are shared and noisy; what counts are the ratios of the medians, and beside them those of the fastest
times, which other programs disturb least. The model is the small HRM of benchmarks.scaling; `out` is a machine file for
`hrm-ray scale`. Takes three to five minutes on two free cores.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from benchmarks import front
from benchmarks.machine import cpu_name
from benchmarks.ray_overhead import step_times
from benchmarks.scaling import small_model
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.errors import UserError
from hrm_ray.models.compiled import STANCE
from hrm_ray.optim.adam_atan2 import AdamATan2
from hrm_ray.ray_session import ray_session
from hrm_ray.scale.machine import Machine
from hrm_ray.scale.model import OPTIMIZER_BYTES, step
from hrm_ray.scale.work import Work, puzzles_of
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World

BURST = 5  # steps, or all-reduces, that are timed together; the interval of the reports of real training
BURSTS = 3  # a round
SMALL_BYTES = 1024  # of an all-reduce that takes the time of its messages only
SMALL_BATCH, LARGE_BATCH = 0.25, 1.5  # shares of the batch


class Steps(TrainingLoop):
    """Training steps of one process, as the loop takes them."""

    def __init__(self, config: TrainConfig):
        super().__init__(config, run_folder(config), World(), Hooks())
        self._prepare()

    def take(self, *, together: bool) -> None:
        """One step; `together`: until the other process has taken its step too."""
        with torch.compiler.set_stance(STANCE) if self.setup.compile else nullcontext():
            self._advance()
        if together:
            dist.barrier()

    def optimizer(self) -> AdamATan2:
        """One for copies of the weights, with gradients."""
        copies = [p.detach().clone().requires_grad_() for p in self.state.model.parameters()]
        for copy in copies:
            copy.grad = torch.full_like(copy, 1e-3)
        return AdamATan2(copies, backend=self.setup.optimizer_backend)


def member(rank: int, place: str, configs: dict[str, TrainConfig], commands: Connection) -> None:
    """One of the two processes: answers each command with seconds, until there are no more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    steps = {name: Steps(config) for name, config in configs.items()}
    optimizer = next(iter(steps.values())).optimizer()
    calls = {
        f"{name}, {'together' if together else 'alone'}": partial(steps[name].take, together=together)
        for name in steps
        for together in (False, True)
    }
    calls["optimizer"] = optimizer.step
    sizes = {
        "few bytes": SMALL_BYTES,
        "gradients": 4 * sum(p.numel() for p in optimizer.param_groups[0]["params"]),
    }
    for name, size in sizes.items():
        calls[name] = partial(dist.all_reduce, torch.zeros(size // 4))
    while (name := commands.recv()) is not None:
        commands.send([seconds(calls[name]) for _ in range(BURSTS)])


def seconds(call: Any) -> float:
    """Of one call, on average over a burst of them."""
    started = time.perf_counter()
    for _ in range(BURST):
        call()
    return (time.perf_counter() - started) / BURST


class Pair:
    """The two processes."""

    def __init__(self, commands: Sequence[Connection]):
        self._commands = commands

    def ask(self, name: str, of: int = 2) -> list[float]:
        """Seconds of what `member` knows by `name`, by the first process or by both; theirs are as good as equal."""
        for commands in self._commands[:of]:
            commands.send(name)
        first, *_ = [commands.recv() for commands in self._commands[:of]]
        return first


@contextmanager
def pair(folder: str, configs: Sequence[dict[str, TrainConfig]]) -> Iterator[Pair]:
    """Inside, two processes wait for commands, with runs of `configs` each."""
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in configs]
    processes = [
        context.Process(target=member, args=(rank, f"{folder}/meet", configs[rank], theirs), daemon=True)
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process, (_, theirs) in zip(processes, ends, strict=True):
        process.start()
        theirs.close()  # so that the end of a process shows
    try:
        yield Pair([own for own, _ in ends])
        for own, _ in ends:
            own.send(None)
        for process in processes:
            process.join(10)
    except EOFError:
        raise RuntimeError("a process of the measurement ended") from None
    finally:
        for process in processes:
            process.kill()


def numbers(ms: dict[str, float], sizes: tuple[int, int], work: Work, start_s: float) -> dict[str, Any]:
    """The numbers of a machine, from medians of what was measured.

    Args:
        ms: by the names of `member`, milliseconds.
        sizes: the small and the large batch.
        work: of the training.
    """
    s = {name: value / 1e3 for name, value in ms.items()}
    per_puzzle = (s["large, alone"] - s["small, alone"]) / (sizes[1] - sizes[0])
    per_byte = (s["gradients"] - s["few bytes"]) / (work.gradient_bytes - SMALL_BYTES)
    if per_puzzle <= 0 or per_byte <= 0:
        raise UserError("more work took less time: this machine is too busy to be measured; try again")
    fixed = max(0.0, s["small, alone"] - sizes[0] * per_puzzle - s["optimizer"])
    alone, together = (
        sum(s[f"{size}, {how}"] for size in ("small", "large")) for how in ("alone", "together")
    )
    here = f"measured {time.strftime('%Y-%m-%d')}"

    def measured(value: float, how: str) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "source": f"{here}: {how}"}

    def assumed(value: float, why: str = "") -> dict[str, Any]:
        return {"value": value, "source": f"assumed{why and ': '}{why}"}

    batches = f"steps of {sizes[0]} and {sizes[1]} puzzles"
    return {
        "about": f"{cpu_name()}, two workers of one thread",
        "workers": 2,
        "runs_ahead": False,
        "flops_per_s": measured(work.model.training.flops / per_puzzle, f"slope of {batches}"),
        "launch_s": measured(fixed / work.model.training.products, f"what is left of {batches} at 0"),
        "optimizer_bytes_per_s": measured(
            OPTIMIZER_BYTES * work.model.num_params / s["optimizer"], "AdamATan2 alone"
        ),
        "crowded": measured(together / alone, f"{batches}, two side by side against one alone"),
        "inside_bytes_per_s": measured(1 / per_byte, "gloo, two processes, the gradients' size"),
        "inside_latency_s": measured(
            max(0.0, s["few bytes"] - SMALL_BYTES * per_byte) / 2, "gloo, two processes, 1 KiB"
        ),
        "between_bytes_per_s": assumed(1e9, "80 % of 10 Gbit/s"),
        "between_latency_s": assumed(50e-6),
        "data_s": measured(0.0, "it is in launch_s"),
        "copy_bytes_per_s": assumed(2e9, "as on an EPYC, 338 MB in 0.17 s"),
        "store_bytes_per_s": assumed(38e6, "as on an EPYC beside training, 338 MB in 8.9 s"),
        "start_s": measured(start_s, "two Ray workers, in a Ray that runs"),
        "price_per_hour": assumed(0.045, "a core of c7i.4xlarge in cluster/aws.yaml, dollars"),
        "spot_price_per_hour": assumed(0.019, "as in cluster/aws.yaml, dollars"),
        "interruptions_per_hour": assumed(0.05, "once in 20 hours"),
        "replace_s": assumed(300),
    }


def begin_s(config: TrainConfig, called_at: float) -> float:
    """Seconds from the call to the begin of training."""
    events = (Path(config.storage) / str(config.run_name) / "events.jsonl").read_text().splitlines()
    began = next(event for event in map(json.loads, events) if event["event"] == "started")
    return began["time"] - called_at


def measure(rounds: int, steps: int, out: str, words: list[str]) -> dict:
    front.need_steps(steps)
    if out and not out.endswith((".yaml", ".yml")):
        raise UserError(f"out={out}: a file that ends in .yaml")
    batch = train_config(
        [*small_model("unknown", "check"), "global_batch_size=128", *words]
    ).global_batch_size
    sizes = (max(1, int(SMALL_BATCH * batch)), int(LARGE_BATCH * batch))
    if batch < 4:
        raise UserError(f"global_batch_size={batch}: at least 4")
    times: dict[str, list[float]] = {}
    starts = []
    with tempfile.TemporaryDirectory() as folder, ray_session():
        build(load_recipe("sudoku_4x4", {"num_train": 2000}), f"{folder}/data", show_progress=False)

        def config(name: str, *more: str) -> TrainConfig:
            run = [*small_model(folder, name), "scaling.cpus_per_worker=1", f"global_batch_size={batch}"]
            return train_config([*run, *words, *more])

        def local(rank: int) -> dict[str, TrainConfig]:
            named = zip(("small", "large"), sizes, strict=True)
            more = ("scaling=local", "checkpoint_interval_s=null")
            return {name: config(f"{name}{rank}", f"global_batch_size={size}", *more) for name, size in named}

        def train(num_workers: int, i: int) -> list[float]:
            of = config(f"{num_workers}-{i}", f"scaling.num_workers={num_workers}", f"max_steps={steps}")
            called_at = time.time()
            found = step_times(of)
            if num_workers == 2:
                starts.append(begin_s(of, called_at))
            return found

        work = Work.of(config("work"), puzzles_of(f"{folder}/data"))
        with pair(folder, [local(0), local(1)]) as two:
            inputs = {"small, alone": 1, "large, alone": 1, "optimizer": 1}
            inputs |= {"small, together": 2, "large, together": 2, "few bytes": 2, "gradients": 2}
            for name, of in inputs.items():  # the first ones warm up
                two.ask(name, of)
            for i in range(rounds):
                for num_workers in (1, 2):
                    for name, of in inputs.items():
                        if of == num_workers:
                            times.setdefault(name, []).extend(two.ask(name, of))
                    times.setdefault(f"{num_workers} worker(s)", []).extend(train(num_workers, i))
    starts_s = statistics.median(starts)
    found, medians = compare(times, statistics.median, sizes, work, starts_s)
    _, fastest = compare(times, min, sizes, work, starts_s)
    if out:
        text = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=200)
        Path(out).write_text(f"# {found['about']}: measured by `python -m benchmarks.predict`.\n{text}")
    return {
        "benchmark": "predict",
        "overrides": words,
        "global_batch_size": batch,
        **medians,
        "fastest": fastest,
        "ms_quartiles": {
            name: [float(f"{q * 1e3:.4g}") for q in statistics.quantiles(values, n=4)[::2]]
            for name, values in times.items()
        },
        "machine": found,
        "rounds": rounds,
        "steps": steps,
    }


def compare(
    times: dict[str, list[float]],
    pick: Callable[[list[float]], float],
    sizes: tuple[int, int],
    work: Work,
    start_s: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers of this machine, and what they predict beside what was measured.

    Args:
        times: seconds, by the names of `member`, and of real training.
        pick: which of several to take.
        sizes, work, start_s: see `numbers`.
    """
    ms = {name: pick(values) * 1e3 for name, values in times.items()}
    found = numbers(ms, sizes, work, start_s)
    machine, batch = Machine.model_validate(found), work.config.global_batch_size
    predicted = {n: step(machine, work, n, batch).seconds * 1e3 for n in (1, 2)}
    measured = {n: ms[f"{n} worker(s)"] for n in (1, 2)}
    return found, {
        "input_ms": {name: float(f"{value:.4g}") for name, value in ms.items() if "worker" not in name},
        "predicted_ms": {n: round(value, 2) for n, value in predicted.items()},
        "measured_ms": {n: round(value, 2) for n, value in measured.items()},
        "predicted_over_measured": {n: round(predicted[n] / measured[n], 3) for n in (1, 2)},
    }


def tell(result: dict) -> str:
    lines = [
        f"{'workers':>7}  {'predicted ms':>12}  {'measured ms':>11}  {'ratio':>5}  {'of the fastest':>14}"
    ]
    for n in (1, 2):
        predicted, measured, ratio = (
            result[key][n] for key in ("predicted_ms", "measured_ms", "predicted_over_measured")
        )
        fastest = result["fastest"]["predicted_over_measured"][n]
        lines.append(f"{n:7}  {predicted:12.1f}  {measured:11.1f}  {ratio:5.2f}  {fastest:14.2f}")
    return "\n".join(lines)


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 3, "steps": 40, "out": ""}, for_train=True)


if __name__ == "__main__":
    main()
