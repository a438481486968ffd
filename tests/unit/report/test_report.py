"""The report of a synthetic run: self-contained, escaped, complete, and honest about what is missing."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from moba_train.errors import DataError
from moba_train.report import build_report, summary_table
from moba_train.report.plots import MAX_POINTS, human, plot_loss, smooth, thin
from moba_train.report.run_data import load_run, series
from moba_train.report.stages import mean_rate, stage_rows, switches, until_rows
from moba_train.train.manifest import content_name

from .conftest import write_run

MakeRun = Callable[..., Path]
VOID = {"meta", "img", "br", "hr", "link"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.references += [str(found[name]) for name in ("src", "href") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> tuple[str, Checker]:
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return html, checker


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("whole")))


def test_a_stage_that_decided_where_it_ends_is_marked_with_its_rule_and_its_numbers(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for step in steps[49:350:50]:
        step |= {"until/value": 5.0 / step["step"], "until/fall": 0.01}
    steps[149]["until/decided"] = 1.0
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    config = (run_dir / "config.toml").read_text()
    rule = 'name = "short"\nuntil = { loss_plateau = 0.0, trailing_gap = 0.02, evaluations = 3 }'
    (run_dir / "config.toml").write_text(config.replace('name = "short"', rule))
    run = load_run(run_dir)
    assert [stage.decided is not None for stage in run.stages] == [True, False, False]
    assert [row[3] for row in stage_rows(run)] == ["1 to 150 (decided)", "151 to 370", "371 to 450"]
    decided, other = until_rows(run)
    assert decided[:5] == (
        *("short", "trailing_gap falls by less than 0.02 in 3 evaluations", "0.0333", "0.0100"),
        "by decision, step 150",
    )
    assert (other[0], other[4]) == ("long", "at its greatest length")
    assert [row[4] for row in until_rows(replace(run, stages=run.stages[:2]))][1] == "not yet"
    over = replace(run, stages=run.stages[:2], state={"step": 370, "stage_end": True})
    assert [row[4] for row in until_rows(over)][1] == "at its greatest length", "the last stage watches too"
    html, _ = read(build_report(run_dir))
    assert [f"What stage {stage.name} watches" in html for stage in run.stages] == [True, True, False]
    picture = plot_loss(run) or b""
    assert b'id="decided-150"' in picture and b'id="decided-370"' not in picture


def test_needles_and_state_of_a_branch_that_the_run_has_left_are_not_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    assert load_run(run_dir).niah and load_run(run_dir).state["step"] == 450
    checkpoint = run_dir / "checkpoints/step_00000450"
    checkpoint.rename(checkpoint.with_name("step_00000450.abandoned"))
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(metrics[:420]))
    run = load_run(run_dir)
    assert run.niah == () and run.state == {}
    assert any("the needle grid was not measured" in text.lower() for text in run.missing)


def test_needles_of_weights_that_were_left_are_not_shown_even_where_the_run_has_come_as_far_again(
    tmp_path: Path,
) -> None:
    run_dir = write_run(tmp_path)
    left = run_dir / "checkpoints/step_00000450.abandoned"
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    lines = [json.loads(line) | {"weights": content_name(left)} for line in (run_dir / "niah.jsonl").open()]
    own = lines[0] | {"weights": "own", "step": 400}
    (run_dir / "niah.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [own, *lines]))
    assert [record.weights for record in load_run(run_dir).niah] == ["own"]


def test_the_report_is_one_file_that_asks_nothing_of_the_network(whole: Path) -> None:
    html, checker = read(whole)
    assert whole.name == "report.html"
    assert all(ref.startswith(("data:image/svg+xml;base64,", "#")) for ref in checker.references)
    assert "<script" not in html and "url(" not in html and "@import" not in html
    assert {ref[1:] for ref in checker.references if ref.startswith("#")} <= set(checker.ids)
    assert len(html) < 4_000_000


def test_every_picture_is_an_svg_that_parses(whole: Path) -> None:
    _, checker = read(whole)
    pictures = [ref.split(",", 1)[1] for ref in checker.references if ref.startswith("data:")]
    assert len(pictures) == 13
    for picture in pictures:
        assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")


def test_every_section_is_there_and_nothing_is_reported_missing(whole: Path) -> None:
    html, checker = read(whole)
    sections = ["stages", "needle", "loss", "training", "held-out", "routing", "course", "configuration"]
    assert [name for name in checker.ids if name in sections] == sections
    assert 'id="missing"' not in html
    text = " ".join(checker.text)
    for expected in ("MoBA 16/3", "unigram baseline", "versions.torch", "2.13.0", "mesh.cp", "[[stages]]", "3.69M"):
        assert expected in text


def test_what_comes_from_the_run_is_escaped(make_run: MakeRun) -> None:
    run = make_run(steps=60, with_niah=False, stage_name='<script>alert("x")</script> & $\\frac{')
    with (run / "config.toml").open("a") as file:
        file.write("# </pre><img src=x onerror=alert(1)>\n")
    html, _ = read(build_report(run))
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;alert" in html


def test_a_run_of_one_step_says_what_is_missing(make_run: MakeRun) -> None:
    html, checker = read(build_report(make_run(steps=1, only_metrics=True)))
    text = " ".join(checker.text)
    for missing in (
        "config.toml is not",
        "no checkpoint yet",
        "needle grid was not measured",
        "No held-out evaluation",
    ):
        assert missing in text
    assert 'id="stages"' in html and 'id="needle"' not in html


def test_steps_without_a_finite_loss_are_counted_and_left_out(make_run: MakeRun) -> None:
    run = make_run(steps=40, only_metrics=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    bad = json.loads(lines[5]) | {"train/loss": None, "train/bad": True}
    evaluated = {"step": 0, "stage": "short", "stage_index": 0, "tokens": 0, "eval/loss_moba": 5.0}  # of another run
    lines = [json.dumps(evaluated), *lines[:5], json.dumps(bad), *lines[6:]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    _, checker = read(build_report(run))
    assert "1 of 41 steps have no finite loss" in " ".join(checker.text)


def test_a_run_that_is_still_writing_can_be_reported(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(steps=20, with_niah=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "sta')
    (run / "niah.jsonl").write_text('{"context_len')
    assert load_run(run).steps[-1]["step"] == 20
    out = build_report(run, tmp_path / "elsewhere" / "r.html")
    assert out == tmp_path / "elsewhere" / "r.html" and out.is_file()


@pytest.mark.parametrize("content", [None, "", "{"], ids=["no file", "empty", "one cut line"])
def test_a_folder_without_metrics_is_an_error_that_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_takes_no_report_is_named_and_nothing_is_left_there(make_run: MakeRun, tmp_path: Path) -> None:
    run, folder = make_run(), tmp_path / "folder"
    folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for place in (folder, Path("/proc/none/r.html")):
        with pytest.raises(DataError, match="the file cannot be written"):
            build_report(run, place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["nonsense", '{"stage": "a"}', "[]"])
def test_a_damaged_line_is_named(make_run: MakeRun, line: str) -> None:
    run = make_run(steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 4"):
        build_report(run)


def test_damaged_needle_records_and_settings_do_not_hide_the_rest(make_run: MakeRun) -> None:
    run = make_run(steps=20)
    (run / "niah.jsonl").write_text("damaged\n")
    (run / "config.toml").write_text("[run\n")
    _, checker = read(build_report(run))
    text = " ".join(checker.text)
    assert "niah.jsonl could not be read" in text and "config.toml could not be read" in text


def test_the_switch_shows_the_last_numbers_before_and_the_first_after(make_run: MakeRun) -> None:
    run = load_run(make_run())
    by_step = {step["step"]: step for step in run.steps}
    first, second = switches(run)
    assert (first.before.name, first.after.name, second.after.attention) == ("short", "long", "full")
    rows = {name: (before, after) for name, before, after in second.rows}
    before, after = by_step[370], by_step[400]
    assert rows["needle score under MoBA"] == (
        f"{before['eval/niah_moba']:.2f} (step 370)",
        f"{after['eval/niah_moba']:.2f} (step 400)",
    )
    losses = [by_step[step]["train/loss"] for step in range(361, 371)]
    assert rows["training loss, mean of 10 steps"][0] == f"{sum(losses) / 10:.3f}"


def test_stages_are_summed_up_by_their_own_steps(make_run: MakeRun) -> None:
    short, long, full = stage_rows(load_run(make_run()))
    assert [row[0] for row in (short, long, full)] == ["short", "long", "full"]
    assert (short[1], full[1], long[2], long[3]) == ("MoBA 16/3", "full", "2048", "151 to 370")
    assert (short[4], long[4]) == (human(150 * 8192), human(220 * 8192))
    assert full[5] == "1.000"


def test_throughput_is_tokens_by_time_and_of_a_stage_that_of_its_median_step(make_run: MakeRun) -> None:
    run = load_run(make_run())
    timed = [{"perf/step_time_s": 8192 / rate, "perf/tokens_per_s": rate} for rate in (100.0, 5000.0, 10_000.0)]
    steps = tuple(step | time for step, time in zip(run.steps, timed, strict=False))
    rate = 3 * 8192 / sum(time["perf/step_time_s"] for time in timed)
    assert mean_rate(steps) == pytest.approx(rate) and rate < 300
    assert mean_rate([{"perf/tokens_per_s": 5.0}]) is None
    (row,) = stage_rows(replace(run, steps=steps, stages=(replace(run.stages[0], steps=steps),)))
    assert row[-2:] == (human(5000.0), "200.00")


def test_the_summary_holds_losses_needle_and_the_place_of_the_report(make_run: MakeRun) -> None:
    run = make_run()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(run))
    before = console.export_text()
    assert "not written yet" in before
    (run / "report.html").touch()
    console.print(summary_table(run))
    after = console.export_text()
    assert re.search(r"short +MoBA 16/3 +2\.\d{3} +2\.\d{3}", after)
    assert re.search(r"needle in a haystack, mean: moba 0\.9\d+, full 0\.9\d+, random 0\.\d+", after)
    assert "report.html" in after and "unigram 3.050" in after


def test_long_series_are_thinned_to_means_and_smoothing_keeps_a_constant() -> None:
    x, y = thin(range(10_000), [2.0] * 10_000)
    assert len(x) == len(y) == MAX_POINTS and set(y) == {2.0} and x == sorted(x)
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert series([{"step": 1, "a": 1}, {"step": 2, "a": None}, {"step": 3, "a": float("nan")}], "a") == ([1], [1.0])


def test_a_report_needs_no_torch() -> None:
    code = "import sys, moba_train.report, moba_train.eval.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
