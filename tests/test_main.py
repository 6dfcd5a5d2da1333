"""What comes before a command: Ctrl-C while it is imported."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["hrm-ray"].split(":")
WAYS = {
    "module": ["-m", "hrm_ray"],
    "script": ["-c", "import sys; from {0} import {1}; sys.exit({1}())".format(*SCRIPT)],
}
# Found in place of a package that every command imports. Ctrl-C may be typed in the middle of any.
PACKAGE = """
import os, signal, sys
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
print("goes on", flush=True)
sys.exit(3)
"""


def run(way: str, folder: Path, *before: str) -> tuple[int, str]:
    """The exit code and all that was printed by `hrm-ray --version` that hears Ctrl-C while it imports pydantic."""
    (folder / "pydantic.py").write_text(PACKAGE)
    done = subprocess.run(
        [*before, sys.executable, *WAYS[way], "--version"],
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # whatever these tests were started by
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_while_a_command_is_imported(tmp_path, way):
    assert run(way, tmp_path) == (130, "")


def test_where_it_is_ignored_it_stays_so(tmp_path):
    """As `hrm-ray ... &` in a script."""
    assert run("module", tmp_path, "sh", "-c", 'trap "" INT; "$@"', "sh") == (3, "goes on\n")
