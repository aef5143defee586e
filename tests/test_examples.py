"""The example of many processes: it learns, resumes to the bit, and ends where a process is lost."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp2.py"
SECONDS = 60  # of a run that nothing happens to
MARGIN = 15  # seconds, for a process to end


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _rank(environment: dict[str, str], arguments: tuple[str, ...], output: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = [str(EXAMPLE), "--preset", "tiny", *arguments]
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def start(folder: Path, *arguments: str, ranks: int = 2) -> list[ForkProcess]:
    """The script in so many processes, each with a file for what it writes."""
    runpy.run_path(str(EXAMPLE))  # imports what it needs, and processes forked here need not
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        processes.append(ForkProcess(target=_rank, args=(environment, arguments, folder / f"{rank}.txt")))
        processes[-1].start()
    return processes


def losses(printed: str) -> dict[int, str]:
    """By step, in all digits."""
    return {int(step): loss for step, loss in re.findall(r"^step (\d+)  loss (\S+)$", printed, re.M)}


def run(folder: Path, *arguments: str, ranks: int = 2) -> dict[int, str]:
    processes = start(folder, "--timeout", str(SECONDS), *arguments, ranks=ranks)
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    for rank, process in enumerate(processes):
        assert process.exitcode == 0, (folder / f"{rank}.txt").read_text()
    return losses((folder / "0.txt").read_text())


def launch(*arguments: str) -> dict[int, str]:
    """By torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()]
    command = [*launcher, str(EXAMPLE), "--preset", "tiny", "--timeout", str(SECONDS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def test_it_learns_and_resumes(tmp_path: Path) -> None:
    whole = run(tmp_path, "--steps", "12")
    assert float(whole[1]) > 5.4 and float(whole[12]) < 3.5
    checkpoint = "--checkpoint", str(tmp_path / "checkpoint")
    first = run(tmp_path, "--steps", "7", *checkpoint)
    second = launch("--steps", "12", *checkpoint, "--resume")
    assert min(second) == 8 and first | second == whole


def test_replicas_learn_the_same(tmp_path: Path) -> None:
    sharded, replicated = run(tmp_path, "--steps", "6"), run(tmp_path, "--steps", "6", "--replicas", "2", ranks=4)
    assert len(replicated) == 6
    assert [float(x) for x in replicated.values()] == pytest.approx([float(x) for x in sharded.values()], abs=2e-3)


@pytest.mark.parametrize("lost, timeout", [(signal.SIGKILL, 20), (signal.SIGSTOP, 6)])
def test_a_lost_rank_ends_the_others(lost: signal.Signals, timeout: int, tmp_path: Path) -> None:
    """Dead, its connections break; stopped, they do not, and only the time tells."""
    output, end = tmp_path / "0.txt", time.monotonic() + SECONDS
    ranks = start(tmp_path, "--steps", "100000", "--timeout", str(timeout))
    try:
        while not (output.exists() and losses(output.read_text())):
            assert ranks[0].is_alive() and time.monotonic() < end
            time.sleep(0.05)
        assert ranks[1].pid is not None
        os.kill(ranks[1].pid, lost)
        ranks[0].join(timeout + MARGIN)
        assert ranks[0].exitcode not in (0, None) and "Error" in output.read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
