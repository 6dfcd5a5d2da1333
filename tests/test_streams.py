"""What a command does where standard input, output or error cannot be used."""

import os
import subprocess
import sys

import pytest

from hrm_ray.cli import streams

PROGRAM = """
import sys
from hrm_ray import cli
class Parser:
    def parse_known_args(self, argv): return self, []
    def run(self, args):
        print("doing", file=sys.stderr)
        print("result " * int(sys.argv[1]))
        sys.stderr.flush()
        open(sys.argv[2], "w").write("done")
cli.build_parser = Parser
sys.exit(cli.main([]))
"""


def run(redirection: str, tmp_path, *, length: int = 1, buffered: bool = True):
    """The exit code, what could be read of both streams, and what the command wrote into its file."""
    file = tmp_path / "file"
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", PROGRAM, str(length), str(file)],
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr, file.read_text() if file.exists() else None


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_full_disk_behind_standard_output_is_one_line(tmp_path, length, buffered):
    code, _, err, _ = run(">/dev/full", tmp_path, length=length, buffered=buffered)
    assert code == 2
    assert err.splitlines() == [
        "doing",
        "error: standard output cannot be written: No space left on device; send it somewhere else",
    ]


def test_a_closed_standard_output_is_said_before_anything_is_done(tmp_path):
    code, _, err, file = run(">&-", tmp_path)
    assert (code, file) == (2, None)
    assert err == "error: standard output is closed; send it to a file or to /dev/null\n"


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_lost_messages_stop_no_work(tmp_path, redirection):
    """And nothing that is printed lands in the command's own file, whose number could be that of the closed stream."""
    assert run(redirection, tmp_path) == (0, "result \n", "", "done")


def test_a_reader_that_went_away_is_no_error(tmp_path):
    code, _, err, _ = run("| head -c 3", tmp_path, length=100_000)
    assert code == 0 and "Traceback" not in err and "error" not in err


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(28, "full")])
def test_messages_to_a_terminal_that_is_gone(error):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise error

        flush = lambda self: self.write("")  # noqa: E731

    stream = streams.Messages(Gone())
    print("x" * 10, file=stream, flush=True)
    assert stream.encoding == "utf-8"
