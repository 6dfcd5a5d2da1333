"""The kinds of faults: when each strikes, what it does, and what the user does then."""

import json
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.compare import Reference, checkpoint_problems, checksums, key_of, record_problems
from tests.faults.runs import Run, is_finished, step_of
from tests.faults.sessions import Lost

MAX_STEPS_BEFORE = 30  # a fault strikes that many steps after the recovery from the last, at most
NODES_TIMEOUT_S = 180  # for Ray to notice what nodes there are, and to restart the workers
NOTICE_S = 10


class Fault(ABC):
    """One kind of fault.

    Attributes:
        name: as the command line and the table say it.
        exit_codes: with what the driver may end; none: it must go on.
    """

    name: str
    exit_codes: tuple[int, ...] = ()

    def wait(self, run: Run, reference: Reference | None, rng: random.Random) -> None:
        """Return at the moment to strike: somewhere in a step, unless a kind says otherwise."""
        wait_for_some_steps(run, rng)
        time.sleep(rng.uniform(0, 0.05))

    @abstractmethod
    def strike(self, run: Run, rng: random.Random) -> None:
        """Do it."""

    def struck_in_time(self, run: Run) -> bool:
        """Whether the moment that this kind is about was really met."""
        return True

    def while_down(self, run: Run, rng: random.Random) -> None:  # noqa: B027 - most kinds do nothing
        """What happens before the command is given again."""

    def problems(self, run: Run, resumed_step: int) -> list[str]:
        """What is amiss after the run has gone on from the checkpoint of `resumed_step`, besides what was lost."""
        return []


def wait_for_some_steps(run: Run, rng: random.Random) -> None:
    target = min(run.last_step() + rng.randint(1, MAX_STEPS_BEFORE), run.setting.max_steps)
    run.wait_for(lambda: run.last_step() >= target, f"step {target}")


class WorkerKilled(Fault):
    """One of the workers is gone, as when it runs out of memory."""

    name = "worker-killed-in-step"

    def wait(self, run: Run, reference: Reference | None, rng: random.Random) -> None:
        self._victim = rng.choice(run.workers())  # looked up before: that takes longer than a checkpoint
        wait_for_some_steps(run, rng)
        self.wait_for_moment(run, reference)
        time.sleep(rng.uniform(0, self.moment_s))

    moment_s = 0.05

    def wait_for_moment(self, run: Run, reference: Reference | None) -> None:
        """Return at the beginning of what lasts `moment_s`."""

    def strike(self, run: Run, rng: random.Random) -> None:
        self._victim.kill()


class WorkerKilledInEvaluation(WorkerKilled):
    """An evaluation's step has its checkpoint then, but not its record."""

    name = "worker-killed-in-evaluation"
    moment_s = 0.1

    def wait_for_moment(self, run: Run, reference: Reference | None) -> None:
        assert reference is not None
        evaluated = set(reference.evaluated_steps)

        def evaluating() -> bool:
            step, kind = key_of(run.last_record())
            return kind == "train" and step in evaluated and is_finished(run.checkpoint(step))

        run.wait_for(evaluating, "an evaluation")

    def struck_in_time(self, run: Run) -> bool:
        return key_of(run.last_record())[1] == "train"


class WorkerKilledInCheckpoint(WorkerKilled):
    """Its folder is there then, but no manifest."""

    name = "worker-killed-in-checkpoint"
    moment_s = 0.005

    def wait_for_moment(self, run: Run, reference: Reference | None) -> None:
        run.wait_for(lambda: _unfinished(run), "a checkpoint", poll_s=0.001)

    def struck_in_time(self, run: Run) -> bool:
        return _unfinished(run)


def _unfinished(run: Run) -> bool:
    return any(not is_finished(p) for p in run.checkpoints())


class WorkerKilledWhileStarting(WorkerKilled):
    """And the one that takes its place too, while it reads the checkpoint or earlier."""

    name = "worker-killed-while-starting"

    def strike(self, run: Run, rng: random.Random) -> None:
        before, num_starts = run.workers(), len(run.starts())
        self._victim.kill()
        new = run.wait_for(lambda: [p for p in run.workers() if p not in before], "a new worker")
        time.sleep(rng.uniform(0, 3))
        self._in_time = len(run.starts()) == num_starts
        new[0].kill()

    def struck_in_time(self, run: Run) -> bool:
        return self._in_time


