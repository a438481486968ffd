"""The heatmap's pixels: colours, directions, and that any name can stand in it; the table's words."""

from __future__ import annotations

import dataclasses
import io

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from moba_train.errors import DataError
from moba_train.eval.cells import NiahRecord, summarise
from moba_train.eval.heatmap import SCORE_COLOURS, format_length, format_share, render_niah
from moba_train.eval.table import niah_rows, print_niah_table

from .test_cells import RECORD


def grid(scores: dict[tuple[int, float], float], **changes: object) -> list[NiahRecord]:
    return [
        dataclasses.replace(RECORD, context_length=length, depth_percent=depth, score=score, **changes)  # type: ignore[arg-type]
        for (length, depth), score in scores.items()
    ]


def colour_places(png: bytes, colour: str) -> tuple[float, float]:
    """Mean (x, y) of the pixels of one colour as shares of the picture, without the colour bar at the right."""
    image = matplotlib.image.imread(io.BytesIO(png))[:, :, :3]
    hits = np.argwhere(np.abs(image[:, : int(0.72 * image.shape[1])] - to_rgb(colour)).max(axis=-1) < 0.004)
    assert len(hits) > 500, f"{colour} is not in the picture"
    return float(hits[:, 1].mean() / image.shape[1]), float(hits[:, 0].mean() / image.shape[0])


def test_score_0_is_red_1_is_green_depth_0_is_at_the_top_and_longer_is_to_the_right() -> None:
    records = grid({(256, 0.0): 0.0, (256, 100.0): 1.0, (512, 0.0): 1.0, (512, 100.0): 1.0})
    png = render_niah(summarise(records), title="t", kind="png")
    red_x, red_y = colour_places(png, SCORE_COLOURS[0])
    green_x, green_y = colour_places(png, SCORE_COLOURS[2])
    assert red_x < green_x and red_y < green_y


def test_half_a_score_has_the_middle_colour() -> None:
    records = [*grid({(256, 0.0): 1.0, (512, 0.0): 1.0}), *grid({(256, 0.0): 0.0, (512, 0.0): 0.0}, sample=1)]
    colour_places(render_niah(summarise(records), title="t", kind="png"), SCORE_COLOURS[1])


def test_dense_cells_are_hatched_and_others_are_not() -> None:
    plain = summarise(grid({(256, 0.0): 1.0, (512, 0.0): 1.0}))
    hatched = tuple(dataclasses.replace(cell, dense=cell.context_length == 256) for cell in plain)
    pictures = [render_niah(cells, title="t", kind="svg") for cells in (plain, hatched)]
    assert b"<pattern" not in pictures[0] and b"<pattern" in pictures[1]


@pytest.mark.parametrize("title", ["stage $x^2, 100% & <b>", "$\\frac{", "_a_ {0}"])
def test_any_name_can_stand_in_the_title(title: str) -> None:
    assert render_niah(summarise([RECORD]), title=title, kind="png").startswith(b"\x89PNG")


def test_the_same_cells_give_the_same_bytes() -> None:
    cells = summarise(grid({(256, 0.0): 1.0, (512, 0.0): 0.0}))
    assert render_niah(cells, title="t", kind="svg") == render_niah(cells, title="t", kind="svg")


def test_no_cells_are_an_error() -> None:
    with pytest.raises(DataError, match="no needle scores"):
        render_niah((), title="t", kind="png")


def test_lengths_and_shares_are_written_for_people() -> None:
    assert [format_length(n) for n in (256, 1024, 1000, 131072, 1 << 20)] == ["256", "1K", "1000", "128K", "1M"]
    assert [format_share(share) for share in (0.0, 0.004, 0.256, 1.0)] == ["0%", "0.4%", "26%", "100%"]


def test_the_table_has_a_row_per_attention_and_length_and_fits_80_columns() -> None:
    records = [
        *grid({(256, 0.0): 1.0, (256, 100.0): 0.0}, dense=True),
        *grid({(1024, 50.0): 1.0}),
        *grid({(1024, 50.0): 1.0}, attention="full", routed=None, routed_expected=None),
    ]
    rows = niah_rows(records)
    assert [row[:3] for row in rows] == [("MoBA", "256", "0.500"), ("MoBA", "1024", "1.000"), ("full", "1024", "1.000")]
    assert rows[0][4] == "0.00 at 100%"
    assert [row[6:] for row in rows] == [("dense", "dense"), ("50%", "25%"), ("-", "-")]
    out = io.StringIO()
    print_niah_table(records, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue() and "\x1b" not in out.getvalue()
    assert "mean over cells, MoBA: 0.667" in lines
