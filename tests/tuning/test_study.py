"""The study is the only state of a sweep: what a new driver finds, and what it refuses."""

import warnings
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from hrm_ray.errors import UserError
from hrm_ray.storage.storage import Storage
from hrm_ray.tuning import samplers
from hrm_ray.tuning.config import sweep_config
from hrm_ray.tuning.runs import at_full_length
from hrm_ray.tuning.study import LOG, SweepStudy, forget_stop, is_driven, mend, rehearse, want

SPACE = {
    "lr": {"log": [1e-4, 1e-1]},
    "halting": ["act", "q_learning"],
    "dqn_warmup_ratio": {"uniform": [0, 1], "when": {"halting": "q_learning"}},
}


def config_of(**values):
    return sweep_config({"train": "experiment=sudoku_4x4", "space": SPACE, "num_trials": 12, **values})


def opened(folder: Path, **values) -> SweepStudy:
    return SweepStudy(Storage(folder), config_of(**values), first_step=10, last_step=270)


def value(point) -> float:
    return -abs(point.get("lr", 0) - 3e-3) + 0.1 * point.get("dqn_warmup_ratio", 0)


def drive(study: SweepStudy, stop_after: int = 1000, *, prune_every: int = 4) -> list[dict]:
    """Run trials one after another; every fourth is pruned. Returns the points."""
    points = []
    while len(points) < stop_after and (following := study.next_trial()) is not None:
        number, point = following
        points.append(point)
        study.report(number, 10, value(point))
        if number % prune_every == prune_every - 1:
            study.prune(number, "pruned at step 10")
        else:
            study.complete(number, [value(point)])
    return points


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes", "nsga2", "qmc"])
def test_the_sampler_proposes_after_every_restart_what_it_would_have_proposed(tmp_path, sampler):
    space = (
        {"lr": SPACE["lr"], "beta1": {"uniform": [0, 0.9]}} if sampler in ("gp", "cmaes", "qmc") else SPACE
    )
    undisturbed = drive(opened(tmp_path / "a", sampler=sampler, space=space))
    restarted = []
    for _ in range(12):
        restarted += drive(opened(tmp_path / "b", sampler=sampler, space=space), stop_after=1)
    assert restarted == undisturbed and len(undisturbed) == 12
    assert len({point["lr"] for point in undisturbed}) == 12
    other = drive(opened(tmp_path / "c", sampler={"name": sampler, "seed": 1}, space=space))
    assert other != undisturbed or sampler == "qmc"


def test_a_trial_that_was_running_is_handed_out_first_with_its_own_point(tmp_path):
    first = opened(tmp_path)
    points = [first.next_trial() for _ in range(3)]
    first.complete(1, [0.5])
    second = opened(tmp_path)
    assert [second.next_trial(), second.next_trial()] == [points[0], points[2]]
    assert second.next_trial()[0] == 3


def test_a_kill_while_a_point_is_being_drawn_changes_nothing(tmp_path):
    whole = drive(opened(tmp_path / "a"))
    study = opened(tmp_path / "b")
    points = drive(study, 5)
    study.study.sampler = study._sampler(5)
    study.study.ask()  # and killed before any value was drawn
    assert points + drive(opened(tmp_path / "b")) == whole


def test_a_report_that_comes_again_is_ignored_without_a_warning(tmp_path):
    study = opened(tmp_path)
    number, _ = study.next_trial()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.report(number, 10, 0.25)
        study.report(number, 10, 0.75)
    assert study.trials()[number].intermediate_values == {10: 0.25}


def test_states_and_reasons_are_optunas(tmp_path):
    study = opened(tmp_path)
    for end in (
        lambda n: study.complete(n, [1.0]),
        lambda n: study.prune(n, "pruned at step 10"),
        lambda n: study.fail(n, "the loss is not finite"),
    ):
        end(study.next_trial()[0])
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / LOG))
    )  # as Optuna's own tools open it
    trials = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [t.user_attrs.get("reason") for t in trials] == [
        None,
        "pruned at step 10",
        "the loss is not finite",
    ]


def test_a_loss_can_be_watched_while_accuracy_is_what_counts(tmp_path):
    """The pruner then takes the lower value for the better."""
    pruner = {"name": "median", "metric": "train/lm_loss", "n_startup_trials": 2}
    study = opened(tmp_path, pruner=pruner)
    for loss in (1.0, 2.0, 3.0):
        number, _ = study.next_trial()
        study.report(number, 10, loss)
        study.complete(number, [0.0])
    for loss, pruned in ((5.0, True), (0.5, False)):
        number, _ = study.next_trial()
        study.report(number, 10, loss)
        assert study.should_prune(number) is pruned
        assert study.seen(study.trials()[number]) == {10: loss}


def test_points_to_try_first_come_once(tmp_path):
    for _ in range(2):
        study = opened(tmp_path, try_first=[{"lr": 3e-3}, {"halting": "act"}])
    points = drive(study)
    assert points[0]["lr"] == 3e-3 and points[1]["halting"] == "act"
    assert len(points) == 12 and [p["lr"] for p in points].count(3e-3) == 1


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    whole = drive(opened(tmp_path / "a", num_trials=12))
    assert drive(opened(tmp_path / "b", num_trials=5)) == whole[:5]
    assert drive(opened(tmp_path / "b", num_trials=12)) == whole[5:]
    assert drive(opened(tmp_path / "b", num_trials=12)) == []