class DriverKilled(Fault):
    """The process of the command is gone; the same command is given at once, while what it left still dies."""

    name = "driver-killed"
    exit_codes = (-signal.SIGKILL,)

    def strike(self, run: Run, rng: random.Random) -> None:
        run.signal_driver(signal.SIGKILL)


class DriverTerminated(Fault):
    """As a scheduler ends a job."""

    name = "driver-sigterm"
    exit_codes = (128 + signal.SIGTERM,)

    def strike(self, run: Run, rng: random.Random) -> None:
        run.signal_driver(signal.SIGTERM)


class DriverInterrupted(Fault):
    """Ctrl-C, which a terminal sends to the whole process group."""

    name = "driver-sigint"
    exit_codes = (128 + signal.SIGINT,)

    def strike(self, run: Run, rng: random.Random) -> None:
        run.signal_driver(signal.SIGINT, group=True)


class DriverSignalledWhileStarting(Fault):
    """Before the workers train, perhaps before Ray runs."""

    number: signal.Signals

    def strike(self, run: Run, rng: random.Random) -> None:
        run.signal_driver(signal.SIGKILL)
        run.wait_for_exit()
        num_starts = len(run.starts())
        run.start()
        time.sleep(rng.uniform(0, 12))
        self._in_time = len(run.starts()) == num_starts
        run.signal_driver(self.number)

    def struck_in_time(self, run: Run) -> bool:
        return self._in_time


class DriverKilledWhileStarting(DriverSignalledWhileStarting):
    name = "driver-killed-while-starting"
    exit_codes = (-signal.SIGKILL,)
    number = signal.SIGKILL


class DriverTerminatedWhileStarting(DriverSignalledWhileStarting):
    """Before Python listens to signals, one ends it at once; a shell shows the same exit code."""

    name = "driver-sigterm-while-starting"
    exit_codes = (128 + signal.SIGTERM, -signal.SIGTERM)
    number = signal.SIGTERM


class DriverInterruptedWhileStarting(DriverSignalledWhileStarting):
    name = "driver-sigint-while-starting"
    exit_codes = (128 + signal.SIGINT, -signal.SIGINT)
    number = signal.SIGINT


class ClusterLost(Fault):
    """Every process at once, as when the machine restarts."""

    name = "cluster-lost"
    exit_codes = (-signal.SIGKILL,)

    def strike(self, run: Run, rng: random.Random) -> None:
        run.kill_all()


class NewestCheckpointDamaged(ClusterLost):
    """The newest checkpoint is found damaged when the run goes on, which it must do from the one before."""

    def wait(self, run: Run, reference: Reference | None, rng: random.Random) -> None:
        run.wait_for(lambda: self._has_two_whole(run), "a second checkpoint")
        super().wait(run, reference, rng)

    @staticmethod
    def _has_two_whole(run: Run) -> bool:
        """Whether one was written since the last start: until then the newest may be one that was damaged before."""
        finished = run.finished_checkpoints()
        if len(finished) < 2:
            return False
        try:
            return (finished[-1] / "manifest.json").stat().st_mtime > run.starts()[-1]["time"]
        except FileNotFoundError:  # deleted meanwhile
            return False

    def while_down(self, run: Run, rng: random.Random) -> None:
        *_, self._before, self._newest = run.finished_checkpoints()
        names = sorted(checksums(self._newest))
        self.damage(self._newest, self._newest / rng.choice(names), rng)

    def problems(self, run: Run, resumed_step: int) -> list[str]:
        named = any(self._newest.name in event["message"] for event in run.events("damaged_checkpoint"))
        return [
            *([] if named else [f"events.jsonl does not tell that {self._newest.name} is damaged"]),
            *([] if resumed_step == step_of(self._before) else [f"did not go on from {self._before.name}"]),
        ]

    @abstractmethod
    def damage(self, checkpoint: Path, file: Path, rng: random.Random) -> None:
        """Damage `checkpoint`; `file` is one of those that its manifest names."""


