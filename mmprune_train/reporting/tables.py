"""Plain fixed-width tables: the same text on a terminal, in a log file and in a bug report."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: object) -> str:
    """A number short enough to read, anything else as it is; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        small = value != 0 and abs(value) < 1e-3
        return f"{value:.1e}" if small else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return str(value)


def table(rows: Sequence[Sequence[object]], header: Sequence[str], title: str = "") -> str:
    """Columns as wide as their widest cell; numbers to the right, text to the left."""
    texts = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    columns = list(zip(*rows, strict=True)) or [("",)] * len(header)
    numeric = [all(v is None or isinstance(v, int | float) for v in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*([title] if title else []), line(header), rule, *map(line, texts)])
