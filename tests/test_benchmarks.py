"""The commands of the benchmarks: what they take, what they say of mistakes, and that the shortest ones measure."""

import importlib
import json
import sys

import pytest
import torch

from benchmarks import clock, front, gpu, machine, predict, step
from benchmarks.scaling import small_model
from hrm_ray.config.compose import train_config
from hrm_ray.errors import UserError
from hrm_ray.models.rotary import rope_tables
from hrm_ray.scale.machine import Machine, load_machine
from hrm_ray.scale.model import all_reduce_s
from hrm_ray.scale.model import step as step_of
from hrm_ray.scale.work import Puzzles, Work
from hrm_ray.training import cuda_graph
from tests.training import recorder

KNOWN = {"kind": ("a", "b"), "rounds": 3, "compile": True, "data": str}


def command(monkeypatch, capsys, name: str, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the tests to come
    code = 0
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_words_have_the_types_of_their_defaults():
    assert front.parse(["data=d"], KNOWN) == ({"kind": "a", "rounds": 3, "compile": True, "data": "d"}, [])
    words = ["data=a=b", "kind=b", "rounds=12", "compile=false"]
    assert front.parse(words, KNOWN)[0] == {"kind": "b", "rounds": 12, "compile": False, "data": "a=b"}
    assert front.parse(["data=d", "lr=1"], KNOWN, for_train=True)[1] == ["lr=1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "data= is missing"),
        (["data="], "data= is missing"),
        (["data=d", "kind=c"], "kind=c: choose from a, b"),
        (["data=d", "rounds=0"], "rounds=0: a whole number"),
        (["data=d", "rounds=1.5"], "rounds=1.5: a whole number"),
        (["data=d", "compile=yes"], "compile=yes: true or false"),
        (["data=d", "round=1"], "round=1: not one of kind=, rounds=, compile=, data="),
        (["data=d", "rounds"], "rounds: not one of"),
    ],
)
def test_a_wrong_word_is_one_line(words, said):
    with pytest.raises(UserError, match=said):
        front.parse(words, KNOWN)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step", ["arch=unknown"]),
        ("optimizer", ["threads=none"]),
        ("attention", ["dtype=float8"]),
        ("evaluation", ["data=d"]),
        ("evaluation", ["data=/missing", "checkpoint=/missing"]),
        ("scaling", ["unknown=1"]),
        ("scaling", ["steps=19"]),
        ("predict", ["steps=19"]),
        ("predict", ["unknown=1"]),
        ("predict", ["out=machine.txt"]),
        ("predict", ["global_batch_size=3"]),
        ("checkpoint", ["lr=high"]),
        ("startup", ["rounds=-1"]),
        ("ray_overhead", ["word"]),
        ("votes", ["copies=0"]),
        ("build", ["recipe=sudoku_4x4"]),
        ("build", ["recipe=sudoku_4x4", "source=/missing", "repeats=1"]),
        ("data", ["repeats=0"]),
        ("data", ["source=/missing", "repeats=1"]),
        ("step", ["threads=1000000"]),
        ("step", ["products=false", "attention=sdpa"]),
        ("step", ["local_batch_size=99999999999999999999"]),
    ],
)
def test_a_mistake_is_no_traceback(monkeypatch, capsys, name, words):
    code, out, err = command(monkeypatch, capsys, name, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


def test_step_measures(monkeypatch, capsys):
    words = ["local_batch_size=2", "rounds=1", "compile=false"]
    code, out, _ = command(monkeypatch, capsys, "step", *words, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["ms_per_example"] > 0 and result["tflops"] > 0
    assert result["plain_dtype"] == result["dtype"]
    assert result["attention"] == ("sdpa" if torch.cuda.is_available() else "matmul")
    words += ["dtype=float32", "plain_dtype=bfloat16"]
    code, out, _ = command(monkeypatch, capsys, "step", *words)
    assert out.startswith("sudoku_4x4, float32: ") and ", plain (bfloat16) " in out


def test_without_products_nothing_is_multiplied():
    a, b, out = torch.ones(2, 3), torch.ones(3, 4), torch.full((2, 4), 7.0)
    with step.without_products():
        assert torch.mm(a, b).shape == (2, 4)
        assert torch.mm(a, b, out=out).equal(torch.full((2, 4), 7.0))
        assert torch.bmm(a[None], b[None]).shape == (1, 2, 4)
    assert torch.mm(a, b).equal(torch.full((2, 4), 3.0))


@pytest.mark.parametrize(
    ("words", "asked", "kept"), [([], [True], True), (["keep_memory=false"], [], False)], ids=["kept", "not"]
)
def test_step_without_products_is_no_share_of_them(monkeypatch, capsys, words, asked, kept):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step.memory, "keep_memory", lambda: calls.append(True) or True)
    words = ["local_batch_size=2", "rounds=1", "compile=false", "products=false", *words]
    code, out, _ = command(monkeypatch, capsys, "step", *words, "--json")
    result = json.loads(out)
    assert code == 0 and result["keep_memory"] is kept and calls == asked
    assert result["ms_per_example"] > 0
    assert {result[key] for key in step.rates(1, 1, 1, None, torch.float32)} == {None}
    assert result["attention"] == "matmul"


def test_step_compiles_the_plain_one_if_asked_and_says_what_a_compiler_says(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(step.torch, "compile", lambda f, dynamic: taken.append(dynamic) or f)
    words = ["local_batch_size=2", "rounds=1", "compile=false", "compile_plain=true"]
    code, out, _ = command(monkeypatch, capsys, "step", *words, "--json")
    assert (code, taken) == (0, [False])
    assert json.loads(out)["plain_compiled_ms_per_example"] > 0

    def fails(*_, **__):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(step.torch, "compile", lambda f, dynamic: fails)
    code, out, err = command(monkeypatch, capsys, "step", *words)
    assert (code, out) == (2, "")
    assert err == "error: compile_plain=true fails: no compiler; use compile_plain=false\n"


def test_attention_measures(monkeypatch, capsys):
    words = ["batch=2", "tokens=5", "rounds=1", "dtype=float32"]
    code, out, _ = command(monkeypatch, capsys, "attention", *words, "--json")
    assert code == 0
    assert json.loads(out)["ms"].keys() >= {"sdpa", "matmul"}


def test_votes_are_measured(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "votes", "tasks=2", "copies=3", "--json")
    result = json.loads(out)
    assert (code, result["rows"]) == (0, 6)
    assert result["wall_s"] > 0 and result["cpu_s"] > 0 and result["peak_rss_mb"] > 10


class FakeGPU:
    """As far as `clock` sees one: it takes the time of `cycles_to_launch` cycles to launch what is timed."""

    def __init__(self, cycles_to_launch: float):
        self.cycles_to_launch, self.cycles = cycles_to_launch, 0

    def sleep(self, cycles: int) -> None:
        self.cycles = cycles

    def record(self) -> None: ...

    def query(self) -> bool:
        """Whether it no longer sleeps when all is launched."""
        return self.cycles < self.cycles_to_launch

    def elapsed_time(self, other: object) -> float:
        return self.cycles


@pytest.fixture
def time_on_gpu(monkeypatch):
    def time(cycles_to_launch: float) -> float:
        fake = FakeGPU(cycles_to_launch)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: fake)
        monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return clock._kernels(lambda: None) * 1e3

    return time


@pytest.mark.parametrize("cycles", [1, 5 * clock.HEAD_START_CYCLES, 10**9])
def test_a_gpu_sleeps_until_all_that_is_timed_is_launched(time_on_gpu, cycles):
    assert time_on_gpu(cycles) >= cycles


def test_what_waits_for_the_gpu_is_not_timed(time_on_gpu):
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        time_on_gpu(float("inf"))


@pytest.mark.parametrize(("kind", "expected"), [("eager", 2), ("recorded", 0)])
def test_a_recorded_step_is_replayed(monkeypatch, kind, expected):
    """What is measured on a GPU beside the others."""
    monkeypatch.setattr(cuda_graph, "capture", recorder.capture)
    monkeypatch.setattr(
        step.machine, "compiler", lambda device: None
    )  # its kernels are not seen by the recorder
    losses, act_loss = [], step.losses.act_loss
    monkeypatch.setattr(step.losses, "act_loss", lambda *args: losses.append(args) or act_loss(*args))
    config, size = step.ARCHS["sudoku_4x4"]
    take = step.make_step(kind, config, size, 2, torch.float32)
    losses.clear()
    for _ in range(2):
        take()
    assert len(losses) == expected


def test_what_a_gpu_is_to_tell_is_told_here_too(monkeypatch, capsys, tmp_path):
    """One part that fails and one that runs; neither ends the other."""
    words = [f"data={tmp_path}/none", f"out={tmp_path}/out", "only=step-published,attention", "--json"]
    parts = gpu.parts
    small = ("benchmarks.attention", "batch=2", "rounds=1", "--json")
    failing = ("benchmarks.step", "arch=none")
    monkeypatch.setattr(
        gpu, "parts", lambda *given: parts(*given) | {"attention": small, "step-published": failing}
    )
    code, out, _ = command(monkeypatch, capsys, "gpu", *words)
    result = json.loads(out)["parts"]
    assert code == 1
    assert result["step-published"]["end"] == "ended with 2"
    assert "arch=none" in (tmp_path / "out" / "step-published.txt").read_text()
    assert result["attention"]["end"] == "ended with 0"
    assert json.loads((tmp_path / "out" / "attention.txt").read_text())["ms"]
    code, _, err = command(monkeypatch, capsys, "gpu", "data=d", "only=nonsense")
    assert code == 2 and "choose from tests, optimizer" in err
    code, _, err = command(monkeypatch, capsys, "gpu", f"data={tmp_path}/none", f"out={tmp_path}/new")
    assert code == 2 and err.startswith("error: ") and "none" in err
    assert not (tmp_path / "new").exists()


def test_what_is_measured_is_told_with_where(monkeypatch, capsys, tmp_path):
    """Also where git is not, and in another folder."""
    words = ["batch=2", "tokens=5", "rounds=1", "dtype=float32", "--json"]
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(monkeypatch, capsys, "attention", *words)
    assert code == 0 and json.loads(out)["commit"] == machine.facts()["commit"]
    monkeypatch.setenv("PATH", "")
    code, out, _ = command(monkeypatch, capsys, "attention", *words)
    assert code == 0 and json.loads(out)["commit"] is None


@pytest.mark.parametrize(("kind", "times"), [("eager", 1), ("plain", 2)])
def test_the_plain_step_reads_ahead_in_full(monkeypatch, kind, times):
    """As the published code does."""
    config, size = step.ARCHS["sudoku_4x4"]
    take = step.make_step(kind, config, size, 2, torch.float32)
    embedded, embed = [], step.RecursiveModel.embed
    monkeypatch.setattr(step.RecursiveModel, "embed", lambda *args: embedded.append(args) or embed(*args))
    take()
    assert len(embedded) == times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_step_rotates_as_published_and_alike(monkeypatch, dtype):
    """By other operations, to the same bits, with the gradients."""
    config = step.HRMConfig(**{**step.SMALL, "pos_encodings": "rope"})
    seen, rotate = [], step.plain_apply_rope

    def rotated(x, rotation, cos, sin):
        x = x.detach().clone().requires_grad_()
        y = rotation(x, cos, sin)
        y.backward(torch.ones_like(y).cumsum(-1))
        return y.detach(), x.grad

    def watched(x, cos, sin):
        with torch.enable_grad():
            plain = rotated(x, rotate, cos, sin)
            ours = rotated(x, step.own_apply_rope, *rope_tables(16, 32))
        seen.append(all(map(torch.equal, plain, ours)))
        return rotate(x, cos, sin)

    monkeypatch.setattr(step, "plain_apply_rope", watched)
    step.make_step("plain", config, 4, 2, dtype)()
    assert seen and all(seen)


WORK = Work.of(
    train_config([*small_model("unknown", "work"), "global_batch_size=128"]), Puzzles("", 6, 16, 1, 2000, 0)
)


def made_up_times(truth: Machine) -> dict[str, float]:
    """Milliseconds that `truth` would be measured to take, by the model."""
    alone = {name: step_of(truth, WORK, 1, size) for name, size in (("small", 32), ("large", 192))}
    times = {f"{name}, alone": of.seconds for name, of in alone.items()}
    times |= {f"{name}, together": of.computing * truth.crowded.value for name, of in alone.items()}
    times["optimizer"] = alone["small"].optimizer
    times["few bytes"] = all_reduce_s(truth, 2, predict.SMALL_BYTES, 1)
    times["gradients"] = all_reduce_s(truth, 2, WORK.gradient_bytes, 1)
    return {name: seconds * 1e3 for name, seconds in times.items()}


def test_the_numbers_of_a_machine_are_found_again():
    values = load_machine("cpu").model_dump()
    for key, value in {"flops_per_s": 4e10, "launch_s": 5e-5, "crowded": 1.25, "data_s": 0}.items():
        values[key]["value"] = value
    truth = Machine.model_validate(values)
    found = Machine.model_validate(predict.numbers(made_up_times(truth), (32, 192), WORK, 12.5))
    for key, number in found.numbers().items():
        if number.source.startswith("measured") and key != "start_s":
            assert number.value == pytest.approx(truth.numbers()[key].value, rel=2e-3), key
    assert found.start_s.value == 12.5
    for n in (1, 2):
        assert step_of(found, WORK, n, 128).seconds == pytest.approx(
            step_of(truth, WORK, n, 128).seconds, rel=1e-3
        )


@pytest.mark.parametrize("change", [{"large, alone": 1e-3}, {"gradients": 1e-6}])
def test_a_machine_that_is_too_busy_is_said(change):
    times = made_up_times(load_machine("cpu")) | change
    with pytest.raises(UserError, match="too busy to be measured"):
        predict.numbers(times, (32, 192), WORK, 1)


@pytest.mark.long
def test_predictions_are_measured(monkeypatch, capsys, tmp_path):
    words = ["rounds=1", "steps=20", "global_batch_size=8", f"out={tmp_path}/mine.yaml", "--json"]
    code, out, _ = command(monkeypatch, capsys, "predict", *words)
    result = json.loads(out)
    assert code == 0
    found = load_machine(f"{tmp_path}/mine.yaml")
    assert found == Machine.model_validate(result["machine"])
    for n in ("1", "2"):
        assert result["measured_ms"][n] > 0
        ratio = result["predicted_ms"][n] / result["measured_ms"][n]
        assert result["predicted_over_measured"][n] == pytest.approx(ratio, rel=0.05)
