"""What the report says about exchanges between context-parallel ranks: predicted next to measured, stage by stage."""

from __future__ import annotations

from moba_train.model.transport_plan import format_bytes, format_seconds
from moba_train.report import page
from moba_train.report.run_data import RunData, StageSpan, mean_number

_PHASE, _PREDICTED = "comm/received_bytes/", "comm/predicted_bytes/"


def communication(run: RunData) -> list[str]:
    """The tables of the section; none when no row was shared by several ranks."""
    stages = [stage for stage in run.stages if mean_number(stage.steps, "comm/received_bytes") is not None]
    if not stages:
        return []
    note = (
        "Bytes of a step, mean over the steps of the stage, of the context-parallel rank that receives (sends) most: "
        "all its layers, forward, recompute and backward. Predicted: what the cost model expected of uniform routing; "
        "transports whose traffic follows from shapes meet it exactly, and pull and route_queries only as far as "
        "routing is uniform and documents are as long as those of the stage's first rows. Exposed: what the cost model "
        "expected attention's exchanges to cost, with host reads of sizes and what hidden exchanges take from "
        "computing; waited: how long computing stood still on the rank that waited longest, for ranks that were behind "
        "and for the key convolution's exchanges, too (on a GPU: log steps)."
    )
    amounts = ("predicted", "received", "received / predicted", "sent", "exposed", "waited")
    header = ("stage", "MoBA layers", "full layers", *amounts)
    phases = ("stage", "phase", "predicted", "received")
    return [
        page.paragraph(note),
        page.table(header, [_stage_row(stage) for stage in stages], text_columns=3),
        page.table(phases, [row for stage in stages for row in _phase_rows(stage)], text_columns=2),
    ]


def _stage_row(stage: StageSpan) -> tuple[str, ...]:
    names = [str(stage.steps[-1].get(f"comm/transport_{kind}", "-")) for kind in ("moba", "full")]
    predicted, received, sent = (
        mean_number(stage.steps, f"comm/{name}_bytes") or 0.0 for name in ("predicted", "received", "sent")
    )
    share = f"{received / predicted:.3f}" if predicted else "-"
    seconds = (mean_number(stage.steps, name) for name in ("comm/predicted_exposed_s", "perf/comm_waited_s"))
    times = ("-" if mean_s is None else format_seconds(mean_s) for mean_s in seconds)
    return (stage.name, *names, format_bytes(predicted), format_bytes(received), share, format_bytes(sent), *times)


def _phase_rows(stage: StageSpan) -> list[tuple[str, ...]]:
    names = sorted({key.removeprefix(_PHASE) for step in stage.steps for key in step if key.startswith(_PHASE)})

    def mean(key: str) -> str:
        return format_bytes(mean_number(stage.steps, key) or 0.0)

    return [(stage.name, phase, mean(_PREDICTED + phase), mean(_PHASE + phase)) for phase in names]
