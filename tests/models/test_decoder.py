"""The decoder: the numbers of openai/grok (tests/golden/grok, float32), and what it leaves out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_ray.api import load
from hrm_ray.config.arch import arch_class
from hrm_ray.config.compose import train_config
from hrm_ray.config.inference import Inference
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import validated
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.data.shards import open_dataset
from hrm_ray.errors import UserError
from hrm_ray.evaluation.scores import check_best_metric
from hrm_ray.evaluation.survey import as_text
from hrm_ray.halting.base import Control
from hrm_ray.machine import resolve
from hrm_ray.models.act import ACT, IGNORE, Batch
from hrm_ray.models.inference import Thinker
from hrm_ray.models.losses import act_loss
from hrm_ray.models.registry import build_model
from hrm_ray.training import launch
from hrm_ray.training.plan import check_data
from tests.toy import DECODER, toy_config

GOLDEN = Path(__file__).parents[1] / "golden" / "grok"
VOCAB_SIZE, SEQ_LEN = 239, 6  # <eos> a op b = c


class Equations:
    """What the published model reads; all labels are in its last `cells` cells."""

    vocab_size, seq_len, num_puzzle_identifiers = VOCAB_SIZE, SEQ_LEN, 1

    def __init__(self, cells: int | None):
        self.cells = cells

    def coordinates(self) -> None:
        return None

    def answer_cells(self) -> int | None:
        return self.cells


def decoder(cells: int | None = 2, **keys: object) -> ACT:
    values = {"hidden_size": 32, "loss": {"loss_type": "softmax_cross_entropy"}, **keys}
    torch.manual_seed(0)
    setup = resolve(device="cpu", forward_dtype="float32", attention="sdpa")
    return build_model(arch_class("decoder").model_validate(values), Equations(cells), setup)


def ours(arrays: np.lib.npyio.NpzFile, prefix: str) -> dict[str, Tensor]:
    """Weights or gradients of the published model by our names."""

    def of(name: str) -> Tensor:
        return torch.from_numpy(arrays[f"{prefix}/{name}.weight"])

    found = {"embed_tokens.embedding_weight": of("embedding"), "lm_head.weight": of("linear")}
    for i in range(2):
        there, here = f"decoder.blocks.{i}", f"blocks.layers.{i}"
        q, k, v = (
            torch.cat([of(f"{there}.self_attn.attn_heads.{n}.W{name}") for n in range(4)]) for name in "qkv"
        )
        found |= {f"{here}.q_proj.weight": q, f"{here}.kv_proj.weight": torch.cat([k, v])}
        found[f"{here}.o_proj.weight"] = of(f"{there}.self_attn.Wo")
        found[f"{here}.up_proj.weight"] = of(f"{there}.ffn.ffn.0")
        found[f"{here}.down_proj.weight"] = of(f"{there}.ffn.ffn.2")
        for name, norm in {"self_attn_norm": "attn_norm", "ffn_norm": "mlp_norm"}.items():
            for part in ("weight", "bias"):
                found[f"{here}.{norm}.{part}"] = torch.from_numpy(arrays[f"{prefix}/{there}.{name}.{part}"])
    return found


def take(model: ACT, weights: dict[str, Tensor]) -> None:
    own = dict(model.inner.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def batch_of(equations: np.ndarray) -> Batch:
    """Of the published rows <eos> a op b = c <eos>: the answer and the closing token are to be said."""
    tokens = torch.from_numpy(equations.astype(np.int64))
    labels = torch.full((len(tokens), SEQ_LEN), IGNORE)
    labels[:, -2:] = tokens[:, -2:]
    return Batch(tokens[:, :-1].int(), labels, torch.zeros(len(tokens), dtype=torch.int32))


def loss_of(model: ACT, batch: Batch, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean loss, and the logits."""
    control = Control(draws=torch.zeros(len(batch.inputs), dtype=torch.int32), keys=keys)
    step = model(model.initial_carry(batch), batch, control)
    loss, _, _ = act_loss(step, "softmax_cross_entropy", has_q_head=False)
    return loss / len(batch.inputs), step.prediction.logits