def test_a_grid_visits_every_point_once_across_restarts(tmp_path):
    space = {"seed": [0, 1, 2], "epochs": {"int": [1, 5], "step": 2}}
    config = {"space": space, "sampler": "grid", "num_trials": None, "pruner": None}
    points = []
    while found := drive(opened(tmp_path, **config), stop_after=2, prune_every=99):
        points += found
    assert sorted((p["seed"], p["epochs"]) for p in points) == [(s, e) for s in range(3) for e in (1, 3, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"space": {**SPACE, "lr": {"log": [1e-4, 1]}}},
            r"space\.lr = .*0\.1.*, not .*1\.0.*; give the same value to continue it, or --new-name",
        ),
        ({"space": {"lr": SPACE["lr"]}}, r"space\.dqn_warmup_ratio = .*, not nothing"),
        ({"train": "experiment=sudoku_6x6"}, "train = experiment=sudoku_4x4, not experiment=sudoku_6x6"),
        ({"metric": "train/loss", "pruner": None}, "metric = .*exact.*, not .*loss"),
    ],
)
def test_a_study_of_another_sweep_is_refused_and_left_alone(tmp_path, change, message):
    drive(opened(tmp_path), 2)
    before = (tmp_path / LOG).read_bytes()
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **change)
    assert (tmp_path / LOG).read_bytes() == before


def test_a_torn_last_line_is_cut_off_and_damage_elsewhere_is_said(tmp_path):
    drive(opened(tmp_path), 2)
    log = tmp_path / LOG
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"op_code":5,"wor')
    mend(Storage(tmp_path))
    assert log.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], b'{"op_code": 4, \n', *lines[3:]]))
    with pytest.raises(UserError, match=r"study\.log is damaged in line 4; restore it"):
        opened(tmp_path)


def test_wishes_of_other_processes_reach_the_driver_and_outlast_it(tmp_path):
    folder = Storage(tmp_path)
    study = opened(tmp_path)
    want(folder, study.config, stop=[3])
    want(folder, study.config, stop=[4], settings={"num_trials": 7})
    assert study.wanted() == {"stop": [3, 4], "settings": {"num_trials": 7}}
    forget_stop(folder, study.config)
    again = opened(tmp_path)
    assert again.num_trials == 7 and again.wanted()["stop"] is None
    assert opened(tmp_path, num_trials=9).num_trials == 9  # the command says otherwise now
    assert not is_driven(folder)
    lock = folder.lock()
    assert is_driven(folder)
    lock.close()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean 'tpe'"),
        ({"sampler": {"name": ["tpe"]}}, r"unknown sampler '\['tpe'\]'"),
        (
            {"sampler": {"name": "tpe", "n_startup": 1}},
            "unknown option 'n_startup'; did you mean 'n_startup_trials'",
        ),
        ({"sampler": "grid"}, "sampler: grid needs keys with choice:, int: or step: only"),
        ({"sampler": {"name": "tpe", "seed": -1}}, "seed=-1 is no whole number"),
        ({"pruner": "halving"}, "unknown pruner 'halving'; known: hyperband, median"),
        ({"pruner": {"name": "median", "warmup": 3}}, "pruner: median: unknown option 'warmup'"),
        ({"pruner": {"name": "successive_halving", "reduction_factor": 1}}, "pruner: successive_halving: "),
        (
            {"pruner": {"name": "hyperband", "reduction_factor": 1}},
            "reduction_factor=1 is no whole number from 2 to",
        ),
        ({"pruner": {"name": "hyperband", "min_resource": 0}}, "min_resource=0 is no whole number from 1 to"),
        ({"pruner": {"name": "hyperband", "min_resource": 10**6}}, "min_resource=1000000 is no whole number"),
    ],
)
def test_unknown_samplers_pruners_and_options(tmp_path, named, message):
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **named)
    assert not (tmp_path / LOG).exists()


def test_full_length_leaves_out_what_shortens_trials():
    words = ["experiment=grokking_quick", "max_steps=50", "lr=1e-3", "num_eval_examples=9"]
    full = at_full_length(words)
    assert full == ["experiment=grokking_quick", "lr=1e-3", "stop_at=null"]  # which is the experiment's


def test_every_sampler_and_pruner_can_be_made():
    grid = {"seed": [0, 1]}
    for name in samplers.SAMPLERS:
        samplers.sampler({"name": name}, 3, grid=grid, is_conditional=False)
    for name in samplers.PRUNERS:
        more = {"lower": 0.1} if name == "threshold" else {}
        samplers.pruner({"name": name, **more}, first_step=10, last_step=270)


