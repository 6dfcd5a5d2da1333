"""How well and how fast an experiment learns here: builds its data, trains it under Ray, prints what came out.

python -m benchmarks.quickstart --json                        experiment quickstart
python -m benchmarks.quickstart sudoku_6x6 seed=1 --json      any experiment with a recipe, any override
"""

import argparse
import json
import tempfile
import time

from benchmarks.machine import facts
from hrm_ray.config.compose import train_config
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.training import launch

RECIPES = {"quickstart": "sudoku_easy", "sudoku_4x4": "sudoku_4x4", "sudoku_6x6": "sudoku_6x6"}


def measure(experiment: str, overrides: list[str]) -> dict:
    about = facts()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build(load_recipe(RECIPES[experiment]), f"{folder}/data")
        build_s = time.perf_counter() - started
        words = [f"experiment={experiment}", f"data={folder}/data", f"storage={folder}/runs", *overrides]
        started = time.perf_counter()
        summary, _ = launch.train(train_config(words))
        return {
            "benchmark": experiment,
            "overrides": overrides,
            "exact_accuracy": summary["best"]["eval/exact_accuracy"],
            "final_exact_accuracy": summary["final"]["eval/exact_accuracy"],
            "train_s": summary["train_s"],
            "steps": summary["global_step"],
            "num_params": summary["num_params"],
            "build_s": round(build_s, 1),
            "train_command_s": round(time.perf_counter() - started, 1),
            **about,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", default="quickstart", choices=RECIPES)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = measure(args.experiment, args.overrides)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['exact_accuracy']:.1%} exact after {result['train_s']} s of training")


if __name__ == "__main__":
    main()
