"""Does the model of `hrm-ray scale` hold where it can be checked: one and two workers on the cores of this machine?

    python -m benchmarks.scale_model --json
    python -m benchmarks.scale_model rounds=5 steps=100

Each round measures, in turns, what the model is given: a step of one worker at half and at double the batch, steps of
two runs at half the batch at the same time (workers share the machine's memory), and an all-reduce of two processes at
half and at double the size of the gradients. And then what it predicts: a step of one worker, and of two, at the
batch itself. All with one thread each; medians over all rounds.
"""

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import front
from benchmarks.ray_overhead import step_times
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.ray_session import ray_session
from hrm_ray.scale import GRADIENT_BYTES, ring_s, work_of

BATCH = 256
REPEATS = 60
WORDS = ["experiment=quickstart", "arch.hidden_size=128", "arch.num_heads=4"]


def _reduce(rank: int, meeting_point: str, count: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    tensor, times = torch.zeros(count), []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - started)
    dist.destroy_process_group()
    if rank == 0:
        Path(out).write_text("\n".join(map(str, times[REPEATS // 6 :])))


def all_reduce_times(count: int) -> list[float]:
    """Seconds of all-reduces of so many float32 numbers by two processes of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_reduce, (f"{folder}/store", count, f"{folder}/times"), nprocs=2)
        return [float(line) for line in Path(folder, "times").read_text().splitlines()]


def measure(rounds: int, steps: int) -> dict:
    front.need_steps(steps)
    work = work_of(train_config([*WORDS, "data=unknown"]), vocab_size=5, seq_len=16)
    kinds = ("half", "double", "apart", "reduce_half", "reduce_double", "one", "two")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        build(load_recipe("sudoku_4x4", {"num_train": 2000}), f"{folder}/data", show_progress=False)

        def config(name: str, num_workers: int, batch: int) -> TrainConfig:
            run = [*WORDS, f"data={folder}/data", f"storage={folder}/runs", f"run_name={name}"]
            run += [f"scaling.num_workers={num_workers}", "scaling.cpus_per_worker=1", f"max_steps={steps}"]
            run += ["log_interval=5", "epochs=400", "eval_interval=null", "tensorboard=false"]
            return train_config([*run, f"global_batch_size={batch}"])

        for i in range(rounds):
            times["half"] += step_times(config(f"half{i}", 1, BATCH // 2))
            times["one"] += step_times(config(f"one{i}", 1, BATCH))
            times["double"] += step_times(config(f"double{i}", 1, 2 * BATCH))
            with ThreadPoolExecutor(2) as pool:
                runs = [config(f"apart{i}{which}", 1, BATCH // 2) for which in "ab"]
                for seconds in pool.map(step_times, runs):
                    times["apart"] += seconds
            times["two"] += step_times(config(f"two{i}", 2, BATCH))
            times["reduce_half"] += all_reduce_times(work.params // 2)
            times["reduce_double"] += all_reduce_times(2 * work.params)
    s = {kind: statistics.median(values) for kind, values in times.items()}
    puzzle_s = (s["double"] - s["half"]) / (1.5 * BATCH)
    one = s["half"] + puzzle_s * BATCH / 2
    # Of two members each sends half of the bytes twice: the time is bytes / rate + 2 latencies.
    bytes_per_s = 1.5 * work.params * GRADIENT_BYTES / (s["reduce_double"] - s["reduce_half"])
    latency_s = (s["reduce_half"] - work.params / 2 * GRADIENT_BYTES / bytes_per_s) / 2
    reduce_s = ring_s(work.params * GRADIENT_BYTES, 2, bytes_per_s, latency_s)
    predicted = {"one": one, "two": s["apart"] + reduce_s}
    return {
        "benchmark": "scale_model",
        "ms": {kind: round(1e3 * seconds, 3) for kind, seconds in s.items()},
        "all_reduce_ms": round(1e3 * reduce_s, 3),
        "all_reduce_bytes_per_s": round(bytes_per_s),
        "predicted_ms": {kind: round(1e3 * seconds, 2) for kind, seconds in predicted.items()},
        "predicted_over_measured": {kind: round(predicted[kind] / s[kind], 3) for kind in predicted},
        "params": work.params,
        "batch": BATCH,
        "rounds": rounds,
        "steps": steps,
    }


def tell(result: dict) -> str:
    lines = [
        f"{kind} worker(s): predicted {predicted} ms a step, measured {result['ms'][kind]}, ratio "
        f"{result['predicted_over_measured'][kind]}"
        for kind, predicted in result["predicted_ms"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 3, "steps": 60})


if __name__ == "__main__":
    main()
