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
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.compare import Reference, checksums, end_problems, litter, read_records
from tests.faults.faults import KINDS, Fault, Outcome, inject
from tests.faults.runs import (
    Run,
    Setting,
    interrupt_on_sigterm,
    is_finished,
    make_dataset,
    step_of,
)
from tests.faults.sessions import Lost

MAX_PROBLEMS_SHOWN = 5
Say = Callable[[str], None]


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
            f"undisturbed run on {setting.num_workers} worker(s): {reference.last_step} steps, "
            f"{len(reference.files)} checkpoints, {time.monotonic() - started:.0f} s"
        )
        return reference


def disturb(site: Site, setting: Setting, faults: deque[Fault], rng: random.Random) -> Iterator[Outcome]:
    """One run, with as many of `faults` (taken from the left) as fit in; it is compared at its end."""
    reference = site.reference(setting)
    struck: list[Outcome] = []
    with site.run(setting) as run:
        try:
            run.start()
            run.wait_for(lambda: run.last_step() > 0, "the first step")
            while faults and not run.ends_soon:
                struck.append(inject(faults.popleft(), run, reference, rng))
                yield struck[-1]
                if not struck[-1].survived or struck[-1].problems:
                    return
            problems = _finish(run, reference)
        except Lost as lost:
            problems = [str(lost)]
        if problems:
            yield Outcome("at-the-end", run.last_step(), problems=problems)
        for name in litter(run.folder):
            site.say(f"left behind in {run.folder}: {name}")
    if not problems:
        shutil.rmtree(run.folder.parent.parent)


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


def _finish(run: Run, reference: Reference) -> list[str]:
    code = run.wait_for_exit(timeout_s=600)
    if code:
        return [f"the command ended with {code}\n{run.last_words()}"]
    return end_problems(run.folder, reference)


def schedule(kinds: Sequence[str], num_faults: int, rng: random.Random) -> deque[Fault]:
    """As many of each kind as of every other, in random order."""
    names: list[str] = []
    while len(names) < num_faults:
        names += rng.sample(kinds, len(kinds))
    return deque(KINDS[name]() for name in names[:num_faults])


def chaos(kinds: Sequence[str], num_faults: int, seed: int, site: Site) -> list[Outcome]:
    """All outcomes; runs of one and of two workers in turn."""
    rng = random.Random(seed)
    faults = schedule(kinds, num_faults, rng)
    outcomes: list[Outcome] = []
    turn = 0
    while faults:
        setting = Setting(num_workers=1 + turn % 2)
        turn += 1
        for outcome in disturb(site, setting, faults, rng):
            outcomes.append(outcome)
            site.say(f"[{num_faults - len(faults)}/{num_faults}] {describe(outcome)}")
        site.say(f"run {turn} on {setting.num_workers} worker(s) is over")
    return outcomes


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
    interrupt_on_sigterm()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", file=sys.stderr, flush=True)

    root = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    outcomes = chaos(options.kinds, options.faults, options.seed, Site(root, say))
    lost = any(o.problems for o in outcomes)
    print(json.dumps([asdict(o) for o in outcomes], indent=2) if options.json else table(outcomes))
    if lost:
        print(f"something was lost; what the runs left is in {root}", file=sys.stderr)
    else:
        shutil.rmtree(root)
    return int(lost)


if __name__ == "__main__":
    sys.exit(main())
