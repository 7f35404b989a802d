"""What tests share: small runs of the commands, and how many examples Hypothesis tries (100 of a
test, with `pytest --hypothesis-profile=fuzz` many more)."""

import signal

import pytest
from hypothesis import settings
from small_runs import make_runs

from calm_rt import cli

settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The runs that `make_runs` makes; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("cli")
    make_runs(folder)
    return folder


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with one line that matches."""

    def check(arguments, *words):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err.strip()
        line = error.splitlines()[-1]
        assert code == 2, error
        assert line.startswith("calm-rt") and "Traceback" not in error
        assert all(word in line for word in words), line
        return line

    return check
