"""Size, precision and gradients of the model."""

import copy
from types import SimpleNamespace

import pytest
import torch

from hrm_ray import machine
from hrm_ray.config.arch import arch_class
from hrm_ray.halting.act import ACTHalting
from hrm_ray.halting.base import Control
from hrm_ray.halting.q_learning import QLearningConfig, QLearningHalting
from hrm_ray.models.act import ACT, Batch, Step
from hrm_ray.models.hrm_v1 import HRM, HRMConfig
from hrm_ray.models.layers import Linear, swiglu_width, trunc_normal_
from hrm_ray.models.losses import act_loss
from hrm_ray.models.noise import Noise, key_of
from hrm_ray.models.recursive import Prediction
from hrm_ray.models.registry import build_model
from hrm_ray.models.rotary import apply_rope, rope_tables

SMALL = HRMConfig(hidden_size=32, num_heads=2, H_layers=1, L_layers=1, puzzle_emb_ndim=32, halt_max_steps=4)


def model(dtype=torch.float32, attention="sdpa", config=SMALL) -> ACT:
    torch.manual_seed(0)
    inner = HRM(config, vocab_size=6, seq_len=16, num_puzzle_identifiers=3, dtype=dtype, attention=attention)
    return ACT(inner, config.halt_max_steps, ACTHalting(config))


UNTIL_THE_END = Control(draws=torch.full((8,), 4))


def batch(size=8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 6, (size, 16), generator=generator)
    return Batch(tokens.int(), tokens, torch.zeros(size, dtype=torch.int32))


def test_published_sudoku_model_has_its_published_size():
    inner = HRM(HRMConfig(), vocab_size=11, seq_len=81, num_puzzle_identifiers=1)
    assert sum(p.numel() for p in inner.parameters()) == 27_275_266


