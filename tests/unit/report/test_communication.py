"""The report shows predicted bytes next to measured ones, and nothing where no row was shared by ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from moba_train.report.communication import communication
from moba_train.report.run_data import load_run


def test_predicted_bytes_stand_beside_measured_ones(make_run: Callable[..., Path]) -> None:
    run = make_run()
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["stage"] == "long":
            line |= {
                "comm/sent_bytes": 4.1e6,
                "comm/received_bytes": 5e6,
                "comm/predicted_bytes": 4e6,
                "comm/predicted_bytes/forward/kv": 3e6,
                "comm/received_bytes/forward/kv": 3.5e6,
                "comm/received_bytes/backward/dkv": 1.5e6,
                "comm/transport_moba": "pull",
                "comm/predicted_exposed_s": 0.0123,
                **({"perf/comm_waited_s": 1.5} if line["step"] % 2 else {}),
            }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = "".join(communication(load_run(run)))
    cells = ("long", "pull", "-", "4 MB", "5 MB", "1.250", "4.1 MB", "12.3 ms", "1.5 s")
    texts = [f'<td class="text">{cell}</td>' for cell in cells[:3]] + [f"<td>{cell}</td>" for cell in cells[3:]]
    assert "<tr>" + "".join(texts) + "</tr>" in html
    assert '<td class="text">forward/kv</td><td>3 MB</td><td>3.5 MB</td>' in html


def test_a_run_without_context_parallelism_has_no_such_section(make_run: Callable[..., Path]) -> None:
    assert communication(load_run(make_run())) == []
