"""`hrm-ray scale`: what it prints, and how it says no."""

import json
import re
from pathlib import Path

import pytest
import yaml

from hrm_ray.cli import main
from hrm_ray.scale.machine import KINDS, load_machine, machine_files
from tests.toy import toy_dataset

ROOT = Path(__file__).parents[2]
TINY = ["arch.hidden_size=32", "arch.num_heads=2", "lr_warmup_steps=1"]


@pytest.fixture
def printed(capsys, tmp_path, monkeypatch):
    """What `hrm-ray scale` prints in a folder where no data sets are."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert main(["scale", *words]) == 0
        return capsys.readouterr().out

    return run


def rows(text: str, title: str) -> dict[int, list[float]]:
    """The numbers of a table, by workers."""
    table = text.partition(title)[2].partition("workers  puzzles")[2]
    lines = [line.split() for line in table.splitlines()[1:]]
    found = {}
    for cells in lines:
        if not cells or not cells[0].isdecimal():
            break
        found[int(cells[0])] = [float(re.sub("[,%]", "", cell)) for cell in cells[1:]]
    return found


def test_both_published_trainings_are_shown(printed):
    text = printed()
    hrm, _, rest = text.partition("sudoku_extreme_trm: ")
    trm, _, numbers = rest.partition("machine: ")
    assert (
        "sudoku_extreme: hrm_v1, 27,275,266 parameters; 52,083 steps of 384 puzzles, 10 evaluation(s)" in hrm
    )
    assert trm.startswith("trm, mlp_t, 5,028,866 parameters; 65,104 steps of 768 puzzles, 10 evaluation(s)")
    for part, batch, shared in ((hrm, 384, [1, 2, 8, 64]), (trm, 768, [1, 2, 8, 64, 512])):
        strong, weak = rows(part, "strong scaling"), rows(part, "weak scaling")
        assert list(strong) == shared  # 512 workers have no puzzle each of 384
        assert list(weak) == [1, 2, 8, 64, 512]
        assert all(weak[n][0] == batch for n in weak)
        for found in (strong, weak):
            for n, (puzzles, products, launches, optimizer, exchange, data, step, speed, *_) in found.items():
                # Every step can be added up by hand from what stands beside it.
                assert step == pytest.approx(max(products, launches) + optimizer + exchange + data, abs=0.03)
                assert speed == pytest.approx(
                    (batch if found is strong else batch * n) / step * 1e3, rel=2e-3
                )
                assert puzzles * n >= batch
            assert found[1][8] == 100 and found[1][4] == 0
    for key in load_machine("h200").numbers():
        assert re.search(rf"^  {key} +\S+ +({'|'.join(KINDS)})", numbers, flags=re.M), key


def test_json_says_the_same(printed):
    text = printed("experiment=sudoku_4x4", "machine=cpu", "workers=[1,2]")
    (found,) = json.loads(printed("experiment=sudoku_4x4", "machine=cpu", "workers=[1,2]", "--json"))
    assert found["name"] == "sudoku_4x4" and found["num_params"] == 445_250 and found["num_steps"] == 468
    for title, kind in (("strong scaling", "strong"), ("weak scaling", "weak")):
        for row in found[kind]:
            shown = rows(text, title)[row["workers"]]
            assert shown[6] == pytest.approx(row["step"]["seconds"] * 1e3, abs=0.005)
            assert shown[-2] == pytest.approx(row["spot"] / 3600, abs=0.005)
    assert f"more than {found['most_useful_workers']} worker(s)" in text
    assert f"2: {found['smallest_useful_batch']['2']}." in text


def test_a_data_set_that_is_there_is_what_counts(printed, tmp_path):
    toy_dataset(tmp_path / "d", num_train=40, num_test=5)
    text = printed("data=d", "machine=cpu", "global_batch_size=4", "epochs=10", "eval_interval=5", *TINY)
    assert "train: hrm_v1, " in text
    assert "100 steps of 4 puzzles, 2 evaluation(s) of 5 (data set d)" in text
    assert list(rows(text, "strong scaling")) == [1, 2]


def test_a_machine_of_ones_own(printed, tmp_path):
    values = yaml.safe_load((ROOT / "hrm_ray/config/machine/h200.yaml").read_text())
    values["interruptions_per_hour"]["value"] = 1000.0
    values["about"] = "mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    text = printed("experiment=sudoku_4x4", "machine=mine.yaml", "workers=[4]")
    assert "machine: mine; 8 worker(s) in each" in text
    assert re.search(r"^ +4 .* never +-$", text, flags=re.M)
    (found,) = json.loads(printed("experiment=sudoku_4x4", "machine=mine.yaml", "workers=[4]", "--json"))
    assert found["strong"][0]["spot"] is None


@pytest.mark.parametrize("name", machine_files())
def test_every_machine_that_ships_says_where_its_numbers_come_from(name, capsys):
    machine = load_machine(name)
    assert machine.about and all(number.source.startswith(KINDS) for number in machine.numbers().values())
    assert machine.numbers()["price_per_hour"].source.startswith("assumed")
    assert main(["config", "show", name]) == 0
    assert capsys.readouterr().out.startswith("# ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["machine=h20"], "unknown machine 'h20'; did you mean 'h200'?"),
        (["machine=none.yaml"], "machine file none.yaml does not exist"),
        (["machine="], "machine= is empty"),
        (
            ["workers=[1,2000]", "experiment=sudoku_extreme"],
            "workers=2000: global_batch_size=384 is too few puzzles",
        ),
        (["workers=[0]"], "workers.0=0"),
        (["workers=4"], "workers=4"),
        (["workers=[x]"], "workers.0='x'"),
        (["worker=[1]"], "unknown key 'worker'"),
        (["experiment=nothing"], "unknown experiment 'nothing'"),
        (["global_batch_size=-1"], "global_batch_size=-1"),
        (["data=missing"], "no dataset folder missing; build one with"),
        (["word"], "'word' is not of the form key=value"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["scale", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("launch_s"), "'launch_s' is not given; add launch_s=VALUE"),
        (lambda v: v.update(lunch_s=1), "unknown key 'lunch_s'; did you mean 'launch_s'?"),
        (
            lambda v: v.update(launch_s=1),
            "launch_s=1: holds keys of its own; give them, such as launch_s.value=VALUE",
        ),
        (lambda v: v["launch_s"].update(value=-1), "launch_s.value=-1"),
        (lambda v: v["flops_per_s"].update(value=0), "flops_per_s.value=0"),
        (lambda v: v["flops_per_s"].update(value="fast"), "flops_per_s.value='fast': give a number above 0"),
        (lambda v: v["flops_per_s"].pop("source"), "'flops_per_s.source' is not given"),
        (
            lambda v: v["data_s"].update(source="guessed"),
            "source='guessed' must begin with measured or assumed",
        ),
        (lambda v: v.update(workers=0), "workers=0"),
        (lambda v: v.clear(), "'about' is not given"),
    ],
)
def test_a_machine_file_that_does_not_fit_is_one_line(change, said, capsys, tmp_path):
    values = yaml.safe_load((ROOT / "hrm_ray/config/machine/l40s.yaml").read_text())
    change(values)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["scale", f"machine={file}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: machine mine: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: !x 1"])
def test_a_machine_file_that_is_none_is_one_line(text, capsys, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    assert main(["scale", f"machine={tmp_path}/m.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: machine ") and err.count("\n") == 1


def test_the_page_shows_what_the_command_prints(printed):
    page = (ROOT / "docs/scale.md").read_text()
    blocks = re.findall(r"^```\n(\$ hrm-ray scale.*?)^```", page, flags=re.M | re.S)
    assert len(blocks) == 1
    command, _, shown = blocks[0].partition("\n")
    assert printed(*command.split()[3:]).strip() == shown.strip()
