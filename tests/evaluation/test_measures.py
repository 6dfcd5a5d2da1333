"""What evaluations tell beside the scores of answers: of training puzzles, norms, eigenvalues, and conclusions."""

import json

import numpy as np
import pytest
import torch

from hrm_ray.batch import make_batch
from hrm_ray.config.inference import AS_TRAINED
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import OutOfMemory
from hrm_ray.evaluation import scores
from hrm_ray.evaluation.evaluate import evaluate
from hrm_ray.evaluation.norms import norms
from hrm_ray.evaluation.outer_product import eigenvalues, sample
from hrm_ray.evaluation.scores import Score
from hrm_ray.evaluation.scores.modular import Loss
from hrm_ray.grokking.history import FILE
from hrm_ray.grokking.read import read_run
from hrm_ray.machine import Setup
from hrm_ray.models.act import ACT, IGNORE
from hrm_ray.models.registry import build_model
from hrm_ray.training import launch
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.state import dataset_info
from hrm_ray.world import World
from tests.toy import TRM, toy_config, toy_dataset

CPU = Setup(torch.device("cpu"), torch.float32, "sdpa", "reference")


@pytest.fixture
def dataset(tmp_path):
    return toy_dataset(tmp_path / "data", num_train=32)


@pytest.fixture
def model(dataset, tmp_path) -> ACT:
    arch = {**TRM, "hidden_size": 8, "L_cycles": 1, "H_cycles": 1, "puzzle_emb_ndim": 0}
    config = TrainConfig(**toy_config(dataset.path, tmp_path, arch=arch))
    torch.manual_seed(0)
    return build_model(config.arch, dataset_info(dataset), CPU, config.halting)


def batch_of(dataset, ids):
    return make_batch(dataset.split("train"), np.asarray(ids), dataset.manifest.ignore_label_id)


def test_eigenvalues_are_those_of_the_whole_matrix(model, dataset):
    batch = batch_of(dataset, range(12))
    rows = []
    for i in range(12):
        one = batch.rows(slice(i, i + 1))
        model.zero_grad()
        logits = model(model.initial_carry(one), one).prediction.logits.double()
        likelihoods = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))  # stablemax
        likelihoods = likelihoods / likelihoods.sum(-1, keepdim=True)
        is_labelled = one.labels != IGNORE
        right = likelihoods.gather(-1, one.labels.clamp(min=0)[..., None])[..., 0]
        (-right.log()[is_labelled]).mean().backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.inner.parameters()]
        rows.append(torch.cat([g.flatten() for g in gradient]).double())
    G = torch.stack(rows)
    dense = torch.linalg.eigvalsh(G.T @ G / 12).flip(0)
    found = eigenvalues(model, batch, 5)
    assert list(found) == [*(f"eigenvalue_{i}" for i in range(1, 6)), "trace"]
    assert [*found.values()][:5] == pytest.approx(dense[:5].tolist(), rel=1e-4)
    assert found["trace"] == pytest.approx(dense.sum().item(), rel=1e-4)
    assert len(eigenvalues(model, batch.rows(slice(0, 2)), 5)) == 3  # two examples have two


def test_gradients_that_do_not_fit_are_one_line_that_helps(model, dataset, monkeypatch):
    told = []
    eigenvalues(model, batch_of(dataset, range(3)), 1, on_gradient=lambda: told.append(1))
    assert len(told) == 3  # so that a watchdog sees that it goes on

    def full(*_args, **_keys):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(OutOfMemory, match="the gradients of 12 puzzles; gop_examples=6 takes half of them"):
        eigenvalues(model, batch_of(dataset, range(12)), 1)


def test_the_sample_is_that_of_the_seed():
    first = sample(100, 10, seed=3)
    assert (first == sample(100, 10, seed=3)).all() and (first != sample(100, 10, seed=4)).any()
    assert len(set(first.tolist())) == 10 and (np.diff(first) > 0).all()
    assert sample(4, 10, seed=0).tolist() == [0, 1, 2, 3]


