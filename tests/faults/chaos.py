"""Many faults at random moments of real runs, and a table of what came of them.

    make chaos                                           100 faults of all kinds: half an hour on two cores
    python -m tests.faults.chaos --faults 10 --kinds driver-killed,cluster-lost --seed 1 --json

A run takes one fault after another, each after it has got on from the last, and must end like a run that nobody
disturbed: the same bytes in its last checkpoint, the same records, each once. The moments are a function of the
seed; what a fault meets there is not, so that a second time is another test. The exit code is 1 if anything was lost.
"""

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count, cycle
from pathlib import Path

from tests.faults.compare import (
    Reference,
    Tolerance,
    checksums,
    end_problems,
    likeness_problems,
    litter,
    read_records,
    record_problems,
)
from tests.faults.faults import KINDS, Fault, NodeAdded, NodesFault, Outcome, inject
from tests.faults.runs import (
    Run,
    Setting,
    interrupt_on_signals,
    is_finished,
    make_dataset,
    step_of,
)
from tests.faults.sessions import Lost

MAX_PROBLEMS_SHOWN = 5
Say = Callable[[str], None]


# Nodes come and go in runs of their own, as long as their faults take. With so little to learn, and puzzles that halt
# at the same step always, what one and two workers compute stays alike. So does a slow puzzle embedding: where its
# gradient nearly cancels, the order of summation decides its sign, and each such number is two steps off at once.
ELASTIC = Setting(
    num_workers=1,
    max_workers=2,
    max_steps=1_000_000,
    checkpoint_interval=128,  # and so seldom that a checkpoint is known that was written because of a notice
    eval_interval=8,
    watchdog_s=60,
    more=(
        ("lr", 1e-5),
        ("puzzle_emb_lr", 1e-6),
        ("arch.halt_max_steps", 2),
        ("arch.halt_exploration_prob", 1),
    ),
)
# Measured without any fault, one worker against two, 1519 steps, two seeds: weights differed by 7.5e-8 at most, the
# embedding by 2e-6, one sign. (At an embedding rate of 1e-4 signs flipped after 400 steps, and by 1029 the weights had
# drifted to 5.1e-6.) A step more or less moves the weights by 1e-5, the embedding by 1e-6.
TOLERANCE = Tolerance(loss=2e-5, weight=1e-6, embedding=1e-5)
FAULTS_OF_NODES_A_RUN = 4


class Site:
    """A folder for runs, with the undisturbed run of each setting."""

    def __init__(self, root: Path, say: Say = lambda line: None):
        self.root, self.say = root, say
        self.data = make_dataset(root / "data")
        self._references: dict[Setting, Reference] = {}
        self._num_runs = 0

    def run(self, setting: Setting) -> Run:
        """A new run, not yet started."""
        self._num_runs += 1
        return Run(setting, self.root / f"{self._num_runs}", self.data)

    def reference(self, setting: Setting) -> Reference:
        """The undisturbed run of `setting`, made when first asked for."""
        if setting not in self._references:
            self._references[setting] = self._undisturbed(setting)
        return self._references[setting]

    def _undisturbed(self, setting: Setting) -> Reference:
        started = time.monotonic()
        with self.run(setting) as run:
            reference = watch_undisturbed(run)
        self.say(
            f"undisturbed run on {setting}: {reference.last_step} steps, "
            f"{len(reference.files)} checkpoints, {time.monotonic() - started:.0f} s"
        )
        return reference


def watch_undisturbed(run: Run) -> Reference:
    """The whole run; notes what is in each checkpoint before it is deleted."""
    checkpoints: dict[int, dict[str, str]] = {}

    def collected() -> bool:
        ended = run.has_ended
        new = [p for p in run.checkpoints() if is_finished(p) and step_of(p) not in checkpoints]
        checkpoints.update({step_of(p): checksums(p) for p in new})
        return ended

    run.start()
    run.wait_for(collected, "its end", timeout_s=600)
    if run.wait_for_exit():
        raise Lost(f"the undisturbed run failed\n{run.last_words()}")
    return Reference(dict(read_records(run.folder)), checkpoints)


def disturb(site: Site, setting: Setting, faults: deque[Fault], rng: random.Random) -> Iterator[Outcome]:
    """One run, with as many of `faults` (taken from the left) as fit in; it is compared at its end."""
    reference = site.reference(setting)
    with site.run(setting) as run:
        yield from _inject_all(site, run, faults, rng, reference)


def disturb_nodes(site: Site, faults: deque[Fault], rng: random.Random) -> Iterator[Outcome]:
    """One elastic run, with some of `faults`; an undisturbed run of as many steps is made after it."""
    with site.run(ELASTIC) as run:
        yield from _inject_all(site, run, faults, rng, None)


def _inject_all(
    site: Site, run: Run, faults: deque[Fault], rng: random.Random, reference: Reference | None
) -> Iterator[Outcome]:
    num_faults = 0
    try:
        run.start()
        run.wait_for(lambda: run.last_step() > 0, "the first step")
        while faults and not run.ends_soon and (reference or num_faults < FAULTS_OF_NODES_A_RUN):
            num_faults += 1
            outcome = inject(faults.popleft(), run, reference, rng)
            yield outcome
            if not outcome.survived or outcome.problems:
                return
        problems = _finish(run, reference) if reference else _stop(site, run)
    except Lost as lost:
        problems = [str(lost)]
    if problems:
        yield Outcome("at-the-end", run.last_step(), problems=problems)
    for name in litter(run.folder):
        site.say(f"left behind in {run.folder}: {name}")
    if not problems:
        shutil.rmtree(run.folder.parent.parent, ignore_errors=True)


