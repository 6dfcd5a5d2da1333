"""Whatever a word or a file holds becomes a value, or one line in the user's words."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.cli.config import _keys
from hrm_ray.config.compose import train_config
from hrm_ray.config.validate import abbreviated, in_one_line, nearest, read_value, read_yaml, read_yaml_file
from hrm_ray.data.recipe import load_recipe
from hrm_ray.errors import LONGEST, UserError, one_line
from hrm_ray.tuning.config import load_sweep


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1E3", 1000.0), (".5", 0.5), ("-1", -1), ("010", 10), ("1_000", 1000), ("+2", 2)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("None", "None")],
        *[("off", "off"), ("no", "no"), ("1:30", "1:30"), ("2001-01-01", "2001-01-01"), ("'1'", "1")],
        *[("[1,8]", [1, 8]), ("[a, 'b c']", ["a", "b c"]), ("{a: 1}", {"a": 1}), ('{"a":1}', {"a": 1})],
    ],
)
def test_values_are_yaml_1_2(text, value):
    found = read_value("key", text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["!x", "!!set {a}", "&a [*a]", "[&a 1, *a]", "[" * 3000, "9" * 5000, "{", "a: b: c"]
)
def test_what_is_no_value_is_said(text):
    with pytest.raises(UserError, match=r"^lr=.*: not a value; quote it"):
        read_value("lr", text)


@given(st.text(max_size=30))
def test_a_value_is_read_or_refused_whatever_the_text(text):
    try:
        read_value("key", text)
    except UserError as error:
        assert str(error).isprintable()


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.sampled_from([0.5, 1e-5, -2.5e30, "a b", "x"])
)


@given(
    st.recursive(
        PLAIN, lambda part: st.lists(part) | st.dictionaries(st.sampled_from("abc"), part), max_leaves=9
    )
)
def test_yaml_that_is_written_is_read_as_it_was(value):
    assert read_yaml(yaml.safe_dump(value).encode(), "file") == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "scaling.num_workers=[1]",
            "scaling.num_workers=[1]: give a whole number above 0 or [a whole number above 0, a whole number above 0]",
        ),
        (
            "scaling.num_workers=[true,2]",
            "scaling.num_workers=[true,2]: give a whole number above 0 or [a whole number above 0, a whole number "
            "above 0]",
        ),
        ("scaling.num_workers=x", "scaling.num_workers='x': give a whole number"),
        ("scaling.cpus_per_worker=0", "scaling.cpus_per_worker=0: give a whole number above 0 or auto"),
        ("compile=maybe", "compile='maybe': give true or false or auto"),
        ("scaling.use_gpu=[]", "scaling.use_gpu=[]: give true or false or auto"),
        ("lr=!x", "lr=!x: not a value"),
        ("lr=[1e-3]", "lr=[0.001]: give a number above 0"),
        ("lr=true", "lr=true: a number is needed, not true or false"),
        ("max_steps=true", "max_steps=true: a number is needed, not true or false"),
        ("ema=5", "ema=5: give true or false"),
        ("eval_interval=None", "eval_interval=None: nothing is written null here; give eval_interval=null"),
        (
            "early_stopping=none",
            "early_stopping=none: nothing is written null here; give early_stopping=null",
        ),
        ("run_name=None", "run_name=None: nothing is written null here; give run_name=null"),
        ("arch.hidden_size=1e300", "arch.hidden_size=1e+300: this number is too large"),
        ("lr=None", "lr='None': give a number above 0"),
        ("failure=3", "failure=3: holds keys of its own; give them, such as failure.max_failures=VALUE"),
        ("arch.loss=x", "arch.loss='x': holds keys of its own; give them, such as arch.loss.loss_type=VALUE"),
        ("epochs=" + "9" * 30, "epochs=999999999999999999999999999999: "),
        ("epochs=" + "9" * 400, "epochs=9999"),
        ("epochs=" + "9" * 5000, "not a value"),
        ("lr=1e308", "lr=1e+308: this number is too large"),
        ("arch.expansion=1e308", "arch.expansion=1e+308: input should be less than or equal to 1024"),
        ("arch.puzzle_emb_ndim=" + "9" * 30, "arch.puzzle_emb_ndim=9999"),
        ("watchdog_s=1e30", "watchdog_s=1e+30: "),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'lr'?"),
        ("zzz=1", "unknown key 'zzz'; 'hrm-ray config show' lists all"),
        ("hidden_size=64", "unknown key 'hidden_size'; did you mean 'arch.hidden_size'?"),
        ("use_gpu=true", "unknown key 'use_gpu'; did you mean 'scaling.use_gpu'?"),
        ("batch_size=8", "did you mean 'global_batch_size'?"),
        ("Epochs=8", "did you mean 'epochs'?"),
        ("arch.h_cycles=8", "did you mean 'arch.H_cycles'?"),
        ("arch..x=1", "unknown key 'arch..x'"),
        ("lr=${nope}", "${...} stands for no value"),
        ("lr=${lr}", "${...} stands for no value"),
        ("lr=${", "${...} stands for no value"),
        ("run_name=a\nb", r"run_name=a\nb must be a plain folder name"),
        ("run_name=" + "x" * 300, "must be a plain folder name"),
        ("x" * 5000 + "=1", "unknown key 'xxxx"),
        ("x" * 5000, "is not of the form key=value"),
    ],
)
def test_values_that_do_not_fit_are_said_in_the_words_of_the_user(words, said):
    with pytest.raises(UserError) as error:
        train_config(["data=d", words])
    assert said in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) <= LONGEST


def test_values_stand_for_others():
    config = train_config(["data=${x}", "lr=${puzzle_emb_lr}", "arch.num_heads=${arch.halt_max_steps}"])
    assert (config.data_path, config.lr, config.arch.num_heads) == ("${x}", 1e-2, 16)


def test_whatever_is_raised_at_the_boundary_is_one_line():
    with pytest.raises(UserError, match=r"^here: too large$"), in_one_line("here"):
        raise OverflowError("too large\nreally")


def test_a_message_is_one_line_of_bounded_length_that_keeps_its_advice():
    assert one_line("a\rb\n\x1b[31m") == r"a\rb\n\x1b[31m"
    assert str(UserError("trm\r")) == r"trm\r"
    long = one_line("x" * 9000 + "; leave it out")
    assert len(long) <= LONGEST and long.endswith("; leave it out")


def test_values_are_shown_as_they_are_written_and_shortened():
    assert abbreviated([1, True, None, "a", {"b": 2.5}]) == "[1,true,null,'a',...]"
    assert abbreviated({"a": [1]}) == "{a: [1]}"
    endless: list = []
    endless.append(endless)
    assert len(abbreviated(endless)) < 60 and len(abbreviated("9" * 5000)) <= 60


def test_hints_name_what_is_near_or_few_or_the_command_that_lists_them():
    many = [f"key_number_{n}" for n in range(80)]
    assert nearest("zzz", many, "hrm-ray config show") == "'hrm-ray config show' lists all"
    assert nearest("zzz", ["a", "b"], "hrm-ray config show") == "known: a, b"
    assert nearest("zzz", many).endswith(", ...") and nearest("zzz", many).count(",") == 12
    assert nearest("HIDDEN_SIZE", ["arch.hidden_size"]) == "did you mean 'arch.hidden_size'?"


@pytest.mark.parametrize("load", [load_recipe, load_sweep])
@pytest.mark.parametrize(
    "content",
    [
        b"!x",
        b"\xff\x00",
        b"[" * 5000,
        b"{",
        b"- 1",
        b"1",
        b"",
        b"seed: " + b"9" * 5000,
        b"? [1]\n: 2",
        b"seed: !!set {a}",
    ],
)
def test_files_that_hold_nothing_sensible_are_one_line(load, content, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(str(file))
    assert "x" in str(error.value) and str(error.value).isprintable()


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"recipe file .*x\.yaml does not exist"):
        read_yaml_file(tmp_path / "x.yaml", "recipe")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml_file(tmp_path, "recipe")


def test_every_key_has_a_meaning():
    for kind, fields in _keys().items():
        for key, field in fields.items():
            assert field.description and field.description.endswith("."), f"{kind}: {key}"
