"""What the report says about each kind of result: blocks of Markdown, between which there are blank lines."""

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence

from spectral_ops.bench import costs, curves
from spectral_ops.bench.cases import CASES, OPERANDS
from spectral_ops.bench.guard import Row, is_ours, marked, other_run, passed, ratio
from spectral_ops.bench.training import Curve

OTHERS = {"eager": "eager PyTorch", "compiled": "torch.compile", "cublas": "cuBLAS"}  # providers
PEERS = ("SOAP", "Muon", "AdamW")
SWEEPS = {"width": "width", "depth": "layers"}  # settings in which a column varies
MODEL_SIZE, MODEL_BATCH = 1024, 16

Blocks = Iterator[str]


# --- Text ---------------------------------------------------------------------------------------------------------------


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table, the first row its header."""
    header, *body = [[" ".join(cell.split()).replace("|", "\\|") or "–" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def number(x: float | str) -> str:
    """Three digits; words stay as they are."""
    if isinstance(x, str):
        return x
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def distinct(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """What stands in these columns, in the order in which it first does."""
    return list(dict.fromkeys(tuple(row.get(column) or "" for column in columns) for row in rows))


def matching(rows: Iterable[Row], **values: str) -> list[Row]:
    return [row for row in rows if all(row.get(column) == value for column, value in values.items())]


# --- Kernels ------------------------------------------------------------------------------------------------------------


def kernels(rows: list[Row]) -> Blocks:
    if not rows:
        return
    models = [model for (model,) in distinct(rows, "model")]
    others = ", ".join(OTHERS[name] for name in _providers(rows))
    yield f"""Times as fast as {others}, in this order: geometric means over the shapes of a model.
Roof: share of what the machine reached in a plain product or copy, lowest to highest."""
    table = [["operation", "operands", *models, "roof"]]
    for op, operands in distinct(rows, "op", "operands"):
        group = matching(rows, op=op, operands=operands)
        cells = [speedups(matching(group, model=model)) for model in models]
        shares = sorted(float(row["roof"]) for row in group if is_ours(row) and passed(row) and row["roof"])
        roof = f"{shares[0]:.2f} – {shares[-1]:.2f}" if shares else ""
        table.append([marked(op, *group), operands, *cells, roof])
    yield markdown(table)
    roofs = [[operands, number(float(f)), number(float(b))] for operands, f, b in _roofs(rows)]
    yield markdown([["measured roof", "TFLOP/s", "GB/s"], *roofs])


def _providers(rows: list[Row]) -> list[str]:
    return [name for name in OTHERS if matching(rows, provider=name)]


def _roofs(rows: list[Row]) -> list[tuple[str, ...]]:
    found = distinct(rows, "operands", "roof_tflops", "roof_gb_per_s")
    return [roof for roof in found if all(roof)]


def speedups(rows: list[Row]) -> str:
    """Of our kernels of one operation against each other provider, over all shapes; refused if any shape is."""
    cells = []
    for name in _providers(rows):
        pairs = []
        for ours in filter(is_ours, rows):
            shape = {column: ours[column] for column in ("n", "m", "batch")}
            pairs += [ratio(other, ours, "p50_us") for other in matching(rows, provider=name, **shape)]
        refused = [x for x in pairs if isinstance(x, str)]
        if pairs:
            cells.append(refused[0] if refused else number(statistics.geometric_mean(map(float, pairs))))
    return cells[0] if len(set(cells)) == 1 and cells[0].startswith("refused") else " / ".join(cells)


def kernel_model() -> Blocks:
    yield f"""Kernels as a share of the plain PyTorch composition, and their floor on an H200: {MODEL_BATCH} matrices of
n = m = {MODEL_SIZE} in bf16, or in float32 what is never bf16 (`python -m spectral_ops.bench model`)."""
    table = [["operation", "operations", "bytes", "floor, us"]]
    for case in CASES.values():
        kind = "bf16" if "bf16" in case.operands else "fp32"
        shape = (MODEL_SIZE, MODEL_SIZE, MODEL_BATCH, OPERANDS[kind])
        work, eager = case.work(*shape), costs.eager_work(case, *shape)
        flops = f"{work.flops / eager.flops:.2f}" if eager.flops else ""
        table.append([case.name, flops, f"{work.bytes / eager.bytes:.2f}", number(1e6 * costs.floor(work, kind))])
    yield markdown(table)


# --- Optimizer steps ----------------------------------------------------------------------------------------------------


def steps(rows: list[Row]) -> Blocks:
    settings = settings_of(rows)
    if settings:
        yield """ms: median (20th to 80th percentile). vs: time as a multiple of that peer's, its fastest implementation.