@pytest.mark.parametrize("cells", [None, 2])
def test_logits_loss_and_gradients_are_those_of_the_published_model(cells):
    arrays = np.load(GOLDEN / "forward.npz")
    model = decoder(cells)
    take(model, ours(arrays, "weights"))
    loss, logits = loss_of(model, batch_of(arrays["tokens"]))
    expected = torch.from_numpy(arrays["logits"])[:, -(cells or SEQ_LEN) :]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-6)
    loss.backward()
    for name, gradient in ours(arrays, "grads").items():
        own = dict(model.inner.named_parameters())[name].grad
        assert (own - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


KINDS = {"to_zero": ("adamw", "to_zero", 1.0), "to_init": ("adamw", "to_start", 1.0)}
KINDS |= {"honest": ("adam", "l2", 0.1), "no_decay": ("adam", "l2", 0.0)}
KINDS |= {"anneal_no_warmup": ("adamw", "to_zero", 1.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_the_published_optimizer(kind):
    arrays = np.load(GOLDEN / "train20.npz")
    name, decay, weight_decay = KINDS[kind]
    model = decoder()
    take(model, ours(arrays, "weights"))
    config = TrainConfig(
        data_path="",
        optimizer={"name": name, "decay": decay},
        weight_decay=weight_decay,
        beta2=0.98,
    )
    optimizer = config.optimizer.build(dict(model.named_parameters()), config, "auto")
    ends = np.cumsum(arrays["batch_sizes"])
    for step, end in enumerate(ends):
        rows = arrays["batches"][end - arrays["batch_sizes"][step] : end]
        loss, _ = loss_of(model, batch_of(rows))
        assert loss.item() == pytest.approx(arrays[f"{kind}/loss"][step], abs=1e-5)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = float(arrays[f"{kind}/lr"][step]), weight_decay
        optimizer.step()
        optimizer.zero_grad()
    if f"{kind}/final/linear.weight" in arrays:
        own = dict(model.inner.named_parameters())
        for name, weight in ours(arrays, f"{kind}/final").items():
            torch.testing.assert_close(own[name].detach(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
@pytest.mark.parametrize("keys", [{}, {"pos_encodings": "learned", "activation": "gelu", "num_layers": 1}])
def test_outputs_that_nobody_asks_for_are_left_out_without_a_change(norm, keys):
    batch = batch_of(np.random.default_rng(0).integers(0, VOCAB_SIZE, (16, 7)))
    losses, gradients = [], []
    for cells in (None, 2):
        model = decoder(cells, norm=norm, **keys)
        loss, logits = loss_of(model, batch)
        loss.backward()
        losses.append((loss.detach(), logits[:, -2:].detach()))
        gradients.append({name: p.grad for name, p in model.inner.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
def test_a_token_changes_nothing_before_it(norm):
    model = decoder(None, norm=norm)
    equations = np.random.default_rng(0).integers(0, VOCAB_SIZE, (8, 7))
    _, before = loss_of(model, batch_of(equations))
    equations[:, 3] = (equations[:, 3] + 1) % VOCAB_SIZE
    _, after = loss_of(model, batch_of(equations))
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert ((before - after)[:, 3:].abs().amax((0, 2)) > 1e-3).all()


def test_dropout_drops_by_key_and_in_training_alone():
    batch = batch_of(np.random.default_rng(0).integers(0, VOCAB_SIZE, (64, 7)))
    model = decoder(dropout=0.25)
    keys = torch.arange(64)
    _, drawn = loss_of(model, batch, keys)
    _, same = loss_of(model, batch, keys)
    _, other = loss_of(model, batch, keys + 64)
    _, undisturbed = loss_of(model, batch)
    assert torch.equal(drawn, same) and not torch.equal(drawn, other)
    assert torch.equal(undisturbed, loss_of(decoder(), batch)[1])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    _, moved = loss_of(model, batch.rows(order), keys[order])
    torch.testing.assert_close(moved, drawn[order], rtol=0, atol=1e-5)  # whatever its place in the batch
    e_BSD = model.inner.embed(batch.inputs, batch.puzzle_identifiers)
    first, last = model.inner.dropout(keys, e_BSD)
    assert first.shape == e_BSD.shape and last.shape == (64, 2, 32)
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert first.mean().item() == pytest.approx(1.0, abs=0.02)


def test_in_use_it_is_as_sure_as_its_answer_is_likely():
    batch = batch_of(np.random.default_rng(0).integers(0, VOCAB_SIZE, (16, 7)))
    model = decoder().eval()
    answer = Thinker(model).think(batch).last
    likely = answer.logits[:, -2:].softmax(-1).amax(-1).prod(-1)
    torch.testing.assert_close(answer.q_halt.sigmoid(), likely, rtol=1e-4, atol=0)
    assert answer.tokens.shape == (16, SEQ_LEN)
    with pytest.raises(UserError, match="Q head"):
        Thinker(model, Inference(select="q")).think(batch)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ({"halt_max_steps": 32}, "32 ACT steps: arch=decoder keeps no state from step to step"),
        ({"halt": "learned"}, "halt=learned: this model has no Q head; leave it out"),
        ({"halt_threshold": 0.9}, "halt_threshold=0.9: this model has no Q head; leave it out"),
    ],
)
def test_words_without_an_effect_on_it_are_refused(use, said):
    with pytest.raises(UserError, match=said):
        Thinker(decoder(), Inference(**use))
    Thinker(decoder(), Inference(halt_max_steps=1, halt_threshold=0.5))


def test_its_table_has_the_selections_that_it_can_make(tmp_path):
    build(load_recipe("modular", {"p": 5}), tmp_path / "data", show_progress=False)
    values = toy_config(tmp_path / "data", tmp_path / "runs", arch=DECODER, max_steps=1)
    launch.train(TrainConfig(**values), show_progress=False)
    rows = load(tmp_path / "runs/toy").survey(tmp_path / "data")
    assert {name.partition("/")[0] for name in rows[0] if "/" in name} == {"vote", "valid"}
    head, row = as_text(rows).splitlines()
    assert head.endswith("any right  steps vote  steps valid  answered") and len(row.split()) == 9


def test_it_has_no_q_head_and_learns_none():
    model = decoder()
    assert model.inner.q_head is None and not any("q_head" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("key", "value"), [("halt_max_steps", 2), ("puzzle_emb_ndim", 8), ("rope_theta", 1.0), ("dropout", 1.0)]
)
def test_keys_without_an_effect_are_mistakes(key, value):
    with pytest.raises(UserError, match=key):
        validated(arch_class("decoder"), {key: value}, "test")


def test_it_takes_the_place_of_another_model_in_an_experiment():
    config = train_config(["experiment=sudoku_4x4", "arch=decoder"])
    assert (config.arch.name, config.arch.halt_max_steps) == ("decoder", 1)
    with pytest.raises(UserError, match="halting=q_learning teaches a Q head, and arch=decoder has none"):
        train_config(["experiment=grokking_quick", "halting=q_learning"])
    with pytest.raises(UserError, match=r"99 percent are stop_at=0\.99"):
        train_config(["experiment=grokking_quick", "stop_at=99"])


def test_a_model_that_sees_the_answer_is_refused(tmp_path):
    out = tmp_path / "data"
    build(load_recipe("modular", {"op": "-", "p": 11, "predict_end": True}), out, show_progress=False)
    dataset = open_dataset(out)
    check_data(train_config(["experiment=grokking_quick", f"data={out}"]), dataset)
    with pytest.raises(UserError, match="arch=transformer reads both; use arch=decoder"):
        check_data(train_config(["arch=transformer", f"data={out}"]), dataset)
    for metric in ("eval/q_halt_accuracy", "eval/learned_exact_accuracy"):
        check_best_metric(metric, dataset)
        with pytest.raises(UserError, match="best_metric="):
            check_best_metric(metric, dataset, has_q_head=False)