@pytest.mark.parametrize(
    ("last_step", "steps"), [(270, [10, 30, 90, 270]), (269, [10, 30, 90, 269]), (5, [5])]
)
def test_rungs_are_those_at_which_optuna_prunes(tmp_path, last_step, steps):
    found = samplers.rungs({"name": "successive_halving"}, first_step=10, last_step=last_step)
    assert [step for step, _ in found] == steps
    study = SweepStudy(Storage(tmp_path), config_of(num_trials=99), first_step=10, last_step=last_step)
    best, _ = study.next_trial()
    for step in range(1, last_step + 1):
        study.report(best, step, 1.0)
        study.should_prune(best)
    study.complete(best, [1.0])
    # Worse trials end at the rungs where one of them can be: at each there are three to choose from.
    ends = set()
    for n in range(40):
        number, _ = study.next_trial()
        for step in range(1, last_step + 1):
            study.report(number, step, 0.5 - n / 100)
            if study.should_prune(number):
                ends.add(step)
                study.prune(number, "")
                break
        else:
            study.complete(number, [0.0])
    assert ends <= set(steps[:-1]) and (len(steps) == 1 or steps[0] in ends)


@pytest.mark.parametrize("last_step", [270, 750, 10])
def test_hyperband_shares_its_trials_as_optuna_does(last_step):
    """Every trial that stands at a rung of its bracket leaves a third; the share that trains on is what is told."""
    named = {"name": "hyperband"}
    found = samplers.rungs(named, first_step=10, last_step=last_step)
    pruner = samplers.pruner(named, first_step=10, last_step=last_step)
    study = optuna.create_study(pruner=pruner)
    study.ask().report(0.0, 10)
    pruner.prune(study, study.get_trials()[0])  # it makes its brackets
    brackets = [pruner._get_bracket_id(study, trial) for trial in trials_of(study, 6000)]
    rungs = [10 * 3**k for k in range(9) if 10 * 3**k < last_step]
    assert [step for step, _ in found] == [*rungs, last_step]
    for number, (_, share) in enumerate(found):
        left = [3.0 ** -max(0, number - bracket) for bracket in brackets]
        assert share == pytest.approx(sum(left) / len(left), abs=0.02)


def trials_of(study: optuna.Study, count: int) -> list[optuna.trial.FrozenTrial]:
    trial = study.get_trials()[0]
    made = []
    for number in range(count):
        made.append(optuna.trial.create_trial(value=0.0))
        made[-1].number, made[-1]._trial_id = number, trial._trial_id
    return made


@pytest.mark.parametrize(
    ("bounds", "bad", "good"),
    [({"upper": 2.0}, 3.0, 1.0), ({"lower": 0.5}, 0.1, 1.0), ({"upper": 2.0}, 2.1, -5.0)],
)
def test_a_threshold_is_of_the_metric_as_it_is_written(tmp_path, bounds, bad, good):
    """The study maximizes accuracy and holds the watched loss with its sign turned."""
    study = opened(tmp_path, pruner={"name": "threshold", "metric": "train/lm_loss", **bounds})
    number, _ = study.next_trial()
    study.report(number, 10, good)
    assert not study.should_prune(number)
    study.report(number, 20, bad)
    assert study.should_prune(number)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "cmaes", "metric": ["eval/accuracy", "eval/steps"], "pruner": None}, "sampler: cmaes: "),
        ({"try_first": [{"lr": 5}]}, "try_first: lr=5 is outside of"),
        ({"sampler": {"name": "tpe", "n_ei_candidates": "many"}}, "sampler: tpe: "),
    ],
)
def test_what_a_sampler_cannot_do_is_said_before_anything_is_written(values, message):
    with pytest.raises(UserError, match=message):
        rehearse(config_of(**values))


def test_an_end_that_was_decided_before_a_kill_holds(tmp_path):
    study = opened(tmp_path)
    for reason in ("pruned at step 10", "the loss is not finite"):
        study.note(study.next_trial()[0], "reason", reason)  # and killed before Optuna was told
    again = opened(tmp_path)
    assert again.next_trial()[0] == 2
    assert [t.state for t in again.trials()] == [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]


def test_fewer_trials_end_with_those_at_work(tmp_path):
    study = opened(tmp_path, try_first=[{"lr": 1e-3}, {"lr": 2e-3}, {"lr": 3e-3}])
    numbers = [study.next_trial()[0] for _ in range(2)]
    again = opened(tmp_path, num_trials=1)
    assert not again.is_over
    assert [again.next_trial()[0] for _ in numbers] == numbers and again.next_trial() is None
    for number in numbers:
        again.complete(number, [0.5])
    assert again.is_over


def test_a_database_in_place_of_the_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///study.db"
    whole = drive(opened(tmp_path / "a"))
    points = drive(opened(tmp_path / "b", study=url), 5)
    monkeypatch.chdir("/")  # the address is that of before
    assert config_of(study=f"sqlite:///{tmp_path}/study.db").study == f"sqlite:///{tmp_path}/study.db"
    assert points + drive(opened(tmp_path / "b", study=f"sqlite:///{tmp_path}/study.db")) == whole
    with pytest.raises(UserError, match=r"its study sweep is of .*/b; choose another run_name="):
        opened(tmp_path / "c", study=f"sqlite:///{tmp_path}/study.db")
