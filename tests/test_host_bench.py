"""The benchmarks of host-side costs run, once each and untimed."""

import subprocess
import sys
from pathlib import Path


def test_host_benchmarks_run():
    options = ["bench", "--benchmark-disable", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
