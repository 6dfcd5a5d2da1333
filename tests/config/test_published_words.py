"""The commands of the published READMEs, after `pretrain.py`, are commands of this project."""

import shlex

import pytest

from hrm_ray.config.arch import arch_class
from hrm_ray.config.compose import train_config
from hrm_ray.config.published_words import ABSENT
from hrm_ray.errors import UserError

RATES = "puzzle_emb_lr=1e-4 weight_decay=1.0 puzzle_emb_weight_decay=1.0"
TRM = f'arch=trm data_paths="[d]" evaluators="[]" epochs=50000 eval_interval=5000 lr=1e-4 {RATES} arch.L_layers=2'


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("data_path=d", {"global_batch_size": 768, "epochs": 100_000, "eval_interval": 10_000, "lr": 1e-4}),
        (
            f"data_path=d epochs=20000 eval_interval=2000 lr=1e-4 {RATES}",
            {"global_batch_size": 768, "epochs": 20_000, "weight_decay": 1.0, "lr_warmup_steps": 2000},
        ),
        (
            "data_path=d epochs=100 eval_interval=10 lr_min_ratio=0.1 global_batch_size=2304 lr=3e-4 arch.L_cycles=8 "
            "arch.loss.loss_type=softmax_cross_entropy arch.halt_max_steps=8 arch.pos_encodings=learned",
            {"global_batch_size": 2304, "arch.L_cycles": 8, "arch.loss.loss_type": "softmax_cross_entropy"},
        ),
        (
            f"{TRM} arch.mlp_t=True arch.pos_encodings=none arch.H_cycles=3 arch.L_cycles=6 +run_name=mlp ema=True",
            {"data_path": "d", "run_name": "mlp", "arch.mlp_t": True, "ema": True, "global_batch_size": 768},
        ),
        (
            f"{TRM} global_batch_size=128 arch.H_cycles=3 arch.L_cycles=4 +run_name=att ema=True",
            {"global_batch_size": 128, "arch.name": "trm", "arch.mlp_t": False, "epochs": 50_000},
        ),
        ("data_path=d arch=hrm", {"arch.name": "hrm_v1"}),
        ("data_path=d arch=trm ++arch.halt_max_steps=8", {"arch.halt_max_steps": 8}),
        ("data_path=d arch.forward_dtype=float32", {"forward_dtype": "float32"}),
        ("data_path=d arch.hidden_size=256", {"arch.puzzle_emb_ndim": 256}),
        (
            "data_path=d arch.puzzle_emb_ndim='${.hidden_size}' arch.hidden_size=64",
            {"arch.puzzle_emb_ndim": 64},
        ),
        ("data_path=d arch.puzzle_emb_ndim='${.hidden_size}'", {"arch.puzzle_emb_ndim": 512}),
        ("data_path=d wandb=disabled run_name=null", {"wandb": "off", "run_name": "train"}),
        ("data_paths=d", {"data_path": "d"}),
        ("data_paths=['my data']", {"data_path": "my data"}),
    ],
)
def test_published_commands_compose(command, expected):
    config = train_config(shlex.split(command), by_hand=True)
    for key, value in expected.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


# Every key of the published configuration files, with its value there.
CONFIG = {
    **{"data_path": "d", "global_batch_size": 768, "epochs": 100000, "eval_interval": 10000},
    **{"checkpoint_every_eval": True, "lr": 1e-4, "lr_min_ratio": 1.0, "lr_warmup_steps": 2000, "beta1": 0.9},
    **{"beta2": 0.95, "weight_decay": 0.1, "puzzle_emb_weight_decay": 0.1, "puzzle_emb_lr": 1e-2, "seed": 0},
    **{"min_eval_interval": 0, "ema": False, "ema_rate": 0.999, "freeze_weights": False, "evaluators": "[]"},
    **{"data_paths_test": "[]", "eval_save_outputs": "[]", "project_name": "null", "run_name": "null"},
    **{"load_checkpoint": "null", "checkpoint_path": "null", "hydra.output_subdir": "null"},
}
ARCH = {
    **{"loss.name": "losses@ACTLossHead", "loss.loss_type": "stablemax_cross_entropy", "halt_max_steps": 16},
    **{"halt_exploration_prob": 0.1, "L_cycles": 2, "hidden_size": 512, "num_heads": 8, "expansion": 4},
    **{
        "puzzle_emb_ndim": "${.hidden_size}",
        "pos_encodings": "rope",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}
OF_HRM = {
    "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    "H_cycles": 2,
    "H_layers": 4,
    "L_layers": 4,
}
OF_TRM = {"name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1", "forward_dtype": "bfloat16"}
OF_TRM |= {"H_layers": 0, "L_layers": 2, "mlp_t": False, "puzzle_emb_len": 16, "no_ACT_continue": True}
OF_TRM |= {"H_cycles": 3, "L_cycles": 6}


@pytest.mark.parametrize(("name", "own"), [("hrm_v1", OF_HRM), ("trm", OF_TRM)])
def test_every_published_key_is_understood_and_its_value_is_our_default(name, own):
    arch = {f"arch.{key}": value for key, value in (ARCH | own).items()}
    config = train_config([f"{key}={value}" for key, value in (CONFIG | arch).items()])
    assert config.arch == arch_class(name).model_validate({"name": name})
    same = train_config(
        ["data_path=d", f"arch={name}", *(["forward_dtype=bfloat16"] if name == "trm" else [])]
    )
    assert config == same.model_copy(update={"project_name": config.project_name})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "data_paths=[a,b]",
            "a run has one data set; build or import the puzzles as one, and give data_path=DIR",
        ),
        ("data_paths=[]", "a run has one data set"),
        ("checkpoint_path=checkpoints/x", "give storage=checkpoints run_name=x"),
        (
            "load_checkpoint=checkpoints/x/step_9",
            "hrm-ray import-checkpoint checkpoints/x/step_9 out=runs/NAME/checkpoints",
        ),
        ("evaluators=[{name: arc@ARC}]", "evaluators=[{name: arc@ARC}]: every evaluation measures accuracy"),
        ("evaluators=[{name:arc@ARC}]", "every evaluation measures accuracy"),
        ("checkpoint_every_eval=False", "keep_last=N says how many stay"),
        ("eval_save_outputs=[logits]", "save_outputs=[NAME,...] out=FILE.npz"),
        ("min_eval_interval=10", "eval_interval"),
        ("freeze_weights=True", "all weights are trained"),
        ("data_paths_test=[x]", "hrm-ray eval RUN data=DIR"),
        ("arch.loss.name=losses@Other", "arch.loss.loss_type=NAME"),
        (
            "arch.H_layers=2",
            "arch.H_layers=2: trm has one module for both states, of arch.L_layers; leave it out",
        ),
        ("arch=transformers_baseline", "did you mean 'transformer'?"),
        ("hydra.run.dir=x", "storage=DIR says where runs lie"),
        ("+checkpoint_path=a/b", "give storage=a run_name=b"),
    ],
)
def test_what_is_not_done_here_is_answered_with_our_word(word, said):
    with pytest.raises(UserError) as error:
        train_config(["data=d", "arch=trm", word])
    assert said in str(error.value)


def test_every_absent_key_says_what_to_give_or_to_leave_it_out():
    for key in ABSENT.keys() - {"arch.H_layers"}:
        with pytest.raises(UserError, match=r"leave it out|give |=NAME"):
            train_config(["data=d", f"{key}=something"])
    with pytest.raises(UserError, match=r"arch\.H_layers=0: input should be greater than 0"):
        train_config(["data=d", "arch=hrm_v1", "arch.H_layers=0"])
