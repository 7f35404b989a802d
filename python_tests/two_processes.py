"""A program as two processes of one group, under the environment that torchrun gives them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two(program: str, *arguments: object) -> None:
    """Asserts that both processes end well; the program can import the tests and the package.

    program: Python, whose sys.argv[1:] are the arguments.
    """
    tests = Path(__file__).parent
    path = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]!r}; "
    command = [sys.executable, "-c", path + program, *map(str, arguments)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            command, env={**os.environ, **address, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
