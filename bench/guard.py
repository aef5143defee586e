"""Which ratios may be given: of two rows of one file, from one run, in which our result was found correct."""

from spectral_ops.bench import output

OURS = ("ours", "spectral_ops")  # as provider of an operation, as package of an optimizer
MARK = "†"
FOOTNOTE = f"{MARK} measured with older code"

Row = dict[str, str]


def is_ours(row: Row) -> bool:
    return row.get("provider", row.get("package")) in OURS


def older(row: Row) -> bool:
    return row.get("code") != output.code()


def marked(text: str, *rows: Row) -> str:
    return f"{text} {MARK}" if any(map(older, rows)) else text


def passed(row: Row) -> bool:
    """Whether a result of ours was found correct in its run."""
    return row.get("gate") == "passed"


def ratio(above: Row, below: Row, column: str) -> float | str:
    """Of a column of two rows; in words, why there is none."""
    why = next(filter(None, [*map(_unchecked, (above, below)), other_run(above, below)]), "")
    return f"refused: {why}" if why else float(above[column]) / float(below[column])


def _unchecked(row: Row) -> str:
    """What is missing for trust in a row of ours."""
    if not is_ours(row):
        return ""
    if not passed(row):
        return f"gate {row.get('gate') or 'missing'}"
    missing = [name for name in ("hardware", "date", "code") if not row.get(name)]
    return f"unknown {', '.join(missing)}" if missing else ""


def other_run(a: Row, b: Row) -> str:
    """What shows that two rows are not from the same run; empty where nothing does."""
    differ = [name for name in output.PROVENANCE if a.get(name) != b.get(name)]
    return f"other {', '.join(differ)}" if differ else ""
