"""Who decides when a slot halts, and how that is learned."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.halting.act import ACTHalting
from hrm_ray.halting.base import Control, Halting
from hrm_ray.halting.q_learning import (
    QLearner,
    QLearningConfig,
    QLearningHalting,
    Recall,
    draw_ages,
    shares_of_ages,
)
from hrm_ray.models.hrm_v1 import HRMConfig
from hrm_ray.models.layers import Linear
from hrm_ray.models.recursive import Prediction

B, D, AGE = 3, 4, 6


def prediction(q_halt, q_continue) -> Prediction:
    return Prediction(torch.empty(0), torch.tensor(q_halt), torch.tensor(q_continue))


def control(**values) -> Control:
    return Control(**{"draws": torch.zeros(2, dtype=torch.int32), **values})


def published(no_ACT_continue: bool) -> ACTHalting:
    return ACTHalting(HRMConfig(no_ACT_continue=no_ACT_continue))


def replayed(head, learner, step, uniform, penalty):
    """The loss of the learner at ACT step `step`."""
    recall = Recall(torch.tensor(step), uniform)
    return learner.loss(head, recall, Control(annealed=torch.tensor([penalty, 1.0, 0.0])))


STEPS = torch.tensor([1, 3])


def test_fixed_never_halts_in_training_and_by_its_sign_in_use():
    says = prediction([9.0, -9.0], [0.0, 0.0])
    assert Halting().chooses(says, STEPS, control()).tolist() == [False, False]
    assert Halting().is_done(says).tolist() == [True, False]


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=2))
def test_a_threshold_is_a_probability(threshold, values):
    """Of q_halt by itself, or of q_halt against q_continue; 0.5 is what halting goes by if nothing is said."""
    says = prediction(values[:1], values[1:])
    alone, against = values[0], values[0] - values[1]
    for halting, logit in (
        (Halting(), alone),
        (published(True), alone),
        (published(False), against),
        (QLearningHalting(QLearningConfig()), against),
    ):
        probability = 1 / (1 + math.exp(-logit))
        assert halting.is_done(says).item() == halting.is_done(says, 0.5).item() == (logit > 0)
        if abs(probability - threshold) > 1e-5:
            assert halting.is_done(says, threshold).item() == (probability > threshold)


def test_published_halts_greedily_but_not_before_the_drawn_minimum():
    says = prediction([1.0, 1.0], [0.5, 2.0])
    assert published(False).chooses(says, STEPS, control()).tolist() == [True, False]
    assert published(True).chooses(says, STEPS, control()).tolist() == [True, True]
    late = control(draws=torch.tensor([2, 2]))
    assert published(True).chooses(says, STEPS, late).tolist() == [False, True]


@pytest.mark.parametrize(
    ("temperature", "epsilon", "share"),
    [(1e-3, 0.0, 1.0), (1e6, 0.0, 0.5), (0.5, 0.0, 0.6457), (1e-3, 0.4, 0.8)],
)
def test_drawn_halts_as_often_as_its_probability_says(temperature, epsilon, share):
    many = 20_000
    uniform = torch.rand(many, generator=torch.Generator().manual_seed(0))
    says = prediction([0.8472979] * many, [-0.405465] * many)  # 0.7 and 0.4 as probabilities
    c = Control(uniform, torch.tensor([0.0, temperature, epsilon]))
    halts = QLearningHalting(QLearningConfig()).chooses(says, torch.ones(many), c)
    assert halts.float().mean() == pytest.approx(share, abs=0.01)
    assert (
        not QLearningHalting(QLearningConfig())
        .chooses(says, torch.ones(many), c._replace(is_warming_up=True))
        .any()
    )


def make_learner(**values) -> tuple[Linear, QLearner]:
    torch.manual_seed(1)
    head = Linear(D, 2, bias=True)
    return head, QLearner(head, B, QLearningConfig(replay_max_age=AGE, **values))


def test_replay_loss_is_that_of_the_equations():
    """Against a plain loop over a history that is longer than the memory and has halts, ends and padding in it."""
    head, learner = make_learner()
    learner.target = type(learner.target)(torch.randn(2, D), torch.randn(2))
    rng = np.random.default_rng(0)
    history = {}
    for step in range(1, 15):
        moment = {
            "states": rng.normal(size=(B, D)).astype(np.float32),
            "exact": rng.random(B) < 0.5,
            "halted": rng.random(B) < 0.3,
            "is_last": rng.random(B) < 0.2,
            "is_puzzle": rng.random(B) < 0.9,
        }
        history[step] = moment
        flags = {k: torch.from_numpy(v) for k, v in moment.items() if k != "states"}
        learner.remember(step, torch.from_numpy(moment["states"]), **flags)

    uniform = torch.rand(B, 8, generator=torch.Generator().manual_seed(2))
    got = replayed(head, learner, 15, uniform, 0.05)
    ages = draw_ages(uniform, shares_of_ages(AGE, learner.config.replay_half_life))
    assert ages.min() >= 1 and ages.max() <= AGE - 1

    expected = torch.zeros(())
    for slot in range(B):
        for age in ages[slot].tolist():
            now = history[15 - age]
            if not now["is_puzzle"][slot]:
                continue
            q = head(torch.from_numpy(now["states"][slot]))
            exact = torch.tensor(float(now["exact"][slot]))
            expected = expected + F.binary_cross_entropy_with_logits(q[0], exact) / 8
            then = history.get(15 - age + 1)
            if then is None or now["halted"][slot] or not then["is_puzzle"][slot]:
                continue
            weight, bias = learner.target
            following = torch.sigmoid(weight @ torch.from_numpy(then["states"][slot]) + bias)
            best = following[0] if then["is_last"][slot] else following.max()
            wanted = (best - 0.05).clamp(0, 1)
            expected = expected + F.binary_cross_entropy_with_logits(q[1], wanted) / 8
    torch.testing.assert_close(got, expected)
    got.backward()
    assert head.weight.grad.abs().sum() > 0


def test_recent_memories_are_drawn_more_often():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    counts = draw_ages(uniform, shares_of_ages(5, half_life=1)).bincount(minlength=5).double() / len(uniform)
    torch.testing.assert_close(counts, torch.tensor([0, 8, 4, 2, 1]).double() / 15, atol=5e-3, rtol=0)


def test_nothing_is_remembered_at_first_and_what_is_too_old_is_forgotten():
    head, learner = make_learner()
    uniform = torch.rand(B, 50)
    assert replayed(head, learner, 1, uniform, 0.1) == 0
    flags = {"halted": torch.zeros(B).bool(), "is_last": torch.zeros(B).bool()}
    states = torch.randn(B, D)
    learner.remember(1, states, exact=torch.ones(B).bool(), is_puzzle=torch.ones(B).bool(), **flags)
    assert replayed(head, learner, 2, uniform, 0.1) > 0
    assert replayed(head, learner, 1 + AGE, uniform, 0.1) == 0


def test_target_follows():
    head, learner = make_learner(target_rate=0.25)
    before = head.weight.detach().clone()
    with torch.no_grad():
        head.weight += 1
    learner.follow(head)
    torch.testing.assert_close(learner.target.weight, before + 0.25)


def test_learns_the_values_of_a_known_episode():
    """Answers become right at the third step of at most four: halting there is worth 1, each step before costs 0.1."""
    head, learner = make_learner(target_rate=0.2)
    states = torch.eye(D)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for step in range(1, 1500):
        phase = (step - 1) % 4
        flags = {
            "exact": torch.full((B,), phase >= 2),
            "halted": torch.full((B,), phase == 3),
            "is_last": torch.full((B,), phase == 3),
            "is_puzzle": torch.ones(B).bool(),
        }
        loss = replayed(head, learner, step, torch.rand(B, 8), 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.follow(head)
        learner.remember(step, states[phase].expand(B, D), **flags)
    halt, go_on = head(states).sigmoid().unbind(-1)
    np.testing.assert_allclose(halt.detach(), [0, 0, 1, 1], atol=0.05)
    np.testing.assert_allclose(go_on.detach()[:3], [0.8, 0.9, 0.9], atol=0.05)
    assert (halt > go_on)[:3].tolist() == [False, False, True]
