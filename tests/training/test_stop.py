"""A wish to stop, by signal: which count, and how often."""

import os
import signal

import pytest

from hrm_ray.training.signals import StopRequest

HUP, INT, TERM = signal.SIGHUP, signal.SIGINT, signal.SIGTERM


@pytest.fixture
def ends(monkeypatch):
    """The codes with which the process would have ended at once."""
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


@pytest.mark.parametrize(
    ("sent", "kept", "ended"),
    [
        ([INT], INT, []),
        ([TERM], TERM, []),
        ([HUP], HUP, []),
        ([HUP, HUP, HUP], HUP, []),  # the kernel, a shell and a session manager may each send one
        ([HUP, TERM], TERM, []),
        ([HUP, TERM, HUP], TERM, []),
        ([INT, HUP], INT, []),
        ([INT, INT], INT, [130]),
        ([HUP, TERM, TERM], TERM, [143]),
    ],
)
def test_the_first_asks_and_the_second_ends_but_for_hangups(ends, capfd, sent, kept, ended):
    stop = StopRequest()
    assert stop.reason() is None
    with stop.listening():
        for number in sent:
            os.kill(os.getpid(), number)
    assert (stop.reason(), stop.signal, ends) == ("signal", kept, ended)
    assert capfd.readouterr().err.count("with a checkpoint of all steps done") == 1


def test_handlers_are_put_back(ends):
    before = [signal.getsignal(number) for number in (HUP, INT, TERM)]
    with StopRequest().listening():
        assert [signal.getsignal(number) for number in (HUP, INT, TERM)] != before
    assert [signal.getsignal(number) for number in (HUP, INT, TERM)] == before


def test_what_nohup_starts_goes_on(ends):
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), HUP)
        assert stop.reason() is None
    finally:
        signal.signal(HUP, before)


def test_where_the_terminal_is_gone_the_wish_is_heard(ends, monkeypatch):
    def gone(descriptor, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.write", gone)
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), HUP)
    assert stop.signal == HUP
