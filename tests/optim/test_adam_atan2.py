"""Every backend against the equations in float64, and the two forms' first steps."""

import math
import multiprocessing
import sys
import threading
from copy import deepcopy
from functools import partial
from itertools import permutations

import pytest
import torch

from hrm_ray.errors import UserError
from hrm_ray.optim import adam_atan2, fused_cpu
from hrm_ray.optim.adam_atan2 import AdamATan2, resolve_backend
from hrm_ray.optim.fused_cpu import CHUNK

# Those that run on a CPU; for the other see test_kernels.py.
BACKENDS = ("reference", "foreach", "fused")
SHAPES = [(1,), (7,), (3, 5), (64, 33), (0, 4)]


def float64_steps(params, grads_by_step, lr, betas, weight_decay, bias_correction):
    """The equations, scalar by scalar in their plainest form."""
    beta1, beta2 = betas
    params = [p.double() for p in params]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for t, grads in enumerate(grads_by_step, start=1):
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        for i, g in enumerate(grads):
            m[i] = beta1 * m[i] + (1 - beta1) * g.double()
            v[i] = beta2 * v[i] + (1 - beta2) * g.double() ** 2
            params[i] = params[i] * (1 - lr * weight_decay)
            if bias_correction == "outside":
                params[i] = params[i] - lr / c1 * torch.atan2(m[i], v[i].sqrt() / math.sqrt(c2))
            else:
                params[i] = params[i] - lr * torch.atan2(m[i] / c1, (v[i] / c2).sqrt())
    return params


@pytest.mark.parametrize("lr", [1e-4, 3e-2])
@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
@pytest.mark.parametrize("bias_correction", ["outside", "inside"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.9), (0.9, 0.9999)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, betas, bias_correction, weight_decay, lr):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    # Tiny, huge and vanishing gradients: there is no epsilon to hide behind.
    scales = [1e-8, 1.0, 1e4, 0.0, 1.0]
    steps = [
        [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, scales, strict=True)]
        for _ in range(8)
    ]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamATan2(
        params,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        backend=backend,
    )
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = float64_steps(start, steps, lr, betas, weight_decay, bias_correction)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), e, rtol=1e-5, atol=1e-6 * max(1, lr * 100))


@pytest.mark.parametrize(("bias_correction", "moved"), [("outside", 0.997), ("inside", math.pi / 4)])
def test_first_step(bias_correction, moved):
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, -1e-12, 1e12])
    AdamATan2([p], lr=1.0, weight_decay=0, bias_correction=bias_correction).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-moved, moved, -moved]), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("first", "second"), list(permutations(BACKENDS, 2)))
def test_state_moves_between_backends(first, second):
    def train(backend, steps, state=None, start=None):
        p = torch.nn.Parameter(torch.ones(50) if start is None else start)
        optimizer = AdamATan2([p], lr=1e-2, backend=backend)
        if state:
            optimizer.load_state_dict(state)
        for step in steps:
            p.grad = torch.sin(torch.arange(50.0) * step)
            optimizer.step()
        return p.detach().clone(), optimizer.state_dict()

    whole, _ = train(second, range(6))
    half, state = train(first, range(3))
    other_half, _ = train(second, range(3, 6), state, half)
    torch.testing.assert_close(other_half, whole, rtol=1e-5, atol=1e-6)


def test_unknown_backend():
    with pytest.raises(UserError, match="known: auto, reference, foreach, fused, cuda"):
        AdamATan2([torch.nn.Parameter(torch.ones(1))], backend="cude")


def test_fused_is_for_float32_on_the_cpu():
    with pytest.raises(UserError, match="for float32 on the CPU, not bfloat16 on cpu; use auto"):
        AdamATan2([torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))], backend="fused")


def test_cuda_is_for_gpus():
    with pytest.raises(UserError, match="is for float32 and bfloat16 on GPUs, not float32 on cpu; use auto"):
        AdamATan2([torch.nn.Parameter(torch.ones(1))], backend="cuda")


