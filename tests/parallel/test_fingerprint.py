"""Ranks that disagree on a step all raise one error before its first exchange; it names the ranks and what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from moba_train.errors import ConfigError
from moba_train.parallel.fingerprint import check_agreement, differences, digest
from moba_train.parallel.topology import close_topology
from tests.distributed import run_ranks
from tests.integration.engine_case import MIXED, engine_of, packed_row

EVERYWHERE = {"step": "42", "sharding": "layout zigzag"}
IN_REPLICA = {"samples": "17; 18", "cu_seqlens": "(0, 5, 9) of sample 17; (0, 9) of sample 18"}


def _disagreements(rank: int, n: int) -> list[str]:
    replicas = ((0, 1), (2, 3))
    group = dist.group.WORLD

    def told(everywhere: dict[str, str], in_replica: dict[str, str]) -> str:
        try:
            check_agreement(EVERYWHERE | everywhere, IN_REPLICA | in_replica, group=group, replicas=replicas)
        except ConfigError as error:
            return str(error)
        return ""

    other_row = {"cu_seqlens": "(0, 5, 9) of sample 17; (0, 4, 9) of sample 18"}
    of_replica = {"samples": "1" if rank < 2 else "2"}
    return [
        told({}, {}),
        told({}, of_replica),  # replicas work on rows of their own
        told({"step": "41"} if rank == 2 else {}, {}),
        told({}, other_row if rank == 3 else {}),
        told({"sharding": f"layout {'zigzag' if rank % 2 else 'contiguous'}"}, of_replica),
        told({}, {}),  # they can go on
    ]


def test_ranks_that_disagree_all_raise_the_same_error_that_names_ranks_and_facts() -> None:
    results = run_ranks(_disagreements, 4)
    agreed, rows, step, documents, layout, again = results[0]
    assert agreed == rows == again == ""
    assert "step: 41 on rank 2, 42 on the others" in step
    assert "cu_seqlens: (0, 4, 9) of sample 18 on rank 3, (0, 9) of sample 18 on rank 2" in documents
    assert "sharding: layout contiguous on rank 0, 2" in layout or "sharding: layout zigzag on rank 1, 3" in layout
    assert all(result == results[0] for result in results)


def test_a_fact_of_a_replica_may_differ_between_replicas_only() -> None:
    table = torch.tensor([[1, 5], [1, 5], [1, 6], [1, 6]]).numpy()
    assert differences(table, 1, ((0, 1), (2, 3))) == []
    assert differences(table, 2, ((0, 1), (2, 3))) == [(1, (0, 1, 2, 3))]
    assert differences(table, 1, ((0, 2), (1, 3))) == [(1, (0, 2)), (1, (1, 3))]
    assert digest("a") != digest("b")


def _engines_that_disagree(rank: int, n: int) -> list[str]:
    """What an engine says, on this rank, when rank 1 differs in one thing after the other; then all agree."""
    engine = engine_of(MIXED, cp=2)
    row = packed_row(1)
    shifted = replace(row, cu_seqlens=(0, 1, 24, 24, 50, 61))
    other_tokens = replace(row, tokens_S=row.tokens_S[::-1].copy())

    def told(work: Callable[[], object]) -> str:
        try:
            work()
        except ConfigError as error:
            return str(error)
        return ""

    texts = [
        told(lambda: engine.train_step([row], lr=1e-3, step=41 + rank)),
        told(lambda: engine.train_step([shifted if rank else row], lr=1e-3, step=42)),
        told(lambda: engine.train_step([other_tokens if rank else row], lr=1e-3, step=42)),
        told(lambda: engine.train_step([row], lr=2e-3 if rank else 1e-3, step=42)),
        told(lambda: engine.score(row, attention="moba" if rank else "full")),
    ]
    engine.set_stage(rank)
    texts.append(told(lambda: engine.train_step([row], lr=1e-3, step=42)))
    engine.set_stage(0)
    texts.append(told(lambda: engine.train_step([row], lr=1e-3, step=42)))
    engine = engine_of(MIXED, cp=2, transport="pull" if rank else "all_gather")
    texts.append(told(lambda: engine.train_step([row], lr=1e-3, step=42)))
    close_topology(keep_process_group=True)
    return texts


def test_an_engine_refuses_a_step_that_its_ranks_do_not_agree_on() -> None:
    found, same = run_ranks(_engines_that_disagree, 2)
    assert found == same
    step, documents, tokens, lr, mode, stage, agreed, transport = found
    assert "step: 41 on rank 0, 42 on rank 1" in step or "step: 42 on rank 1, 41 on" in step
    assert "cu_seqlens: " in documents and "(0, 1, 24, 24, 50, 61) of sample 0 on" in documents
    assert "tokens: checksum" in tokens and "cu_seqlens" not in tokens
    assert "learning rate: " in lr and "0.002 on" in lr
    assert "work: " in mode and "scores, full attention on" in mode
    assert "stage: " in stage and "attention='full'" in stage
    assert agreed == ""
    assert "sharding: " in transport and "transport 'all_gather'" in transport and "transport 'pull'" in transport
