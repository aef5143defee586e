"""Reckon what SpectralKron's work, state and traffic are where its matrices are shared over many GPUs. Nothing is run.

python -m spectral_ops.bench sharing
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from spectral_ops.bench import output
from spectral_ops.bench.costs import RATES, spectral_kron
from spectral_ops.optim._owners import assign, cost

LIMIT = 8192  # SpectralKron's max_preconditioner_dim
INTERVALS = (1, 10)
TOKENS = 8192  # of each GPU in a step
ITEM = 2  # bytes of a number in bfloat16
NODE = 8  # GPUs
INSIDE, ACROSS = 450e9, 50e9  # bytes a second that a GPU sends and, at the same time, receives: in a node, between nodes
# Shards and replicas.
LAYOUTS = ((8, 1), (64, 1), (256, 1), (64, 4), (1024, 1), (64, 16))

Matrix = tuple[int, int]  # rows and columns


@dataclass(frozen=True)
class Network:
    """`matrices` are the hidden ones: rows, columns, how many. Embeddings and heads have `elementwise` numbers, and one token
    passes all but `idle` numbers of the matrices."""

    matrices: tuple[tuple[int, int, int], ...]
    elementwise: int
    idle: int = 0

    @property
    def each(self) -> list[Matrix]:
        return [(n, m) for n, m, count in self.matrices for _ in range(count)]

    @property
    def elements(self) -> int:
        return sum(n * m * count for n, m, count in self.matrices)


def llama(width: int, hidden: int, layers: int, vocabulary: int = 128256, kv: int = 1024) -> Network:
    attention = ((width, width, 2 * layers), (kv, width, 2 * layers))
    return Network((*attention, (hidden, width, 2 * layers), (width, hidden, layers)), 2 * vocabulary * width)


def mixture(width: int, hidden: int, layers: int, experts: int, used: int, vocabulary: int = 50257) -> Network:
    """Each expert is three matrices, of which a token passes those of `used`; the head is the embedding."""
    attention = ((width, width, 4 * layers), (experts, width, layers))
    stacks = ((hidden, width, 2 * experts * layers), (width, hidden, experts * layers))
    return Network((*attention, *stacks), vocabulary * width, 3 * hidden * width * (experts - used) * layers)


NETWORKS = {
    "GPT-2 small": Network(((768, 768, 48), (3072, 768, 12), (768, 3072, 12)), (50257 + 1024) * 768),
    "MoE 12 x 16": mixture(1024, 2048, layers=12, experts=16, used=2),
    "Llama-3-8B": llama(4096, 14336, layers=32),
    "Llama-3-70B": llama(8192, 28672, layers=80),
}


# --- One matrix ---------------------------------------------------------------------------------------------------------


def state_bytes(n: int, m: int) -> int:
    """Of SpectralKron where parameters and factors are bfloat16: momentum, bases and residuals, eigenvalues and counters."""
    squares = sum(d * d for d in (n, m) if 1 < d <= LIMIT)
    return ITEM * (n * m + 2 * squares) + 4 * (n + m + 7)


def seconds(n: int, m: int, interval: int) -> float:
    """The floor of a step of one matrix. Where only one side is dense the rest is left out."""
    if max(n, m) <= LIMIT:
        return spectral_kron(n, m, "bf16", interval)
    return sum(one_side(d, n * m // d, interval) for d in (n, m) if d <= LIMIT)


def one_side(n: int, m: int, interval: int) -> float:
    """Of an `n × m` matrix what the factor of `n` takes. It grows by the same with each column; with one there is nothing else,
    and with `n` it is half of the whole."""
    turning = spectral_kron(n, 1, "bf16", interval)
    return turning + m / n * (spectral_kron(n, n, "bf16", interval) / 2 - turning)


# --- All of them, on many ranks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends and receives in a step: gradients to their owners, updates from them."""

    gradients: tuple[float, float]
    updates: tuple[float, float]

    @property
    def sent(self) -> float:
        return self.gradients[0] + self.updates[0]

    @property
    def received(self) -> float:
        return self.gradients[1] + self.updates[1]


def traffic(owned: Sequence[int], shards: int) -> list[Traffic]:
    """Of each rank, from how many elements each owns; ranks `0 … shards − 1` are the first replica. An owner has gradients from
    the shards of its replica, and all shards of all replicas have updates from it; what a rank keeps for itself is not sent."""
    total, replicas = sum(owned), len(owned) // shards
    result = []
    for rank, own in enumerate(owned):
        first = rank - rank % shards
        beside = sum(owned[first : first + shards]) - own
        gradients = beside / shards, own * (1 - 1 / shards)
        updates = own * (replicas - 1 / shards), (total - own) / shards
        result.append(Traffic((ITEM * gradients[0], ITEM * gradients[1]), (ITEM * updates[0], ITEM * updates[1])))
    return result