def test_swiglu_width_is_rounded_up_to_256():
    assert [swiglu_width(d, 4) for d in (32, 96, 128, 512)] == [256, 256, 512, 1536]


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-5), (torch.bfloat16, 2**-8)])
def test_positions_rotate_pairs_half_a_head_apart(head_dim, dtype, error):
    """As complex numbers: times e ** (i * position * theta ** (-2 * pair / K)), the gradients back by as much; rounded
    once, by half of the last of bfloat16's 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 2, 3, 50, head_dim, dtype=torch.float64, generator=generator).to(dtype)
    angles = torch.arange(50)[:, None] * 10_000.0 ** (-2 * torch.arange(head_dim // 2) / head_dim)
    unit = torch.polar(torch.ones_like(angles), angles)
    x.requires_grad_()
    y = apply_rope(x, *rope_tables(50, head_dim))
    y.backward(gradient)
    for ours, turned, by in ((y, x, unit), (x.grad, gradient, unit.conj())):
        rotated = torch.complex(*turned.detach().double().chunk(2, dim=-1)) * by
        expected = torch.cat((rotated.real, rotated.imag), dim=-1)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.detach().double(), expected, rtol=error, atol=1e-5)


def test_truncated_normal_has_the_wished_deviation_and_no_tail():
    sample = trunc_normal_(torch.empty(200_000), std=0.5)
    assert sample.std() == pytest.approx(0.5, rel=0.01)
    assert sample.abs().max() <= 2 * 0.5 / 0.8796 + 1e-3


def run(act: ACT, steps=3):
    carry, losses = act.initial_carry(batch()), []
    for _ in range(steps):
        step = act(carry, batch(), UNTIL_THE_END)
        loss, _, _ = act_loss(step, "stablemax_cross_entropy")
        losses.append(loss)
        carry = step.carry
    return losses, step


def test_bfloat16_computes_near_float32_and_keeps_float32_masters():
    expected_losses, _ = run(model())
    act = model(torch.bfloat16)
    losses, step = run(act)
    losses[-1].backward()
    assert step.carry.state.z_H.dtype == torch.bfloat16
    assert step.prediction.logits.dtype == torch.float32
    for parameter in act.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    for loss, expected in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_gradient_is_that_of_the_last_updates_alone():
    """One step by hand with everything but the last L and H update as constants."""
    act = model()
    inner, data = act.inner, batch()
    losses, _ = run(act, steps=1)
    losses[0].backward()
    got = {n: p.grad.clone() for n, p in inner.named_parameters()}
    act.zero_grad()
    inner.puzzle_emb.take_gradients()

    state = inner.initial_state(8)
    e = inner.embed(data.inputs, data.puzzle_identifiers)
    rope = (inner.rope_cos, inner.rope_sin)
    with torch.no_grad():
        z_H, z_L = state
        z_L = inner.L_level(inner.L_level(z_L, z_H + e, rope), z_H + e, rope)
        z_H = inner.H_level(z_H, z_L, rope)
        z_L = inner.L_level(z_L, z_H + e, rope)
    z_L = inner.L_level(z_L, z_H + e, rope)
    z_H = inner.H_level(z_H, z_L, rope)
    logits = inner.lm_head(z_H[:, 1:])
    q = inner.q_head(z_H[:, 0])
    with torch.no_grad():
        step = act(act.initial_carry(data), data, UNTIL_THE_END)

    by_hand = Step(step.carry, Prediction(logits, q[:, 0], q[:, 1]), step.target_q_continue)
    act_loss(by_hand, "stablemax_cross_entropy")[0].backward()
    for name, parameter in inner.named_parameters():
        torch.testing.assert_close(parameter.grad, got[name], rtol=1e-4, atol=1e-6, msg=name)


def test_halted_slots_take_the_new_puzzle_and_others_keep_theirs():
    act = model()
    old, new = batch(), Batch(batch().inputs.flip(0), batch().labels.flip(0), batch().puzzle_identifiers + 1)
    carry = act(act.initial_carry(old), old, UNTIL_THE_END).carry
    halted = torch.tensor([True, False] * 4)
    carry = type(carry)(carry.state, carry.steps, halted, carry.batch)
    after = act(carry, new, UNTIL_THE_END).carry
    assert torch.equal(after.steps, torch.where(halted, 1, 2).int())
    assert torch.equal(after.batch.inputs, torch.where(halted[:, None], new.inputs, old.inputs))
    assert torch.equal(after.batch.puzzle_identifiers, halted.int())


def test_while_q_learning_warms_up_the_q_loss_moves_the_q_head_alone():
    """The recursion's gradient is that of the cells' loss alone; afterwards it is not."""

    def gradients(weight_of_cells: float, warming_up: bool) -> dict[str, torch.Tensor]:
        act = model()
        act.halting = QLearningHalting(QLearningConfig())
        with torch.no_grad():
            act.inner.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        control = Control(torch.full((8,), 0.5), torch.tensor([0.1, 1.0, 0.2]), warming_up)
        step = act(act.initial_carry(batch()), batch(), control)
        q_loss = (step.prediction.q_halt - 1).square().sum() + step.prediction.q_continue.square().sum()
        (q_loss + weight_of_cells * step.prediction.logits.square().sum()).backward()
        return {n: p.grad for n, p in act.inner.named_parameters() if p.grad is not None}

    both, q_only = gradients(1.0, True), gradients(0.0, True)
    assert {name for name, gradient in q_only.items() if gradient.any()} == {"q_head.weight", "q_head.bias"}
    assert both["q_head.weight"].any() and both["H_level.layers.0.mlp.down_proj.weight"].any()
    assert gradients(0.0, False)["H_level.layers.0.mlp.down_proj.weight"].any()


def test_a_bias_is_computed_in_bfloat16_too():
    layer = Linear(4, 4, bias=True)
    layer.cast(torch.bfloat16)
    out = layer(torch.ones(2, 4, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("no_ACT_continue", [False, True])
def test_weights_are_cast_once_an_act_step(monkeypatch, no_ACT_continue):
    """Also where the target of q_continue takes a second pass."""
    casts = []
    cast = Linear.cast
    monkeypatch.setattr(Linear, "cast", lambda layer, dtype: (casts.append(layer), cast(layer, dtype)))
    act = model(torch.bfloat16)
    act.halting = ACTHalting(SMALL.model_copy(update={"no_ACT_continue": no_ACT_continue}))
    run(act, steps=3)
    layers = [layer for layer in act.modules() if isinstance(layer, Linear)]
    assert len(casts) == 3 * len(layers)


def changed_by_data(inner):
    for parameter in inner.parameters():
        parameter.data.mul_(1.5)


def changed_by_memory(inner):
    for parameter in inner.parameters():
        array = parameter.detach().numpy()
        array *= 1.5


def changed_by_fused_optimizer(inner):
    for parameter in inner.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(inner.parameters(), lr=0.1, fused=True).step()


def changed_by_load(inner):
    inner.load_state_dict({name: 1.5 * tensor for name, tensor in inner.state_dict().items()})


@pytest.mark.parametrize(
    "change", [changed_by_data, changed_by_memory, changed_by_fused_optimizer, changed_by_load]
)
def test_no_pass_uses_old_weights(change):
    """However they were written: also in ways of which torch keeps no count."""
    act, data = model(torch.bfloat16).eval(), batch()

    def logits(act):
        with torch.no_grad():
            return act(act.initial_carry(data), data).prediction.logits

    before = logits(act)
    change(act.inner)
    fresh = copy.deepcopy(act)  # has no copies
    assert not torch.equal(logits(act), before)
    assert torch.equal(logits(act), logits(fresh))


def test_frozen_weights_that_are_thawed_learn_again():
    act, data = model(torch.bfloat16), batch()
    act.inner.L_level.requires_grad_(False)
    act(act.initial_carry(data), data, UNTIL_THE_END)
    act.inner.L_level.requires_grad_(True)
    act(act.initial_carry(data), data, UNTIL_THE_END).prediction.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in act.inner.L_level.parameters())


def test_inference_mode_leaves_a_model_that_can_be_trained():
    act, data = model(torch.bfloat16), batch()
    with torch.inference_mode():
        act(act.initial_carry(data), data)
    act(act.initial_carry(data), data, UNTIL_THE_END).prediction.logits.sum().backward()


def built(name, **keys) -> ACT:
    torch.manual_seed(0)
    config = arch_class(name)(hidden_size=32, num_heads=2, puzzle_emb_ndim=0, **keys)
    data = SimpleNamespace(vocab_size=6, seq_len=16, num_puzzle_identifiers=3)
    return build_model(config, data, machine.resolve(device="cpu", forward_dtype="float32"))


@pytest.mark.parametrize("name", ["hrm_v1", "trm"])
def test_a_depth_is_that_of_a_model_made_with_it(name):
    """And evaluation takes the full one again."""
    full, shallow = built(name, H_cycles=3, L_cycles=2), built(name, H_cycles=1, L_cycles=2)
    control = Control(torch.full((8,), 4))
    same = full(full.initial_carry(batch()), batch(), control._replace(depth=(1, 2)))
    other = shallow(shallow.initial_carry(batch()), batch(), control)
    assert torch.equal(same.prediction.logits, other.prediction.logits)
    evaluated = full(full.initial_carry(batch()), batch())
    assert not torch.equal(evaluated.prediction.logits, same.prediction.logits)


KEYS = key_of(5, torch.arange(8))


def recursion(inner, z_H, z_L, e, damping, noise):
    """The updates of an ACT step as they are written, each with its noise."""
    slow = getattr(inner, "H_level", inner.L_level)
    rope = (inner.rope_cos, inner.rope_sin)
    noise = iter(noise)

    def update(module, z, injection):
        return (1 - damping) * z + damping * module(z, injection, rope) + next(noise)

    for _ in range(3):
        for _ in range(2):
            z_L = update(inner.L_level, z_L, z_H + e)
        z_H = update(slow, z_H, z_L)
    return z_H, z_L


@pytest.mark.parametrize("name", ["hrm_v1", "trm"])
def test_updates_are_damped_and_in_training_noisy(name):
    """From random starts in slots that begin; in use from the model's own, and without noise."""
    act, data = built(name, H_cycles=3, L_cycles=2, init_std=0.5, noise=0.2, damping=0.7), batch()
    inner = act.inner
    with torch.no_grad():
        e = inner.embed(data.inputs, data.puzzle_identifiers)
        halted = torch.arange(8) % 2 == 0
        carry = act.initial_carry(data)
        carry = carry._replace(
            halted=halted, state=type(carry.state)(*torch.randn(2, *carry.state.z_H.shape).unbind())
        )
        control = Control(torch.full((8,), 4), keys=KEYS)
        step = act(carry, data, control)
        # The start is drawn by the key and 0, the noise of the updates by the key and 1, 2, ...
        start = Noise(0.5, torch.float32, KEYS.device).draw(key_of(KEYS, 0), 2 * e[0].numel())
        z_H, z_L = start.view(8, 2, *e.shape[1:]).unbind(1)
        z_H, z_L = (
            torch.where(halted[:, None, None], z, old) for z, old in zip((z_H, z_L), carry.state, strict=True)
        )
        draw = Noise(0.2, torch.float32, KEYS.device).draw
        noise = [draw(key_of(KEYS, update), e[0].numel()).view_as(e) for update in range(1, 10)]
        in_use = act(act.initial_carry(data), data)
        by_hand = recursion(inner, z_H, z_L, e, 0.7, noise)
        quiet = recursion(inner, *inner.initial_state(8), e, 0.7, [0] * 9)
    for got, expected in ((step, by_hand), (in_use, quiet)):
        for state, z in zip(got.carry.state, expected, strict=True):
            torch.testing.assert_close(state, z, rtol=1e-4, atol=1e-4)


