"""Which lost workers count against their trial; Ray's words for each loss are as it wrote them."""

from types import SimpleNamespace

import pytest

from hrm_ray.tuning import execute
from hrm_ray.tuning.execute import Live, Watches

UNAVAILABLE = (
    "The actor 72a1 is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket closed"
)
WORKER = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR, on node 10.0.0.1"
)
NODE = "The actor died because its node has died. Node Id: 0x1"
MEMORY = "Task was killed due to the node running low on memory."


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A trial that may lose one worker, with its `Live`, the clock, and how to lose a worker and look."""
    live = Live(0, SimpleNamespace(failure=SimpleNamespace(max_failures=1)), 100, "")
    trial = SimpleNamespace(
        trial_id="t", last_result={"node": "a"}, error_file=tmp_path / "error.txt", max_failures=-1
    )
    watches = Watches(SimpleNamespace(live={"t": live}))
    clock = SimpleNamespace(now=0.0, nodes={"a", "b"})
    monkeypatch.setattr(execute.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(execute, "living_names", lambda: clock.nodes)

    def lose(words: str) -> None:
        with trial.error_file.open("a") as file:
            file.write(f"Failure # 1 (occurred at noon)\n{words}\n")
        watches.on_trial_recover(0, [trial], trial)

    return SimpleNamespace(
        live=live, trial=trial, clock=clock, lose=lose, look=lambda: watches._settle_doubts([trial])
    )


@pytest.mark.parametrize(
    ("words", "counted"), [(WORKER, 1), (NODE, 0), ("something else", 1), (UNAVAILABLE, 0)]
)
def test_what_counts_at_once(trial, words, counted):
    trial.lose(words)
    assert trial.live.num_lost == counted and trial.live.phase == "lost"


def test_a_lack_of_memory_ends_the_trial(trial):
    trial.lose(NODE)
    trial.lose(MEMORY)  # the newest of the words that Tune has noted
    assert trial.live.end["kind"] == "refused" and trial.live.num_lost == 0


def test_a_worker_whose_node_turns_out_to_be_lost_does_not_count(trial):
    trial.lose(UNAVAILABLE)
    trial.clock.now = 5
    trial.look()
    assert trial.live.doubts
    trial.clock.nodes = {"b"}
    trial.look()
    trial.clock.now = 100
    trial.look()
    assert trial.live.num_lost == 0 and not trial.live.doubts


def test_a_worker_whose_node_stays_counts_and_none_is_forgotten_for_the_next(trial):
    for now in (0, 10, 20):  # it dies again and again, sooner than a doubt is settled
        trial.clock.now = now
        trial.lose(UNAVAILABLE)
    trial.clock.now = 31
    trial.look()
    assert trial.live.num_lost == 1 and trial.live.end is None
    trial.clock.now = 41
    trial.look()
    assert trial.live.num_lost == 2 and trial.live.end["reason"] == execute.LOST
    assert trial.trial.max_failures == 0