class CheckpointBitFlipped(NewestCheckpointDamaged):
    name = "checkpoint-bit-flipped"

    def damage(self, checkpoint: Path, file: Path, rng: random.Random) -> None:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


class CheckpointTruncated(NewestCheckpointDamaged):
    name = "checkpoint-truncated"

    def damage(self, checkpoint: Path, file: Path, rng: random.Random) -> None:
        os.truncate(file, rng.randrange(file.stat().st_size))


class CheckpointFileMissing(NewestCheckpointDamaged):
    name = "checkpoint-file-missing"

    def damage(self, checkpoint: Path, file: Path, rng: random.Random) -> None:
        file.unlink()


class ManifestEdited(NewestCheckpointDamaged):
    """It is no JSON, lacks a key, names another step, or another SHA-256."""

    name = "checkpoint-manifest-edited"

    def damage(self, checkpoint: Path, file: Path, rng: random.Random) -> None:
        path = checkpoint / "manifest.json"
        text = path.read_text()
        manifest = json.loads(text)
        cut = text[: rng.randrange(len(text) - 2)]
        other_sha256 = manifest | {"files": manifest["files"] | {file.name: {"bytes": 1, "sha256": "0" * 64}}}
        less = dict(manifest)
        del less[rng.choice(["files", "global_step"])]
        other_step = manifest | {"global_step": manifest["global_step"] + 1}
        edited = rng.choice([cut, other_sha256, less, other_step])
        path.write_text(edited if isinstance(edited, str) else json.dumps(edited))


class WorkerStopped(WorkerKilled):
    """A worker hangs; if it is still there when the run has gone on without it, it wakes up and must do no harm."""

    name = "worker-stopped"

    def strike(self, run: Run, rng: random.Random) -> None:
        self._victim.suspend()

    def problems(self, run: Run, resumed_step: int) -> list[str]:
        with suppress(psutil.NoSuchProcess):
            self._victim.resume()
        return []


class NodesFault(Fault):
    """Something that befalls a node of an elastic run."""

    num_nodes: int  # beside the head, when it strikes

    def wait(self, run: Run, reference: Reference | None, rng: random.Random) -> None:
        nodes = run.nodes
        while len(nodes.others) > self.num_nodes:
            nodes.lose(rng.choice(nodes.others))
        while len(nodes.others) < self.num_nodes:
            nodes.add()
        self._wait_for_workers(run)
        super().wait(run, reference, rng)

    def _wait_for_workers(self, run: Run) -> None:
        def one_a_node() -> bool:
            start = run.starts()[-1]
            return start["num_workers"] == self.num_nodes and run.last_step() > start["global_step"]

        run.wait_for(one_a_node, f"{self.num_nodes} worker(s)", timeout_s=NODES_TIMEOUT_S)

    def problems(self, run: Run, resumed_step: int) -> list[str]:
        there, expected = run.starts()[-1]["num_workers"], len(run.nodes.others)
        return [] if there == expected else [f"went on with {there} worker(s) on {expected} node(s)"]


class NodeLost(NodesFault):
    """A machine is switched off: the run goes on with fewer workers."""

    name = "node-lost"
    num_nodes = 2

    def strike(self, run: Run, rng: random.Random) -> None:
        run.nodes.lose(rng.choice(run.nodes.others))


class NodeDrained(NodesFault):
    """A machine is taken away after a notice, because of which a checkpoint is written."""

    name = "node-drained"
    num_nodes = 2

    def wait(self, run: Run, reference: Reference | None, rng: random.Random) -> None:
        super().wait(run, reference, rng)
        before = {step_of(p) for p in run.finished_checkpoints()}
        self._victim = rng.choice(run.nodes.others)
        run.nodes.give_notice(self._victim, NOTICE_S)
        self._taken_at = time.monotonic() + NOTICE_S

        def asked_for() -> bool:
            new = {step_of(p) for p in run.finished_checkpoints()} - before
            self._saved = any(step % run.setting.checkpoint_interval for step in new)
            return self._saved or time.monotonic() > self._taken_at

        run.wait_for(asked_for, "a checkpoint")
        time.sleep(max(0, self._taken_at - time.monotonic()))

    def strike(self, run: Run, rng: random.Random) -> None:
        run.nodes.lose(self._victim)

    def problems(self, run: Run, resumed_step: int) -> list[str]:
        saved = [] if self._saved else ["no checkpoint was written because of the notice"]
        return saved + super().problems(run, resumed_step)