def test_a_slot_draws_by_its_own_key_alone():
    """In whatever batch, so on whatever worker; and nothing is drawn where there is nothing to draw."""
    act, data = built("trm", H_cycles=1, L_cycles=1, init_std=1.0, noise=0.5), batch()
    control, rows = Control(torch.full((8,), 4), keys=KEYS), slice(2, 5)
    with torch.no_grad():
        whole = act(act.initial_carry(data), data, control).carry
        part = act(act.initial_carry(data).rows(rows), data.rows(rows), control.rows(rows)).carry
        torch.testing.assert_close(part.state.z_L, whole.state.z_L[rows], rtol=1e-4, atol=1e-4)
        other = act(act.initial_carry(data), data, control._replace(keys=KEYS + 1)).carry
        assert ((other.state.z_L - whole.state.z_L).abs().amax((1, 2)) > 1e-2).all()
        plain = built("trm", H_cycles=1, L_cycles=1)
        quiet, keyed = (plain(plain.initial_carry(data), data, c) for c in (UNTIL_THE_END, control))
        assert torch.equal(quiet.prediction.logits, keyed.prediction.logits)


@pytest.mark.parametrize("name", ["hrm_v1", "trm"])
def test_the_gradient_goes_through_what_damping_leaves(name):
    """An update counts in it by as much as it is taken."""
    gradients = []
    for damping in (1.0, 1e-3):
        act = built(name, damping=damping)
        act(act.initial_carry(batch()), batch(), UNTIL_THE_END).prediction.logits.sum().backward()
        gradients.append(float(act.inner.L_level.layers[0].mlp.down_proj.weight.grad.norm()))
    assert 0 < gradients[1] < 0.05 * gradients[0]
