"""What several tests of training share."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest


def run_as_two_ranks(function, *arguments) -> None:
    """Call `function(*arguments)` in two forked processes that know each other, as torchrun would; none may fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        function(*arguments)

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.fixture
def as_two_ranks():
    """as_two_ranks(function, *arguments): the function in two processes of one process group."""
    return run_as_two_ranks
