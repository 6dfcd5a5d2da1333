"""The architectures side by side: trains each under each way of halting, then writes a table and draws curves.

python -m benchmarks.family 4x4                   three seeds of everything, some 50 minutes on two cores
python -m benchmarks.family 6x6                   one seed of HRM, TRM and the transformer; votes and depth
python -m benchmarks.family 4x4 seeds=1 max_steps=100      a look

Every run is `hrm-ray train` on one core, as many at a time as there are cores; finished ones are not done again, and
interrupted ones go on. CPU seconds are those of the whole command (of the last one where several were needed). Results
lie in FOLDER/runs; the tables are printed, and with out=docs/results.md written there between the lines `<!-- 4x4 -->`
and `<!-- end -->`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import hrm_ray
from benchmarks.machine import facts

# At the width of the experiment, and about HRM's work a step: the published TRM has 3 and 6 cycles.
FEWER_CYCLES = ("arch.H_cycles=2", "arch.L_cycles=3")
ARCHS = {
    "hrm_v1": (),
    "trm": FEWER_CYCLES,
    "trm_mlp": FEWER_CYCLES,
    "transformer": ("arch.num_layers=4",),  # as many parameters as HRM's 2 + 2 layers
}
HALTINGS = ("act", "q_learning", "fixed")
DEPTHS = (1, 2, 4, 8, 16, 32)
VOTES = (1, 2, 3, 5, 9)
CURVES = {("hrm_v1", "act"): "HRM", ("trm", "q_learning"): "TRM"}  # drawn from the runs on 6x6


@dataclass(frozen=True)
class Size:
    """Puzzles of one size: the recipe of the data set, what is not as in the experiment `sudoku_4x4`, and the rows of
    the table: architecture, halting, and what is set for them alone."""

    recipe: str
    overrides: tuple[str, ...]
    rows: dict[tuple[str, str], tuple[str, ...]]


SIZES = {
    # Smaller batches than in the experiment, and more of them, so that every row gets past its plateau.
    "4x4": Size(
        "sudoku_4x4",
        ("global_batch_size=64", "lr=2e-3", "epochs=8", "eval_interval=4"),
        # The transformer takes one step: there is nothing to halt.
        {(a, h): () for a, h in product(ARCHS, HALTINGS) if a != "transformer" or h == "act"},
    ),
    "6x6": Size(
        "sudoku_6x6",
        # With 64 puzzles a batch nothing gets past its plateau.
        (
            *("arch.hidden_size=128", "arch.num_heads=4", "epochs=18", "eval_interval=3"),
            *("lr=2e-3", "lr_warmup_steps=100"),
        ),
        {
            ("hrm_v1", "act"): (),
            ("trm", "q_learning"): ("lr=1e-3",),  # HRM's 2e-3 is too high for its deeper gradient
            ("trm", "act"): ("lr=5e-4",),
            ("transformer", "act"): (),
        },
    ),
}


@dataclass(frozen=True)
class Run:
    size: str
    arch: str
    halting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.arch}-{self.halting}-{self.seed}"


def runs_of(size: str, seeds: int) -> Iterator[Run]:
    """Every run of a table, the first seed of all before the second."""
    for seed, (arch, halting) in product(range(seeds), SIZES[size].rows):
        yield Run(size, arch, halting, seed)


def command(*words: str) -> float:
    """Run `hrm-ray` on one core; returns its CPU time in seconds. Its last line on failure."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "hrm_ray.cli", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, used = os.wait4(child.pid, 0)
        if status:
            errors.seek(0)
            raise SystemExit(f"hrm-ray {' '.join(words)}: {errors.read().strip().splitlines()[-1]}")
    return used.ru_utime + used.ru_stime


def train(run: Run, folder: Path, overrides: list[str]) -> dict:
    """Train to the end; what came of it, with the CPU time that the command took."""
    size = SIZES[run.size]
    words = ["experiment=sudoku_4x4", f"arch={run.arch}", *ARCHS[run.arch], f"halting={run.halting}"]
    words += [f"data={folder}/{size.recipe}", f"storage={folder}/runs", f"run_name={run.name}"]
    words += [f"seed={run.seed}", "scaling=local", "tensorboard=false", *size.overrides]
    words += [*size.rows[run.arch, run.halting], *overrides]
    done = folder / "runs" / run.name / "summary.json"
    cpu_s = folder / "runs" / f"{run.name}.cpu_s"
    if not cpu_s.exists():
        cpu_s.parent.mkdir(exist_ok=True)
        spent = command("train", *words)
        cpu_s.write_text(f"{spent:.1f}\n")
    result = json.loads(done.read_text()) | {"cpu_s": float(cpu_s.read_text())}
    exact = result["final"]["eval/exact_accuracy"]
    print(f"{run.name}: {exact:.1%}, {result['cpu_s']:.0f} s of CPU", file=sys.stderr, flush=True)
    return result


