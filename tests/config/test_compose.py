"""What a user types becomes a configuration, or one line that says why not."""

import pytest

from hrm_ray.config.compose import choices, effective, train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment):
    config = train_config([f"experiment={experiment}"])
    assert config.run_name == experiment
    assert config == TrainConfig.model_validate(config.model_dump(mode="json"))


def test_command_line_wins_over_experiment_over_defaults():
    config = train_config(["experiment=sudoku_4x4", "lr=0.5", "arch.H_cycles=7", "scaling=local"])
    assert (config.lr, config.arch.H_cycles, config.arch.hidden_size) == (0.5, 7, 96)
    assert (config.scaling.mode, config.scaling.num_workers) == ("local", 1)
    assert config.beta2 == TrainConfig(data_path="").beta2


def test_published_names_are_understood():
    words = (
        "data_path=d arch=hrm_v1 arch.L_cycles=8 arch.halt_exploration_prob=0.2 arch.loss.loss_type="
        "softmax_cross_entropy epochs=20000 eval_interval=2000 global_batch_size=384 lr=7e-5 puzzle_emb_lr=7e-5 "
        "weight_decay=1.0 puzzle_emb_weight_decay=1.0 lr_warmup_steps=2000 lr_min_ratio=1 beta1=0.9 beta2=0.95"
    )
    assert train_config(words.split()).arch.L_cycles == 8


def test_paths_uris_and_names_are_taken_as_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    uri = "s3://b/p?endpoint_override=h:9000&scheme=http"
    config = train_config(["data=~/my, data", f"storage={uri}", "run_name=7", "project_name=a: {b}"])
    assert config.data_path == "/home/me/my, data"
    assert (config.storage, config.run_name, config.project_name) == (uri, "7", "a: {b}")
    assert train_config(["data=d", "storage=~/x"]).storage == "/home/me/x"


LEARN = ["data=d", "halting=q_learning"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=quickstrat"], "unknown experiment 'quickstrat'; did you mean 'quickstart'?"),
        (["arch=hrm_v2"], "unknown arch 'hrm_v2'; did you mean 'hrm_v1'?"),
        (["data=d", "learning_rate=1"], "unknown key 'learning_rate'"),
        (["data=d", "arch.hiden_size=64"], "unknown key 'arch.hiden_size'; did you mean 'arch.hidden_size'?"),
        (["data=d", "lr=-1"], "configuration: lr=-1: input should be greater than 0"),
        (["data=d", "lr=fast"], "configuration: lr='fast': give a number above 0"),
        (["data=d", "arch.hidden_size=100"], "arch.hidden_size=100 is not a multiple of arch.num_heads=8"),
        (["data=d", "arch.hidden_size=72"], "heads of odd width 9"),
        (["data=d", "arch.noise=-1"], "arch.noise=-1: input should be greater than or equal to 0"),
        (["data=d", "paths.train=0"], "paths.train=0: input should be greater than 0"),
        (["data=d", "paths.train=4"], "are all alike without random starts; add arch.init_std=1"),
        (
            ["data=d", "arch=transformer", "paths.train=4"],
            "paths.train=4: the paths of a puzzle are all alike with arch=transformer, which has no random",
        ),
        (["data=d", "arch.damping=0"], "arch.damping=0: input should be greater than 0"),
        (["data=d", "arch.damping=1.5"], "arch.damping=1.5: input should be less than or equal to 1"),
        (
            ["data=d", "arch=transformer", "arch.init_std=1"],
            "arch.init_std has no effect with arch=transformer; it is of arch=hrm_v1 and arch=trm",
        ),
        (["data=d", "scaling.num_workers=769"], "global_batch_size=768 is too few puzzles for 769 workers"),
        (["data=d", "scaling.num_workers=[3,1]"], "MIN above MAX; try [1,3]"),
        (["data=d", "scaling=local", "scaling.num_workers=2"], "scaling=local runs one worker"),
        (["data=d", "run_name=a/b"], "run_name=a/b must be a plain folder name"),
        (["data=d", "run_name=.."], "run_name=.. must be a plain folder name"),
        (["data=d", "run_name="], "run_name= is empty"),
        (["data=d", "arch.name=gru"], "arch.name=gru is unknown"),
        (["data=d", "arch=trm", "arch.pos_encodings=sin"], "arch.pos_encodings='sin'"),
        (["data=d", "halting=dqn"], "unknown halting 'dqn'"),
        (["data=d", "arch=trm", "arch.name=gru"], "arch.name=gru is unknown"),
        (["data=d", "arch=trm", "arch.name=null"], "arch.name=None is unknown"),
        (["data=d", "arch.name=[1]"], "arch.name=[1] is unknown"),
        (["data=d", "arch=trm", "arch.puzzle_emb_len=2", "arch.puzzle_emb_ndim=1025"], "does not fit"),
        ([*LEARN, "q_temperature=inf"], "halting.q_temperature"),
        ([*LEARN, "dqn_warmup_steps=9", "dqn_warmup_ratio=0.1"], "set the same duration"),
        (["data=d", "lr_warmup_steps=9", "lr_warmup_ratio=0.1"], "give only lr_warmup_ratio"),
        (
            ["data=d", "expansion_penalty=0.2"],
            "has no effect with halting=act; it is of halting=q_learning",
        ),
        ([*LEARN, "expansion_anneal_ratio=1.5"], "halting.expansion_anneal_ratio=1.5"),
        ([*LEARN, "dqn_warmup_ratio=-0.1"], "halting.dqn_warmup_ratio=-0.1"),
        (["data=d", "lr_warmup_ratio=2"], "lr_warmup_ratio=2"),
        ([*LEARN, "expansion_penalty=0.001", "expansion_penalty_end=0.1"], "annealed down to"),
        ([*LEARN, "q_temperature=0.01"], "halting.q_temperature=0.01 is annealed down to"),
        (["data=d", "halting.q_temprature=1"], "did you mean 'halting.q_temperature'?"),
        (["data=d", "supervision_steps=0"], "supervision_steps=0"),
        (["data=d", "epochs"], "'epochs' is not of the form key=value"),
        (["data=d", "eval_interval=9", "eval_interval_steps=9"], "give only eval_interval_steps"),
        (["lr=1e-3"], "data_path is not given; add data=DIR"),
    ],
)
def test_mistakes_are_one_line(words, said):
    with pytest.raises(UserError) as error:
        train_config(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "key", "with_effect"),
    [
        ("experiment=grokking_quick eval_interval=2", "eval_interval", "eval_spacing=null"),
        ("data=d ema_rate=0.9", "ema_rate", "ema=true"),
        ("data=d weight_decay_anneal_ratio=0.5", "weight_decay_anneal_ratio", "weight_decay_end=0"),
        ("data=d max_rollbacks=3", "max_rollbacks", "on_nonfinite=rollback"),
        ("data=d gop_interval=3", "gop_interval", "gop_eigenvalues=2"),
        ("data=d supervised=last", "supervised", "supervision_steps=2"),
        ("experiment=quickstart puzzle_emb_lr=1", "puzzle_emb_lr", "arch.puzzle_emb_ndim=8"),
        ("experiment=quickstart arch=transformer puzzle_emb_lr=1", "puzzle_emb_lr", "arch.puzzle_emb_ndim=8"),
        ("data=d halting=fixed arch.no_ACT_continue=true", "arch.no_ACT_continue", "halting=act"),
        ("data=d arch=trm_mlp arch.pos_encodings=rope", "arch.pos_encodings", "arch.mlp_t=false"),
    ],
)
def test_a_key_without_effect_is_refused_of_people_only(words, key, with_effect):
    with pytest.raises(UserError, match=f"^{key} has no effect"):
        train_config(words.split(), by_hand=True)
    train_config(words.split())  # as a point of a sweep may be
    kept = effective(words.split())
    assert [word.partition("=")[0] for word in words.split() if word not in kept] == [key]
    train_config(kept, by_hand=True)
    train_config([*words.split(), with_effect], by_hand=True)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_no_experiment_is_refused(experiment):
    train_config([f"experiment={experiment}", "data=d"], by_hand=True)


