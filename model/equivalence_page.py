"""`check --report`: the comparison as a page, with pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from torch import Tensor

from model.chart import Line, line_chart, strip_chart
from model.equivalence_band import Band
from model.equivalence_bisect import HEADER as SWAPS
from model.equivalence_bisect import Bisection
from model.equivalence_report import HEADER, cells, nearest, sentence
from model.equivalence_rule import FACTOR, GRADIENT_FACTOR, LEVELS, Row
from model.equivalence_run import Result
from model.equivalence_sites import OPERATORS
from model.page import facts, figure, folded, heading, page, paragraph, pictures, table, verdict

MEANING = {
    "operator": "operators: each call alone, on the inputs that it gets in this model",
    "block": "blocks: each alone, on its input in the reference",
    "logits": "the whole model: logits",
    "loss": "the whole model: loss",
    "gradient": "the whole model: the gradient of every parameter",
    "step": "one optimizer step",
    "training": "training",
    "tokens": "text, the likeliest token each time",
}
RULE = (
    f"The rule: an error against float64 may be at most {FACTOR:g} times (in gradients {GRADIENT_FACTOR:g} times) that of plain "
    "PyTorch in the same dtype, plus one unit in the last place of the largest value; and a second run must give the same "
    "bits. Ulp is the median distance of an element from float64 in units of its last place."
)


def check_page(title: str, result: Result, about: Sequence[tuple[str, str]], found: Bisection | None) -> str:
    """The whole page."""
    parts = [f"<h1>{escape(title)}</h1>", verdict(result.passed, sentence(result.rows)), facts(about)]
    return page(title, [*parts, *check_parts(result, found)])


def check_parts(result: Result, found: Bisection | None = None) -> list[str]:
    """Pictures, then the table; what bisect found between them."""
    figures = [
        layers_figure("Error of each block's output", "output", result.rows),
        layers_figure("Error of the gradient through each block", "input", result.rows),
        operators_figure(result.rows),
    ]
    if result.band:
        figures.append(band_figure(result.band))
    parts = [pictures(figures)]
    if found:
        parts += [heading("Where do they part?"), paragraph(found.sentence()), table(SWAPS, [("", found.cells())], 2)]
    return [*parts, heading("Every level"), paragraph(RULE), *tables(result.rows)]


def layers_figure(title: str, part: str, rows: Sequence[Row]) -> str:
    """Errors of the blocks in their order: ours, plain PyTorch's, and the limit."""
    of_part = [row for row in rows if row.level == "block" and row.quantity.endswith(part)]
    lines = [
        Line(kind, [(float(i), value(row)) for i, row in enumerate(of_part)], dots=kind != "limit")
        for kind, value in (
            ("limit", lambda row: row.allowed),
            ("plain", lambda row: row.reference_error),
            ("ours", lambda row: row.error),
        )
    ]
    names = [(float(i), str(i)) for i in range(0, len(of_part), max(len(of_part) // 8, 1))]
    svg = line_chart(title, lines, "block", "largest error", log=True, x_labels=names)
    keys = (("ours", "ours"), ("plain", "plain PyTorch"), ("limit", "allowed"))
    return figure(title, svg, keys, "Against float64; each block alone, on its input in the reference model.")


def operators_figure(rows: Sequence[Row]) -> str:
    """Our error over plain PyTorch's: a dot for every result of every call."""
    ratios: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for row in rows:
        if row.level == "operator" and (row.reference_error or not row.passed):
            ratios[row.quantity.partition(":")[0].split()[1]].append(row.ratio)
    title = "Our error over plain PyTorch's, for each operator"
    limits = ((1.0, "equal"), (FACTOR, "limit"), (GRADIENT_FACTOR, "gradients"))
    svg = strip_chart(
        title, [(short(name), values) for name, values in ratios.items()], limits, "ratio of the largest errors"
    )
    text = "A dot is an output or a gradient of one call. Left of 1, ours is nearer to float64 than plain PyTorch."
    return figure(title, svg, (), text)


def short(operator: str) -> str:
    """An operator's name that fits beside a picture."""
    return operator.removesuffix("_packed").replace("linear_cross_entropy", "cross_entropy").replace("_", " ")


def band_figure(band: Band) -> str:
    """How far each training run's loss lies from float64's, and the band."""
    unit = 10.0 ** math.floor(math.log10(max(float(band.half_width.max()), 1e-300)))

    def points(values: Tensor) -> list[tuple[float, float]]:
        return [(step + 1.0, value / unit) for step, value in enumerate(values.tolist())]

    ours = points(band.ours - band.exact)
    lines = [Line("faint", points(run)) for run in band.references[1:]]
    lines += [Line("plain", points(band.references[0])), Line("ours", ours)]
    edges = [(step, -width, width) for step, width in points(band.half_width)]
    title = "Is this drift normal? Training losses beside float64's"
    # A run that has left the band is drawn as far as the picture goes: it must not press the band to a line.
    top = 3 * max(width for _, _, width in edges)
    lines = [Line(line.kind, [(x, max(-top, min(top, y))) for x, y in line.points]) for line in lines]
    svg = line_chart(title, lines, "step", f"distance, {unit:.0e}", band=edges)
    keys = (("ours", "ours"), ("plain", "plain PyTorch"), ("other", "nudged by one ulp"), ("band", "band"))
    return figure(title, svg, keys, band.sentence().removeprefix("Is this drift normal? "))


def tables(rows: Sequence[Row]) -> list[str]:
    """Of each level the rows that failed and the nearest to their limits; and, folded, every row."""
    header = HEADER[1:]

    def groups(choose: Callable[[list[Row]], list[Row]]) -> list[tuple[str, list[tuple[str, ...]]]]:
        of_level = {level: [row for row in rows if row.level == level] for level in LEVELS}
        return [
            (MEANING[level], [cells(row, "")[1:] for row in choose(some)]) for level, some in of_level.items() if some
        ]

    shown, everything = groups(nearest), groups(list)
    if sum(len(some) for _, some in shown) == len(rows):
        return [table(header, everything)]
    return [
        paragraph("Of each level the rows nearest to their limits; all of them are below.", "soft"),
        table(header, shown),
        folded(f"All {len(rows)} rows", table(header, everything)),
    ]