def show(values: list[float], form: str) -> str:
    """Mean, and the range if there are several."""
    mean = format(statistics.mean(values), form)
    return (
        mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"
    )


def table(results: dict[Run, dict]) -> str:
    """One row an architecture and way of halting, over all seeds."""
    rows = [
        "| architecture | halting in training | parameters | exact, all steps | exact, halting itself | "
        "its steps of | CPU, s |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict]] = {}
    for run, result in results.items():
        groups.setdefault((run.arch, run.halting), []).append(result)
    for (arch, halting), group in groups.items():
        last = [result["final"] for result in group]
        rows.append(
            f"| {arch} | {halting if arch != 'transformer' else '-'} | {group[0]['num_params']:,} | "
            f"{show([m['eval/exact_accuracy'] for m in last], '.1%')} | "
            f"{show([m['eval/learned_exact_accuracy'] for m in last], '.1%')} | "
            f"{show([m['eval/learned_steps'] for m in last], '.2f')} of {last[0]['eval/steps']:.0f} | "
            f"{show([result['cpu_s'] for result in group], '.0f')} |"
        )
    return "\n".join(rows)


def curves(folder: Path, out: Path) -> str:
    """Accuracy over votes and depth of the 6x6 runs; draws them and returns them as a table."""
    data = folder / SIZES["6x6"].recipe
    points: dict[str, dict[str, list[float]]] = {}
    for (arch, halting), own in CURVES.items():
        solver = hrm_ray.load(folder / "runs" / Run("6x6", arch, halting, 0).name)
        points[own] = {
            "depth": [solver.evaluate(data, halt_max_steps=n)[0]["exact_accuracy"] for n in DEPTHS],
            "votes": [solver.evaluate(data, votes=n)[0]["exact_accuracy"] for n in VOTES],
        }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, kind, xs in zip(axes, ("depth", "votes"), (DEPTHS, VOTES), strict=True):
        for name, values in points.items():
            axis.plot(xs, values[kind], "o-", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(xs, [str(x) for x in xs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes[0].axvline(8, color="grey", linestyle=":", linewidth=1)
    axes[0].set(xlabel="ACT steps at most (8 in training)", ylabel="puzzles exactly right")
    axes[1].set(xlabel="relabelled copies that vote")
    axes[1].legend(loc="lower right", frameon=False)
    figure.savefig(out, dpi=130)
    rows = []
    for kind, xs in (("depth", DEPTHS), ("votes", VOTES)):
        rows += ["", f"| {kind} | " + " | ".join(map(str, xs)) + " |", "|---" * (len(xs) + 1) + "|"]
        rows += [
            f"| {name} | " + " | ".join(f"{v:.1%}" for v in points[name][kind]) + " |" for name in points
        ]
    return "\n".join(rows)


def insert(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the mark's line and the next `<!-- end -->`."""
    before, _, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("words", nargs="*", metavar="key=value", help="folder, seeds, out, or of `train`")
    args = parser.parse_args()
    options = dict(word.split("=", 1) for word in args.words)
    folder, out = Path(options.pop("folder", "results")), options.pop("out", None)
    seeds = int(options.pop("seeds", 3 if args.size == "4x4" else 1))
    recipe = SIZES[args.size].recipe
    if not (folder / recipe).exists():
        command("data", "build", f"recipe={recipe}", f"out={folder}/{recipe}")
    runs = list(runs_of(args.size, seeds))
    overrides = [f"{key}={value}" for key, value in options.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(runs, pool.map(lambda run: train(run, folder, overrides), runs), strict=True))
    about = facts()
    text = f"{about['cpu']}, one core a run, torch {about['torch']}, commit {about['commit']}\n\n" + table(
        results
    )
    if args.size == "6x6":
        text += "\n" + curves(
            folder, Path(out).with_name("depth_and_votes.png") if out else folder / "6x6.png"
        )
    print(text)
    if out:
        insert(Path(out), args.size, text)


if __name__ == "__main__":
    main()
