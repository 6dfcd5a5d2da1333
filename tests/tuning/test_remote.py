"""Sweeps on object storage: the journal of the study, and one driver at a time."""

from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.storages import JournalStorage

from hrm_ray.errors import UserError
from hrm_ray.storage import lock
from hrm_ray.storage.storage import Storage
from hrm_ray.tuning import journal
from hrm_ray.tuning.journal import ObjectJournal
from hrm_ray.tuning.status import status
from hrm_ray.tuning.study import is_driven, want
from hrm_ray.tuning.sweep import run_sweep, sweep_folder
from hrm_ray.tuning.view import View
from tests.tuning.toy_sweep import toy_sweep


def journal_at(uri: str) -> ObjectJournal:
    return ObjectJournal(Storage(uri).object_store(), uri)


@pytest.mark.parametrize("kind", [None, "lost", "twice", "error"])
def test_entries_of_many_writers_are_read_by_all_in_one_order(s3, s3_proxy, monkeypatch, kind):
    """Whether the network loses answers, repeats requests or refuses some."""
    monkeypatch.setattr(journal, "LOOK_S", 0)
    uri, writes = s3("sweep/study"), []

    def fault(method: str, path: str) -> str | None:
        writes.append(path)
        return kind if method == "PUT" and len(writes) % 7 == 0 else None

    s3_proxy.fault = fault

    def write(writer: int) -> None:
        mine = journal_at(uri)
        for number in range(8):
            mine.append_logs(
                [{"writer": writer, "number": number}, {"writer": writer, "number": number + 0.5}]
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    first, second = (list(journal_at(uri).read_logs(0)) for _ in range(2))
    assert first == second and len(first) == 4 * 8 * 2
    for writer in range(4):
        numbers = [log["number"] for log in first if log["writer"] == writer]
        assert numbers == [number / 2 for number in range(16)]
    assert list(journal_at(uri).read_logs(60)) == first[60:]


def test_two_processes_see_each_others_trials(s3, monkeypatch):
    monkeypatch.setattr(journal, "LOOK_S", 0)
    studies = [
        optuna.create_study(
            study_name="a", storage=JournalStorage(journal_at(s3("study"))), load_if_exists=True
        )
        for _ in range(2)
    ]
    for number in range(6):
        trial = studies[number % 2].ask()
        trial.suggest_float("x", 0, 1)
        studies[number % 2].tell(trial, number)
    values = [[trial.value for trial in study.trials] for study in studies]
    assert values == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_damaged_entry_is_named(s3):
    folder = Storage(s3("study"))
    folder.write("00000000.json", b'{"id": "a"')
    with pytest.raises(UserError, match=r"study.*/00000000\.json is damaged; restore it"):
        journal_at(s3("study")).read_logs(0)


@pytest.mark.ray
@pytest.mark.long
def test_a_sweep_on_object_storage(tmp_path, s3, ray_cluster, monkeypatch):
    """From beginning to end, with a second driver in the midst, a wish of another process, and more trials."""
    monkeypatch.setattr(lock, "RENEW_S", 0.5)
    config = toy_sweep(tmp_path, num_trials=3, storage=s3("sweeps"))
    folder, refused = sweep_folder(config), []

    class Second(View):
        def show(self, study, live, spent):
            if not refused and live:
                assert is_driven(folder)
                with pytest.raises(UserError, match="another process is at work on the sweep") as info:
                    run_sweep(config)
                refused.append(str(info.value))
                want(folder, config, settings={"max_concurrent": 1})

    result = run_sweep(config, view=Second())
    assert refused and result.summary["finished"] and sum(result.summary["states"].values()) == 3
    assert not is_driven(folder)
    assert {row["state"] for row in status(folder)[2]} <= {"COMPLETE", "PRUNED"}
    more = run_sweep(config.model_copy(update={"num_trials": 4}))
    assert sum(more.summary["states"].values()) == 4
    assert folder.read("best.yaml") and folder.read("trials.csv")