class NodeAdded(NodesFault):
    """There is room for one worker more: the run goes on with it, from a checkpoint written because of that."""

    name = "node-added"
    num_nodes = 1

    def strike(self, run: Run, rng: random.Random) -> None:
        run.nodes.add()


KINDS: dict[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        WorkerKilled,
        WorkerKilledInEvaluation,
        WorkerKilledInCheckpoint,
        WorkerKilledWhileStarting,
        DriverKilled,
        DriverTerminated,
        DriverInterrupted,
        DriverKilledWhileStarting,
        DriverTerminatedWhileStarting,
        DriverInterruptedWhileStarting,
        ClusterLost,
        CheckpointBitFlipped,
        CheckpointTruncated,
        CheckpointFileMissing,
        ManifestEdited,
        WorkerStopped,
        NodeLost,
        NodeDrained,
        NodeAdded,
    )
}


@dataclass
class Outcome:
    """What came of one fault.

    Attributes:
        step: the last step recorded before it.
        last_step: the last step recorded when the workers went on; later than `step` if they outlived the fault.
        resumed_step: the checkpoint from which the run went on.
        recovery_s: from the fault to the first step recorded after it.
        problems: what differs from the undisturbed run since; empty if nothing was lost.
    """

    kind: str
    step: int
    in_time: bool = True
    last_step: int | None = None
    resumed_step: int | None = None
    recovery_s: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        return self.recovery_s is not None

    @property
    def repeated_steps(self) -> int | None:
        if self.last_step is None or self.resumed_step is None:
            return None
        return self.last_step - self.resumed_step


def inject(fault: Fault, run: Run, reference: Reference | None, rng: random.Random) -> Outcome:
    """One fault: wait for its moment, strike, do what a user does, wait until the run gets on.

    Without `reference` only what shows in the run itself is a problem.
    """
    fault.wait(run, reference, rng)
    outcome = Outcome(fault.name, run.last_step())
    struck = time.monotonic()
    try:
        fault.strike(run, rng)
        num_starts = len(run.starts())
        if fault.exit_codes:
            _expect_exit(run, fault.exit_codes)
            fault.while_down(run, rng)
            run.start()
        outcome.in_time = fault.struck_in_time(run)
        outcome.last_step, outcome.resumed_step = _wait_until_it_gets_on(run, num_starts, outcome.step)
        outcome.recovery_s = time.monotonic() - struck
        outcome.problems = record_problems(run.folder, reference)
        if outcome.resumed_step:
            outcome.problems += checkpoint_problems(run.checkpoint(outcome.resumed_step), reference)
        outcome.problems += fault.problems(run, outcome.resumed_step)
    except Lost as lost:
        outcome.problems.append(str(lost))
    return outcome


def _expect_exit(run: Run, codes: Sequence[int]) -> None:
    code = run.wait_for_exit()
    if code not in codes:
        raise Lost(f"the command ended with {code}, not {codes}\n{run.last_words()}")


def _wait_until_it_gets_on(run: Run, num_starts: int, last_step: int) -> tuple[int, int]:
    """Waits for the first step recorded after another start than the first `num_starts`.

    Returns:
        the last step recorded before, `last_step` or later, and the step of the checkpoint from which the run goes on.
    """
    resumed_step = 0

    def gets_on() -> bool:
        nonlocal last_step, resumed_step
        starts = run.starts()  # read before the step: a later start has cut off the records before
        step = run.last_step()
        if len(starts) == num_starts:
            last_step = max(last_step, step)
            return False
        resumed_step = starts[-1]["global_step"]
        return step > resumed_step

    run.wait_for(gets_on, "a step after the fault", timeout_s=NODES_TIMEOUT_S)
    return last_step, resumed_step
