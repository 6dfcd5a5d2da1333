"""A few faults of each kind on one real run; `make chaos` injects many more (see chaos.py)."""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import chaos, compare
from tests.faults.compare import Reference
from tests.faults.faults import KINDS, NodesFault, Outcome
from tests.faults.runs import Setting

ONE_FAULT = ("checkpoint-bit-flipped",)  # and the whole cluster lost
# One of each way to die; the others differ in when.
EACH_FAULT = (
    "worker-killed-in-step",
    "worker-killed-in-evaluation",
    "worker-killed-in-checkpoint",
    "driver-sigterm",
    *ONE_FAULT,
)
NUM_OF_NODES = sum(issubclass(kind, NodesFault) for kind in KINDS.values())


@pytest.fixture
def site() -> Iterator[chaos.Site]:
    root = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))  # Ray makes sockets in it: a short path
    yield chaos.Site(root)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def chaos_of_nodes() -> Iterator[subprocess.Popen]:
    """Faults of nodes in a run of their own, beside the tests: both wait most of the time."""
    words = ["--faults=2", "--kinds=node-lost,node-added", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.chaos", *words], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.terminate()  # then it ends what it started


@pytest.mark.ray
@pytest.mark.timeout(900)  # two minutes on two fast cores with nothing else to do, ten on slow ones
@pytest.mark.parametrize(
    ("kinds", "max_steps"), [(ONE_FAULT, 180), pytest.param(EACH_FAULT, 300, marks=pytest.mark.long)]
)
def test_a_run_hit_by_faults_ends_like_the_undisturbed_run(site, kinds, max_steps):
    faults = deque(KINDS[name]() for name in kinds)
    setting = Setting(num_workers=2, max_steps=max_steps)
    outcomes = list(chaos.disturb(site, setting, faults, random.Random(0)))
    print(chaos.table(outcomes))
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    assert [outcome.kind for outcome in outcomes] == list(kinds)
    # The last checkpoint and what came while the next was written, the damaged one and what came after it.
    assert all(outcome.repeated_steps <= 3 * setting.checkpoint_interval for outcome in outcomes)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_whose_nodes_come_and_go_ends_like_the_undisturbed_run(chaos_of_nodes):
    said, _ = chaos_of_nodes.communicate()
    outcomes = [Outcome(**outcome) for outcome in json.loads(said)]
    print(chaos.table(outcomes))
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    assert [outcome.kind for outcome in outcomes] == ["node-lost", "node-added"]
    assert chaos_of_nodes.returncode == 0


# What the comparison finds, on a folder written by hand.

STEPS = (1, 2, 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps, an evaluation and a checkpoint at the last."""
    records = [{"global_step": s, "train/loss": 1 / s, "time/step_s": s} for s in STEPS]
    _write_records(tmp_path, [*records, {"global_step": 3, "eval/accuracy": 0.5}])
    folder = tmp_path / "checkpoints" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    _write_manifest(folder)
    (tmp_path / "summary.json").write_text(json.dumps({"finished": True, "global_step": 3}))
    return tmp_path


def _write_records(run: Path, records: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _reference(run: Path) -> Reference:
    files = {3: compare.checksums(run / "checkpoints" / "step-00000003")}
    return Reference(dict(compare.read_records(run)), files)


def _write_manifest(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    files = {"model.safetensors": {"sha256": compare.sha256(content)}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def _repeat(run: Path) -> None:
    _write_records(run, _records(run)[:2] + _records(run)[1:])


def _leave_out(run: Path) -> None:
    _write_records(run, _records(run)[:1] + _records(run)[2:])


def _change(run: Path) -> None:
    first, *others = _records(run)
    _write_records(run, [first | {"train/loss": 0.99}, *others])


def _no_evaluation(run: Path) -> None:
    _write_records(run, _records(run)[:-1])


def _flip(run: Path) -> None:
    (run / "checkpoints/step-00000003/model.safetensors").write_bytes(b"Weights")


def _other_weights(run: Path) -> None:
    _flip(run)
    _write_manifest(run / "checkpoints/step-00000003")


def _no_file(run: Path) -> None:
    (run / "checkpoints/step-00000003/model.safetensors").unlink()


def _no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-00000003")


def _not_finished(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"finished": False, "global_step": 2}))


@pytest.mark.parametrize(
    "loss, problem",
    [
        (_repeat, "2 train records of step 2"),
        (_leave_out, "no train record of step 2"),
        (_change, "train record of step 1 differs: train/loss 0.99 for 1.0"),
        (_no_evaluation, "no eval record of step 3"),
        (_flip, "step-00000003/model.safetensors is not what its manifest says"),
        (_other_weights, "step-00000003 differs from the undisturbed run in model.safetensors"),
        (_no_file, "step-00000003 has no"),
        (_no_checkpoint, "no checkpoint at the last step, 3"),
        (_not_finished, "summary.json says finished=False at step 2"),
    ],
)
def test_the_comparison_finds(run, loss, problem):
    reference = _reference(run)
    assert compare.end_problems(run, reference) == []
    loss(run)
    assert any(p.startswith(problem) for p in compare.end_problems(run, reference))


def test_times_are_not_compared(run):
    reference = _reference(run)
    _write_records(run, [r | {"time/step_s": 9} for r in _records(run)])
    assert compare.end_problems(run, reference) == []


def test_every_kind_is_injected_as_often_as_the_others_but_those_of_nodes_half_as_often():
    faults, of_nodes = chaos.schedule(sorted(KINDS), 4 * len(KINDS) - 2 * NUM_OF_NODES, random.Random(0))
    names = [fault.name for fault in (*faults, *of_nodes)]
    assert {name: names.count(name) for name in KINDS} == {
        name: 2 if issubclass(kind, NodesFault) else 4 for name, kind in KINDS.items()
    }
    assert [fault.num_nodes for fault in list(of_nodes)[:4]] == [2, 1, 2, 1]