share: of a training step with forward and backward pass."""
    for setting in settings:
        yield f"#### {setting}"
        table = [["optimizer", "package", "ms", *(f"vs {peer}" for peer in PEERS), "state bytes/param", "share"]]
        group = matching(rows, setting=setting)
        for row in sorted(group, key=lambda row: not is_ours(row)):
            p20, p50, p80 = (float(row[name]) for name in ("p20_ms", "p50_ms", "p80_ms"))
            ms = f"{number(p50)} ({number(p20)} – {number(p80)})"
            state = float(row["state_bytes"]) / float(row["parameters"])
            share = f"{p50 / (p50 + float(row['model_ms'])):.1%}" if row.get("model_ms") else ""
            versus = [against(row, peer, group) for peer in PEERS]
            table.append([marked(row["optimizer"], row), row["package"], ms, *versus, f"{state:.1f}", share])
        yield markdown(table)


def settings_of(rows: list[Row]) -> list[str]:
    return [setting for (setting,) in distinct(rows, "setting") if setting not in SWEEPS]


def against(row: Row, peer: str, group: list[Row]) -> str:
    """A step's time as a multiple of that of a peer's fastest implementation, one of the same run if there is one."""
    name = re.compile(rf"{peer}( \(.*\))?(, compiled)?")  # not with options
    peers = [other for other in group if name.fullmatch(other["optimizer"]) and not is_ours(other)]
    fastest = min(peers, key=lambda other: (bool(other_run(row, other)), float(other["p50_ms"])), default=None)
    return number(ratio(row, fastest, "p50_ms")) if fastest else ""


def scaling(rows: list[Row]) -> Blocks:
    for sweep, column in SWEEPS.items():
        group = matching(rows, setting=sweep)
        sizes = sorted(distinct(group, column, "parameters"), key=lambda size: float(size[0]))
        if not group:
            continue
        table = [[f"ms at {column} (parameters)", "package", *(f"{x} ({float(count) / 1e6:.2f} M)" for x, count in sizes)]]
        for optimizer, package in distinct(group, "optimizer", "package"):
            mine = matching(group, optimizer=optimizer, package=package)
            times = {row[column]: number(float(row["p50_ms"])) for row in mine}
            table.append([marked(optimizer, *mine), package, *(times.get(x, "") for x, _ in sizes)])
        yield markdown(table)


def step_ratios(rows: list[Row]) -> str:
    """Of our steps, a row each, against the peers in each setting."""
    settings = settings_of(rows)
    table = [["vs " + ", ".join(PEERS), *settings]]
    for (optimizer,) in distinct(filter(is_ours, rows), "optimizer"):
        mine = [row for row in matching(rows, optimizer=optimizer) if is_ours(row) and row["setting"] in settings]
        cells = {row["setting"]: [against(row, peer, matching(rows, setting=row["setting"])) for peer in PEERS] for row in mine}
        table.append([marked(optimizer, *mine), *(_joined(cells.get(setting, [])) for setting in settings)])
    return markdown(table)


def _joined(cells: list[str]) -> str:
    """Cells in one, a common refusal once."""
    given = list(dict.fromkeys(filter(None, cells)))
    if len(given) == 1 and given[0].startswith("refused"):
        return given[0]
    return ", ".join(cell or "–" for cell in cells)


def step_model() -> Blocks:
    header, *rows = costs.step_table()
    yield "Floors of one step of all hidden matrices on an H200 (`python -m spectral_ops.bench model` says what they count)."
    yield markdown([header, *rows])


# --- Training -----------------------------------------------------------------------------------------------------------


def training(rows: list[Row]) -> Blocks:
    """Means over seeds: final loss, seconds, and what it takes to get to each peer's final loss."""
    runs = [(curves.curve(group), group[-1]) for group in curves.runs(rows)]
    methods = {method: [run for run in runs if run[0].method == method] for (method,) in distinct(rows, "method")}
    peers = {name: {c.seed: (c, row) for c, row in methods[name]} for name in reversed(curves.BASELINES) if name in methods}
    table = [["method", "seeds", "loss", "seconds"]]
    table[0] += [f"{what} to {name}'s loss" for what in ("steps", "seconds") for name in peers]
    for method, mine in methods.items():
        loss, seconds = curves.mean([c.loss[-1] for c, _ in mine], ".3f"), curves.mean([c.seconds[-1] for c, _ in mine], ".1f")
        shares = [shares_of(mine, by_seed) for by_seed in peers.values()]
        label = marked(method, *(row for _, row in mine))
        table.append([label, str(len(mine)), loss, seconds, *(pair[i] for i in range(2) for pair in shares)])
    yield markdown(table)


def shares_of(mine: list[tuple[Curve, Row]], peers: dict[int, tuple[Curve, Row]]) -> tuple[str, str]:
    """Steps and seconds to the peer's final loss from the same seed, as shares of its own; refused across runs."""
    pairs = [(run, peers[run[0].seed]) for run in mine if run[0].seed in peers]
    for (_, row), (_, other) in pairs:
        if why := other_run(row, other):
            return f"refused: {why}", f"refused: {why}"
    reached = [(c.reach(peer.loss[-1]), peer) for (c, _), (peer, _) in pairs]
    steps = [at and at[0] / peer.steps[-1] for at, peer in reached]
    seconds = [at and at[1] / peer.seconds[-1] for at, peer in reached]
    return curves.mean(steps, ".3f"), curves.mean(seconds, ".3f")