def test_a_duration_takes_the_place_of_the_other_of_an_experiment():
    assert train_config(["experiment=quickstart"]).eval_interval_steps == 500
    config = train_config(["experiment=quickstart", "eval_interval=2"])
    assert (config.eval_interval, config.eval_interval_steps) == (2, None)


def test_another_architecture_takes_of_the_experiment_what_it_understands():
    trm = train_config(["experiment=sudoku_4x4", "arch=trm", "arch.L_cycles=3"]).arch
    assert (trm.name, trm.hidden_size, trm.halt_max_steps, trm.L_layers) == ("trm", 96, 8, 2)
    assert (trm.H_cycles, trm.L_cycles, trm.pos_encodings) == (3, 3, "learned")
    mlp = train_config(["experiment=sudoku_4x4", "arch=trm_mlp"]).arch
    assert (mlp.name, mlp.mlp_t, mlp.pos_encodings) == ("trm", True, "none")
    transformer = train_config(["experiment=sudoku_4x4", "arch=transformer", "arch.num_layers=4"]).arch
    assert (transformer.halt_max_steps, transformer.num_layers, transformer.hidden_size) == (1, 4, 96)
    flat = train_config(["experiment=sudoku_extreme_wta", "arch=transformer", "curriculum.depth=[]"])
    assert flat.paths.train == 1
    assert train_config(["experiment=quickstart", "arch=transformer"]).curriculum.depth == ()
    assert train_config(["experiment=quickstart", "arch=trm"]).curriculum.depth


def test_published_trm_is_understood():
    words = (
        "data=d arch=trm arch.mlp_t=True arch.pos_encodings=none arch.L_layers=2 arch.H_cycles=3 arch.L_cycles=6 "
        "arch.puzzle_emb_len=16 arch.no_ACT_continue=True ema=True"
    )
    arch = train_config(words.split()).arch
    assert (arch.num_puzzle_tokens, arch.num_tokens(81)) == (16, 97)
    assert train_config(["data=d", "arch=trm", "arch.puzzle_emb_ndim=0"]).arch.num_puzzle_tokens == 0


def test_halting_keys_may_stand_alone():
    config = train_config(["data=d", "halting=q_learning", "expansion_penalty=0.2", "dqn_warmup_steps=7"])
    assert (config.halting.expansion_penalty, config.halting.dqn_warmup_steps) == (0.2, 7)
