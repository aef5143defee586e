"""`python -m spectral_ops.bench COMMAND …`"""

import importlib
import sys

COMMANDS = {
    "train": "train a task with each method and compare",
    "steps": "time one optimizer step of each method, its state and its correctness",
    "layers": "time SINGD against the package singd",
    "soak": "run many steps in bfloat16 beside float32 and check every limit",
    "faults": "run every optimizer through every fault",
    "search": "tune one method on one task",
    "quadratic": "minimise a badly conditioned quadratic in float32 and float64",
    "papers": "reproduce the experiments of the spectral paper",
    "model": "print operations, bytes and the least time of every operation",
    "sharing": "reckon work, state and bytes where many GPUs share the matrices",
    "structures": "draw each structure of SINGD's factors",
    "report": "write RESULTS.md, its plots and the README's table",
    "single-file": "write SpectralKron as one file that needs torch alone",
    "aot": "compile every kernel ahead of time and check it",
    "kernels": "time every operation against plain and compiled PyTorch",
    "tune": "find the fastest tiles on a GPU",
    "gpu": "everything that needs a GPU: checks, timings, tiles",
    "newcomer": "time the way from a clone to the first training curve",
}
MODULES = {"model": "costs", "single-file": "single_file"}  # model.py is the transformer that is trained


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:12s}{text}" for name, text in COMMANDS.items()]
        print("usage: python -m spectral_ops.bench COMMAND [options]", *lines, sep="\n", file=sys.stderr)
        raise SystemExit(2)
    try:
        importlib.import_module(f"spectral_ops.bench.{MODULES.get(argv[0], argv[0])}").main(argv[1:])
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "spectral_ops":
            raise
        source = package if package == "triton" else "'spectral-ops[bench]'"  # a dependency, but not on every system
        raise SystemExit(f"{argv[0]}: {package} is not installed (pip install {source})") from None


if __name__ == "__main__":
    main(sys.argv[1:])