def _finish(run: Run, reference: Reference) -> list[str]:
    code = run.wait_for_exit(timeout_s=600)
    if code:
        return [f"the command ended with {code}\n{run.last_words()}"]
    return end_problems(run.folder, reference)


def _stop(site: Site, run: Run) -> list[str]:
    """End an elastic run where it is, and compare it with one worker's undisturbed run to there."""
    run.signal_driver(signal.SIGTERM)
    code = run.wait_for_exit()
    if code != 128 + signal.SIGTERM:
        return [f"the command ended with {code}\n{run.last_words()}"]
    run.nodes.end()
    last_step = run.last_step()
    with site.run(replace(run.setting, max_workers=None, max_steps=last_step)) as undisturbed:
        reference = replace(watch_undisturbed(undisturbed), tolerance=TOLERANCE)
        site.say(f"undisturbed run of as many steps, {last_step}")
        return record_problems(run.folder, reference) + likeness_problems(
            run.checkpoint(last_step), undisturbed.checkpoint(last_step), TOLERANCE
        )


def schedule(kinds: Sequence[str], num_faults: int, rng: random.Random) -> tuple[deque[Fault], deque[Fault]]:
    """As many of each kind as of every other, in random order, but half as many of those of nodes, which take long.

    Returns:
        the faults of processes and files, and those of nodes: in these, workers become fewer and more in turn.
    """
    faults: deque[Fault] = deque()
    of_nodes: deque[Fault] = deque()
    for turn in count():
        with_nodes = turn % 2 == 0 or all(issubclass(KINDS[name], NodesFault) for name in kinds)
        for name in rng.sample(kinds, len(kinds)):
            fault = KINDS[name]()
            if len(faults) + len(of_nodes) == num_faults:
                return faults, deque(in_turn(of_nodes))
            if not isinstance(fault, NodesFault):
                faults.append(fault)
            elif with_nodes:
                of_nodes.append(fault)
    raise AssertionError


def in_turn(faults: Iterable[NodesFault]) -> Iterator[NodesFault]:
    """First those that take nodes away and those that add some in turn, as far as there are both."""
    takers, adders = (deque(f for f in faults if isinstance(f, NodeAdded) is adds) for adds in (False, True))
    while takers or adders:
        for kind in (takers, adders):
            if kind:
                yield kind.popleft()


def chaos(kinds: Sequence[str], num_faults: int, seed: int, site: Site, outcomes: list[Outcome]) -> None:
    """Inject them all, in runs of one worker, of two, and of one to two in turn; adds to `outcomes`."""
    rng = random.Random(seed)
    faults, of_nodes = schedule(kinds, num_faults, rng)
    settings = cycle([Setting(num_workers=1), Setting(num_workers=2), ELASTIC])
    while faults or of_nodes:
        setting = next(settings)
        if not (of_nodes if setting is ELASTIC else faults):
            continue
        run = (
            disturb_nodes(site, of_nodes, rng) if setting is ELASTIC else disturb(site, setting, faults, rng)
        )
        for outcome in run:
            outcomes.append(outcome)
            site.say(f"[{num_faults - len(faults) - len(of_nodes)}/{num_faults}] {describe(outcome)}")
        site.say(f"the run on {setting} is over")


def describe(outcome: Outcome) -> str:
    """One line, and the problems on more."""
    line = f"{outcome.kind} at step {outcome.step}"
    if outcome.survived:
        line += (
            f": went on from {outcome.resumed_step} after {outcome.recovery_s:.1f} s, "
            f"{outcome.repeated_steps} steps repeated"
        )
    if not outcome.in_time:
        line += " (struck too late for its moment)"
    more = len(outcome.problems) - MAX_PROBLEMS_SHOWN
    problems = [f"  LOST: {problem}" for problem in outcome.problems[:MAX_PROBLEMS_SHOWN]]
    return "\n".join([line, *problems, *([f"  and {more} more"] if more > 0 else [])])


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a kind."""
    head = ("fault", "injected", "in its moment", "survived", "steps repeated", "seconds to recover", "lost")
    rows = [head]
    for kind in sorted({o.kind for o in outcomes}):
        ours = [o for o in outcomes if o.kind == kind]
        rows.append(
            (
                kind,
                f"{len(ours)}",
                f"{sum(o.in_time for o in ours)}",
                f"{sum(o.survived for o in ours)}",
                _median_and_max([o.repeated_steps for o in ours if o.repeated_steps is not None], "g"),
                _median_and_max([o.recovery_s for o in ours if o.recovery_s is not None], ".1f"),
                f"{sum(bool(o.problems) for o in ours) or 'nothing'}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if i != 1 else f"|-{line}-|" for i, line in enumerate(lines))


def _median_and_max(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} / {max(values):{form}}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the moments (default 0)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--json", action="store_true", help="print every outcome as JSON, not the table")
    options = parser.parse_args(argv)
    options.kinds = options.kinds.split(",")
    unknown = sorted(set(options.kinds) - set(KINDS))
    if unknown:
        parser.error(f"no such kind: {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    interrupt_on_signals()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", file=sys.stderr, flush=True)

    root = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    outcomes: list[Outcome] = []
    interrupted = False
    try:
        chaos(options.kinds, options.faults, options.seed, Site(root, say), outcomes)
    except KeyboardInterrupt:
        interrupted = True
    finally:  # whatever ends it, what came out is told
        print(json.dumps([asdict(o) for o in outcomes], indent=2) if options.json else table(outcomes))
    lost = any(o.problems for o in outcomes)
    if lost:
        print(f"something was lost; what the runs left is in {root}", file=sys.stderr)
    else:
        shutil.rmtree(root)
    return 128 + signal.SIGINT if interrupted else int(lost)


if __name__ == "__main__":
    sys.exit(main())
