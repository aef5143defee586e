"""The example of many processes: it learns, resumes to the bit, and ends where a process is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp2.py"
MARGIN = 15  # seconds, for a process to start and to end


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*arguments: str, ranks: int = 2) -> dict[int, str]:
    """The losses that it prints, by step, in all digits."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port", free_port()]
    command = [*launcher, str(EXAMPLE), "--preset", "tiny", "--timeout", "60", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {int(step): loss for step, loss in re.findall(r"^step (\d+)  loss (\S+)$", done.stdout, re.M)}


def test_it_learns_and_resumes(tmp_path: Path) -> None:
    whole = run("--steps", "12")
    assert float(whole[1]) > 5.4 and float(whole[12]) < 3.5
    first = run("--steps", "7", "--checkpoint", str(tmp_path))
    second = run("--steps", "12", "--checkpoint", str(tmp_path), "--resume")
    assert min(second) == 8 and first | second == whole


def test_replicas_learn_the_same() -> None:
    sharded, replicated = run("--steps", "8"), run("--steps", "8", "--replicas", "2", ranks=4)
    assert len(replicated) == 8
    assert [float(x) for x in replicated.values()] == pytest.approx([float(x) for x in sharded.values()], abs=2e-3)


@pytest.mark.parametrize("lost, timeout", [(signal.SIGKILL, 20), (signal.SIGSTOP, 8)])
def test_a_lost_rank_ends_the_others(lost: signal.Signals, timeout: int) -> None:
    """Dead, its connections break; stopped, they do not, and only the time tells."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    command = [sys.executable, str(EXAMPLE), "--preset", "tiny", "--steps", "100000", "--timeout", str(timeout)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout is not None
        assert any(line.startswith("step ") for line in ranks[0].stdout)
        ranks[1].send_signal(lost)
        start = time.monotonic()
        _, error = ranks[0].communicate(timeout=timeout + MARGIN)
        assert ranks[0].returncode not in (0, None) and "Error" in error
        assert time.monotonic() - start < timeout + MARGIN
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