def test_gradients_of_a_scaler():
    """Scaled ones are scaled back, and a step with an infinite one is none."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, scaled = (AdamATan2([p], lr=0.1) for p in params)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(3) * 64
    scaled.grad_scale, scaled.found_inf = torch.tensor(64.0), torch.tensor(1.0)
    scaled.step()
    assert torch.equal(params[1], torch.ones(3)) and scaled.state[params[1]]["step"] == 0
    scaled.found_inf = torch.tensor(0.0)
    plain.step(), scaled.step()
    assert torch.equal(*params)


def test_a_gradient_that_is_negated_only_when_it_is_read():
    """As that of the imaginary part of a conjugate is; numpy cannot have it as it is."""
    lazy, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    lazy.grad, plain.grad = torch._neg_view(torch.ones(3)), -torch.ones(3)
    for p in (lazy, plain):
        AdamATan2([p], lr=0.1, backend="fused").step()
    assert torch.equal(lazy, plain)
    assert (lazy > 1).all()


def test_not_for_complex_or_sparse():
    with pytest.raises(UserError, match=r"not torch\.complex64"):
        AdamATan2([torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match=r"that of a parameter \[4, 3\] is sparse"):
        AdamATan2(table.parameters()).step()


def a_state(shape=(5, 3), dtype=torch.float32, optimizer=AdamATan2, stride=False):
    """The state after a step."""
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    if stride:
        p = torch.nn.Parameter(torch.ones(shape[::-1], dtype=dtype).t())
    p.grad = torch.arange(float(p.numel())).view(shape).to(dtype)
    made = optimizer([p], lr=0.1)
    made.step()
    return made.state_dict()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (torch.optim.AdamW, "its groups differ in amsgrad, eps"),
        (partial(torch.optim.SGD, momentum=0.9), "its groups differ in dampening, momentum, nesterov"),
    ],
)
def test_state_of_another_optimizer(other, said):
    with pytest.raises(UserError, match=f"not a state of AdamATan2: {said}"):
        AdamATan2([torch.nn.Parameter(torch.ones(5, 3))]).load_state_dict(a_state(optimizer=other))


def test_state_that_lacks_something():
    state = a_state()
    del state["state"][0]["exp_avg"]
    with pytest.raises(UserError, match="it holds exp_avg_sq, step"):
        AdamATan2([torch.nn.Parameter(torch.ones(5, 3))]).load_state_dict(state)
    state = a_state()
    del state["param_groups"][0]["betas"]
    with pytest.raises(UserError, match="its groups differ in betas"):
        AdamATan2([torch.nn.Parameter(torch.ones(5, 3))]).load_state_dict(state)


def test_state_of_other_parameters():
    optimizer = AdamATan2([torch.nn.Parameter(torch.ones(50, 3))])
    with pytest.raises(UserError, match=r"exp_avg has the shape \[5, 3\] for \[50, 3\]"):
        optimizer.load_state_dict(a_state())
    assert not optimizer.state  # nothing half-loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_stay_float32_and_lie_as_the_parameter_does(dtype):
    p = torch.nn.Parameter(torch.ones(5, 3, dtype=dtype))
    optimizer, state = AdamATan2([p]), a_state(stride=True)
    optimizer.load_state_dict(state)
    for name in ("exp_avg", "exp_avg_sq"):
        ours = optimizer.state[p][name]
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert torch.equal(ours, state["state"][0][name])


def test_a_schedule_of_torch_goes_on():
    """Its own keys in the groups are no mark of another optimizer."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamATan2([p], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
    AdamATan2([p]).load_state_dict(optimizer.state_dict())


def test_the_published_package_and_we_read_each_other():
    """adam-atan2 0.0.3: groups of lr, betas and weight_decay; step as float32[]."""
    ours = a_state()
    (group,) = ours["param_groups"]
    assert {"lr", "betas", "weight_decay", "params"} <= group.keys()
    (state,) = ours["state"].values()
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
    published = {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": [0]}]}
    p = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = AdamATan2([p])
    optimizer.load_state_dict(published | {"state": {0: state | {"step": 7}}})
    p.grad = torch.ones(5, 3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 8


def test_a_copy_is_the_same_optimizer():
    p = torch.nn.Parameter(torch.ones(3))
    copy = deepcopy(AdamATan2([p], bias_correction="inside", backend="reference"))
    (q,) = copy.param_groups[0]["params"]
    q.grad = torch.ones(3)
    copy.step()
    original = AdamATan2([p], bias_correction="inside", backend="reference")
    p.grad = torch.ones(3)
    original.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": -1e-4}, "lr=-0.0001 has to be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay=nan has to be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) have to be from 0 to below 1"),
        ({"bias_correction": "insde"}, "bias_correction=insde: unknown; known: outside, inside"),
    ],
)
def test_numbers_out_of_range(wrong, said):
    with pytest.raises(UserError, match=said):
        AdamATan2([torch.nn.Parameter(torch.ones(1))], **wrong)


