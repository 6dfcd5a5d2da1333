"""Examples a second of two Ray Train workers against one, one thread each, on the same global batches.

    python -m benchmarks.scaling --json
    python -m benchmarks.scaling rounds=6 steps=100 compile=true

Each round trains a small HRM (width 128, 2 + 2 layers, 16 cells) with one worker and with two, in turns, because
machines are shared and noisy; medians over the reports of all rounds. Beside them two runs of one worker each at the
same time (but for a second or two at their ends): what the cores give to two processes that need nothing of each
other, all that two can reach.
"""

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor

from benchmarks import front
from benchmarks.ray_overhead import step_times
from hrm_ray.config.compose import train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.ray_session import ray_session


def small_model(folder: str, run_name: str) -> list[str]:
    """Words that train the small HRM on `folder`/data, without evaluations but the last."""
    return [
        *("experiment=sudoku_4x4", "arch.hidden_size=128", "arch.num_heads=4"),
        *(f"data={folder}/data", f"storage={folder}/runs", f"run_name={run_name}"),
        *("log_interval=5", "epochs=100", "eval_interval=null", "tensorboard=false"),
    ]


def measure(rounds: int, steps: int, words: list[str]) -> dict:
    front.need_steps(steps)
    train_config(["data=unknown", *words])  # what is wrong with them is said before Ray is started
    times: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        build(load_recipe("sudoku_4x4", {"num_train": 2000}), f"{folder}/data", show_progress=False)

        def config(name: str, num_workers: int) -> TrainConfig:
            run = [f"scaling.num_workers={num_workers}", "scaling.cpus_per_worker=1", f"max_steps={steps}"]
            return train_config([*small_model(folder, name), *run, *words])

        for i in range(rounds):
            times["one"] += step_times(config(f"one{i}", 1))
            times["two"] += step_times(config(f"two{i}", 2))
            with ThreadPoolExecutor(2) as pool:
                for seconds in pool.map(step_times, [config(f"apart{i}{which}", 1) for which in "ab"]):
                    times["apart"] += seconds
    ms = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return {
        "benchmark": "scaling",
        "overrides": words,
        "ms_per_step": {name: round(value, 2) for name, value in ms.items()},
        "ms_quartiles": {
            name: [round(q * 1e3, 2) for q in statistics.quantiles(values, n=4)[::2]]
            for name, values in times.items()
        },
        "two_over_one": round(ms["one"] / ms["two"], 3),
        "apart_over_one": round(2 * ms["one"] / ms["apart"], 3),
        "rounds": rounds,
        "steps": steps,
    }


def tell(result: dict) -> str:
    ms = result["ms_per_step"]
    return (
        f"one worker {ms['one']} ms a step, two {ms['two']}: {result['two_over_one']} times the examples a second "
        f"(two that share nothing: {result['apart_over_one']})"
    )


def main() -> None:
    front.run(__doc__, measure, tell, {"rounds": 3, "steps": 60}, for_train=True)


if __name__ == "__main__":
    main()