def exchange_seconds(loads: Sequence[Traffic]) -> float:
    """One exchange after the other, each as long as its busiest rank sends or receives."""
    rate = INSIDE if len(loads) <= NODE else ACROSS
    return sum(max(max(one) for one in phase) for phase in zip(*((x.gradients, x.updates) for x in loads), strict=True)) / rate


@dataclass(frozen=True)
class Plan:
    """`balance`: the largest rank's cost over the mean. `state`: bytes of each rank. `step`: seconds of the rank that computes
    longest, by interval. `training`: of forward and backward."""

    balance: float
    state: list[float]
    loads: list[Traffic]
    step: list[float]
    training: float


def plan(network: Network, shards: int, replicas: int) -> Plan:
    ranks, each = shards * replicas, network.each
    costs = [cost(dims, LIMIT) for dims in each]
    mine: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for dims, amount, owner in zip(each, costs, assign(costs, ranks), strict=True):
        mine[owner].append(dims)
        work[owner] += amount
    rest = 2 * ITEM * network.elementwise / shards  # both moments of AdamW
    sizes = {dims: state_bytes(*dims) for dims in set(each)}
    times = {dims: [seconds(*dims, interval) for interval in INTERVALS] for dims in sizes}
    return Plan(
        balance=max(work) * ranks / sum(work),
        state=[rest + sum(sizes[dims] for dims in own) for own in mine],
        loads=traffic([sum(map(math.prod, own)) for own in mine], shards),
        step=[max(sum(times[dims][i] for dims in own) for own in mine) for i in range(len(INTERVALS))],
        training=6 * (network.elements - network.idle) * TOKENS / RATES["bf16"],
    )


HEADER = ["network", "shards", "replicas", "ranks", "balance", "weights GB", "state GB", "most", "MB sent", "most"]
HEADER += ["received, most", "step ms", *(f"interval {k}" for k in INTERVALS[1:]), "exchange ms", "training ms"]
LEGEND = f"""Nothing here is measured: it is arithmetic, and a GPU takes longer. Parameters, gradients and factors in bf16.
balance: largest rank's cost, by which matrices are assigned, over the mean; with more ranks than matrices some have none.
weights GB: parameters and gradients of a rank. state GB: of the optimizer, AdamW's for embeddings and heads included, mean and
most. Norms, biases and the buffers of the exchange are left out. MB sent, received: by a rank in a step, mean (the same for
both) and most; shards are even, of experts too. A gradient goes to its owner from the shards of one replica, an update to those
of all. step ms: floor on an H200 of the rank that computes longest, as in `bench model`, at an update_interval of
{" and ".join(map(str, INTERVALS))} (mean); sides over {LIMIT} are diagonal, and of such a matrix only what the other side takes
is counted. exchange ms: the busiest rank's, nothing overlapped, at {INSIDE / 1e9:.0f} GB/s a GPU each way on one node
of {NODE} GPUs and {ACROSS / 1e9:.0f} GB/s on more, both assumed. training ms: forward and backward of {TOKENS:,} tokens
on each GPU, 6 operations for each number of these matrices that a token passes, at {RATES["bf16"] / 1e12:.0f} TFLOP/s.
FSDP's own traffic is in no column. MoE: 12 layers of 16 experts, of which a token passes 2."""


def row(name: str, shards: int, replicas: int) -> list[str]:
    network, ranks = NETWORKS[name], shards * replicas
    p = plan(network, shards, replicas)
    weights = 2 * ITEM * (network.elements + network.elementwise) / shards
    sent, received = [x.sent for x in p.loads], [x.received for x in p.loads]
    cells = [name, str(shards), str(replicas), f"{ranks:,}", f"{p.balance:.2f}"]
    cells += [f"{x / 1e9:.3f}" for x in (weights, sum(p.state) / ranks, max(p.state))]
    cells += [f"{x / 1e6:,.1f}" for x in (sum(sent) / ranks, max(sent), max(received))]
    return cells + [f"{1e3 * x:.2f}" for x in (*p.step, exchange_seconds(p.loads), p.training)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench sharing", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    print(output.table([HEADER, *(row(name, *layout) for name in NETWORKS for layout in LAYOUTS)]))
    print(LEGEND)