def test_norms_by_part(model):
    found = norms(model)
    assert set(found) == {"embedding", "blocks", "output", "q_head"}
    assert found["output"] == pytest.approx(model.inner.lm_head.weight.norm().item(), rel=1e-5)
    every = torch.cat([p.detach().flatten() for p in model.inner.parameters()])
    assert sum(value**2 for value in found.values()) == pytest.approx(every.square().sum().item(), rel=1e-5)


def test_the_loss_is_the_mean_over_labelled_cells(model, dataset, monkeypatch):
    monkeypatch.setattr(scores, "_all", lambda: [("tokens", Loss)])
    _, arrays = evaluate(model, dataset, batch_size=8, world=World(), save_outputs=["logits", "labels"])
    logits, labels = (torch.from_numpy(arrays[name]) for name in ("logits", "labels"))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    metrics, _ = evaluate(model, dataset, batch_size=5, world=World())  # without asking for logits
    assert metrics == {"loss": pytest.approx(expected.item(), rel=1e-6)}
    assert Loss(dataset, AS_TRAINED, CPU.device).metrics([]) == {"loss": 0.0}


def test_a_run_tells_all_of_it_and_concludes(dataset, tmp_path, monkeypatch):
    every = [*scores._all(), ("tokens", Loss)]
    monkeypatch.setattr(scores, "_all", lambda: every)
    more = {"eval_train": True, "log_norms": True, "gop_eigenvalues": 2, "gop_examples": 3, "gop_interval": 2}
    values = toy_config(dataset.path, tmp_path / "runs", epochs=5, eval_interval_steps=4, **more)
    plain, _ = launch.train(TrainConfig(**values), show_progress=False)
    run = tmp_path / "runs/toy"
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reports = [report for report in reports if "eval/loss" in report]
    assert [report["global_step"] for report in reports] == [4, 8, 12, 16, 20]
    names = {"accuracy", "exact_accuracy", "loss"}
    assert {name for name in reports[0] if name.startswith("eval_train/")} == {
        f"eval_train/{n}" for n in names
    }
    assert {"norm/embedding", "norm/blocks", "norm/output"} <= reports[0].keys()
    assert ["gop/eigenvalue_2" in report for report in reports] == [False, True, False, True, True]
    assert reports[1]["gop/eigenvalue_1"] >= reports[1]["gop/eigenvalue_2"] > 0
    (text,) = plain["conclusions"]
    assert text.startswith("did not learn: by step 20 training reached")
    history = json.loads((run / FILE).read_text())
    assert history["step"] == [4, 8, 12, 16, 20] and history["grokking_summary"]["verdict"] == text
    assert history["train_loss"] == [report["eval_train/loss"] for report in reports]
    assert read_run(str(run)).history.render({}) == read_run(str(run / FILE)).history.render({})
    assert read_run(str(run)).source.num_train == 32
    # The same weights as without any of it.
    other = {key: value for key, value in values.items() if key not in more} | {"run_name": "plain"}
    launch.train(TrainConfig(**other), show_progress=False)
    files = [
        sorted((tmp_path / "runs" / name / "checkpoints").glob("*20/model.safetensors"))
        for name in ("toy", "plain")
    ]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_a_history_that_somebody_has_changed_is_kept(dataset, tmp_path, monkeypatch):
    every = [*scores._all(), ("tokens", Loss)]
    monkeypatch.setattr(scores, "_all", lambda: every)
    config = TrainConfig(**toy_config(dataset.path, tmp_path / "runs", max_steps=4))
    run = launch.run_folder(config)
    run.write("config.yaml", b"{}\n")
    run.write(FILE, b"my notes")
    TrainingLoop(config, run, World(), launch.Hooks()).train()
    assert run.read(f"{FILE}.before-1") == b"my notes" and json.loads(run.read(FILE))["epoch"]


def test_of_other_tasks_nothing_is_concluded(dataset, tmp_path):
    config = TrainConfig(**toy_config(dataset.path, tmp_path / "runs", max_steps=2))
    summary, _ = launch.train(config, show_progress=False)
    assert summary["conclusions"] == [] and not (tmp_path / "runs/toy" / FILE).exists()
    assert set(scores.scores_of("tokens")) == set(scores.scores_of("sudoku"))
    assert Score.concludes(config, dataset, []) is None