def test_a_refused_group_is_not_kept():
    optimizer = AdamATan2([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(UserError, match=r"not torch\.int64"):
        optimizer.add_param_group({"params": [torch.zeros(1, dtype=torch.int64)]})
    assert len(optimizer.param_groups) == 1


def test_where_numba_cannot_be_had(monkeypatch):
    resolve_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "hrm_ray.optim.fused_cpu", None)
    monkeypatch.delattr("hrm_ray.optim.fused_cpu", raising=False)
    with pytest.warns(UserWarning, match="runs as optimizer_backend=foreach, which is slower: "):
        assert resolve_backend("auto", torch.device("cpu")) == "foreach"
    with pytest.raises(UserError, match=r"optimizer_backend=fused: .*; use auto"):
        resolve_backend("fused", torch.device("cpu"))
    resolve_backend.cache_clear()


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, backend):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, generator=generator).to(dtype))
    start, optimizer, grads = p.detach().clone(), AdamATan2([p], lr=1e-2, backend=backend), []
    for _ in range(3):
        grads.append([torch.randn(50, generator=generator).to(dtype)])
        p.grad = grads[-1][0].clone()
        optimizer.step()
    (wanted,) = float64_steps([start], grads, 1e-2, (0.9, 0.95), 0.1, "outside")
    torch.testing.assert_close(p.detach().double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
    assert optimizer.state[p]["exp_avg"].dtype == torch.promote_types(dtype, torch.float32)


# More than two chunks, one number over and one below; a view that starts in the middle of a vector; not contiguous.
FUSED_SHAPES = [(1,), (15,), (2 * CHUNK + 1,), (CHUNK - 1,), (3, 5), (0, 4)]


def layouts(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in FUSED_SHAPES]
    return [*tensors, torch.randn(1001, generator=generator)[1:], torch.randn(33, 7, generator=generator).t()]


def trained(backend: str, num_threads: int = 1) -> list[torch.Tensor]:
    """Parameters of every layout after three steps."""
    params = [torch.nn.Parameter(t) for t in layouts(0)]
    optimizer = AdamATan2(params, lr=1e-2, backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for step in range(1, 4):
            for p, g in zip(params, layouts(step), strict=True):
                p.grad = g
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return [p.detach() for p in params]


def test_fused_on_every_layout():
    for ours, expected in zip(trained("fused"), trained("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_fused_does_not_depend_on_the_number_of_threads():
    for one, three in zip(trained("fused", 1), trained("fused", 3), strict=True):
        assert torch.equal(one, three)


def test_steep_flat_infinite_and_not_a_number():
    """Where the arctangent's argument is far from one, both sides of the diagonal, and what has no quotient."""
    g = torch.cat([torch.logspace(-30, 15, 200), -torch.logspace(-30, 15, 200), torch.zeros(1)])
    g = torch.cat([g, torch.tensor([math.inf, -math.inf, math.nan])])
    after = {}
    for backend in BACKENDS:
        p = torch.nn.Parameter(torch.zeros(len(g)))
        optimizer = AdamATan2([p], lr=1.0, weight_decay=0, backend=backend)
        optimizer.state[p] = {
            "step": torch.tensor(9.0),
            "exp_avg": torch.ones_like(p) * 1e-3,
            "exp_avg_sq": torch.ones_like(p) * 1e-10,
        }
        p.grad = g.clone()
        optimizer.step()
        after[backend] = p.detach()
    for backend in BACKENDS:
        torch.testing.assert_close(after[backend], after["reference"], rtol=3e-6, atol=1e-7, equal_nan=True)
    assert after["reference"].isnan().sum() >= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_knows_that_the_parameters_were_written(backend):
    """Or it would not notice a backward pass through weights that have moved since."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamATan2([p], backend=backend)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_began_later_count_their_own_steps():
    early, late = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamATan2([early, late], lr=1.0, weight_decay=0)
    for step in range(3):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step == 2 else None
        optimizer.step()
    alone = torch.nn.Parameter(torch.zeros(3))
    alone.grad = torch.ones(3)
    AdamATan2([alone], lr=1.0, weight_decay=0).step()
    assert torch.equal(late, alone)
    assert optimizer.state[early]["step"] == 3


def stepped(*params, **settings):
    optimizer = AdamATan2([torch.nn.Parameter(p) for p in params], **settings)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changed", [torch.ones(20), torch.ones(10, dtype=torch.float64), torch.ones(1, 10), torch.ones(4)]
)
def test_a_parameter_that_is_another_than_its_moments(backend, changed):
    """Else a kernel would write where nothing of it lies."""
    if backend == "fused" and changed.dtype != torch.float32:
        pytest.skip("refused before")
    optimizer = stepped(torch.ones(10), backend=backend)
    (p,) = optimizer.param_groups[0]["params"]
    p.data, p.grad = changed, None
    p.grad = torch.ones_like(changed)
    with pytest.raises(UserError, match=r"its moments are \[10\] torch.float32 on cpu; make the optimizer"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["reference", "foreach"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_rounded_once(backend, dtype):
    """Neither the decay nor the update alone is half the distance to the next number, but both are."""
    almost_half = 0.6 * torch.finfo(dtype).eps / 4  # below 1 numbers are half as far apart
    optimizer = stepped(torch.ones(3, dtype=dtype), lr=almost_half, weight_decay=1.0, backend=backend)
    (p,) = optimizer.param_groups[0]["params"]
    assert torch.equal(p.detach().double(), torch.full((3,), 1 - torch.finfo(dtype).eps / 2).double())


def test_state_of_the_other_form_of_bias_correction():
    inside = stepped(torch.ones(3), bias_correction="inside").state_dict()
    with pytest.raises(UserError, match="trained with bias_correction=inside, here it is outside"):
        stepped(torch.ones(3)).load_state_dict(inside)
    stepped(torch.ones(3), bias_correction="inside").load_state_dict(inside)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("param_groups"), "it lacks param_groups or state"),
        (lambda state: state["param_groups"].append(state["param_groups"][0]), r"groups of \[1, 1\], here"),
        (lambda state: state["param_groups"][0].update(lr=math.nan), "lr=nan has to be at least 0"),
    ],
)
def test_a_state_that_is_broken(change, said):
    state = a_state()
    change(state)
    with pytest.raises(UserError, match=said):
        AdamATan2([torch.nn.Parameter(torch.ones(5, 3))]).load_state_dict(state)


def test_nothing_moves_if_one_gradient_cannot_be_taken():
    p, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(4, 3, sparse=True)
    p.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    optimizer = AdamATan2([{"params": [p]}, {"params": table.parameters()}])
    with pytest.raises(UserError, match="is sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_only_the_kernel_is_recorded(monkeypatch):
    """What else runs on a GPU takes numbers from the host, which a CUDA graph would keep as they are."""
    optimizer = stepped(torch.ones(3))
    monkeypatch.setattr(adam_atan2, "is_recorded", lambda device: True)
    with pytest.raises(UserError, match="a CUDA graph of AdamATan2 needs optimizer_backend=cuda"):
        optimizer.step()


def test_a_forked_process_goes_on():
    """It has none of the threads of the one before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer = stepped(torch.ones(CHUNK + 1), backend="fused")
        child = multiprocessing.get_context("fork").Process(target=optimizer.step)
        child.start()
        child.join(60)
        child.kill()
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_update_leaves_nobody_writing(monkeypatch):
    """The thread that asked for it is interrupted at its first part, while another one has all others to do."""
    ours, update = threading.current_thread(), fused_cpu._update
    begun, interrupted, num_parts = threading.Event(), threading.Event(), []

    def slow(*args):
        if threading.current_thread() is ours:
            begun.wait()
            interrupted.set()
            raise KeyboardInterrupt
        begun.set()
        interrupted.wait()
        update(*args)
        num_parts.append(1)

    monkeypatch.setattr(fused_cpu, "_update", slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    p = torch.nn.Parameter(torch.zeros(16 * CHUNK))
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        AdamATan2([p], backend="fused").step()
    assert len(num_parts) == 15
