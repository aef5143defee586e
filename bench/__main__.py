"""`python -m spectral_ops.bench COMMAND …`"""

import importlib
import sys

COMMANDS = {
    "train": "train a task with each method and compare",
    "steps": "time one optimizer step of each method",
    "search": "tune one method on one task",
    "costs": "count operations and bytes of every operation",
    "aot": "compile every kernel ahead of time and check it",
    "kernels": "time every operation on a GPU",
    "tune": "find the fastest tiles on a GPU",
    "gpu": "everything that needs a GPU: checks, timings, tiles",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        lines = [f"  {name:8s}{text}" for name, text in COMMANDS.items()]
        print("usage: python -m spectral_ops.bench COMMAND [options]", *lines, sep="\n", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"spectral_ops.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
