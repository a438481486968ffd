"""MoBA worked out query by query in plain numpy fp64, from the paper alone: shares no code with moba_kernels.

Shape letters: T tokens, H query heads, K key/value heads, R routing heads, D head dim, Dv value dim.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from hashlib import sha256

import numpy as np


def _remembered(work_out: Callable) -> Callable:
    """The same answer to the same question: many tests ask it of many backends, and answers take long."""
    answers = {}

    @wraps(work_out)
    def answer(*arguments, **named):
        question = sha256(pickle.dumps((arguments, named))).digest()
        if question not in answers:
            answers[question] = work_out(*arguments, **named)
        return answers[question]

    return answer


@dataclass
class Answer:
    out: np.ndarray  # [T,H,Dv]
    lse: np.ndarray  # [T,H]
    chosen: list[list[list[int]]]  # [T][R] chunk ids over the row: the own chunk, then picks by falling score
    pairs: int
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def chunk_table(cu, chunk_size):
    """[(first token, one past the last, document)] of every chunk of the row."""
    table = []
    for document in range(len(cu) - 1):
        for start in range(cu[document], cu[document + 1], chunk_size):
            table.append((start, min(start + chunk_size, cu[document + 1]), document))
    return table


@_remembered
def choose(q, k, cu, chunk_size, topk, select):
    """chosen[t][r]: the own chunk, then up to topk - 1 earlier ones of the document by score, later first on ties."""
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    table = chunk_table(cu, chunk_size)
    means = [np.float32(k[a:b].astype(np.float64).sum(0) / (b - a)) for a, b, _ in table]
    chosen = []
    for t in range(tokens):
        own = next(i for i, (a, b, _) in enumerate(table) if a <= t < b)
        past = [i for i in range(own) if table[i][2] == table[own][2]]
        of_token = []
        for r in range(heads if select == "head" else k.shape[1]):
            query_heads = [r] if select == "head" else list(range(r * group, (r + 1) * group))
            query = sum(q[t, h].astype(np.float64) for h in query_heads)
            kv = query_heads[0] // group
            score = {i: float(np.float32(np.dot(query, means[i][kv].astype(np.float64)))) for i in past}
            ranked = sorted(past, key=lambda i: (-score[i], -i))
            of_token.append([own, *ranked[: topk - 1]])
        chosen.append(of_token)
    return chosen


@_remembered
def attend(q, k, v, cu, moba=None, scale=None, dout=None, chosen=None):
    """moba: None for full attention, else (chunk_size, topk, select). chosen: forced choice."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    dout = np.zeros((tokens, heads, v.shape[2])) if dout is None else dout.astype(np.float64)
    table = chunk_table(cu, moba[0]) if moba else []
    if moba and chosen is None:
        chosen = choose(q, k, cu, *moba)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out, lse = np.zeros((tokens, heads, v.shape[2])), np.zeros((tokens, heads))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    pairs = 0
    for t in range(tokens):
        document_start = max(edge for edge in cu if edge <= t)
        for h in range(heads):
            keys = list(range(document_start, t + 1))
            if moba:
                picks = chosen[t][h if len(chosen[t]) == heads else h // group]
                keys = [j for c in picks if c >= 0 for j in range(table[c][0], table[c][1]) if j <= t]
            g = h // group
            scores = k[keys, g] @ q[t, h] * scale
            top = scores.max()
            lse[t, h] = top + np.log(np.exp(scores - top).sum())
            p = np.exp(scores - lse[t, h])
            out[t, h] = p @ v[keys, g]
            ds = p * (v[keys, g] @ dout[t, h] - dout[t, h] @ out[t, h])
            dq[t, h] = scale * ds @ k[keys, g]
            dk[keys, g] += scale * np.outer(ds, q[t, h])
            dv[keys, g] += np.outer(p, dout[t, h])
            pairs += len(keys)
    return Answer(out, lse, chosen, pairs, dq, dk, dv)


def allowed_pairs(cu, tokens, heads, moba=None, chosen=None):
    """[H,T,T] bool: which pairs a choice lets through, for dense checks."""
    mask = np.zeros((heads, tokens, tokens), dtype=bool)
    table = chunk_table(cu, moba[0]) if moba else []
    for t in range(tokens):
        document_start = max(edge for edge in cu if edge <= t)
        for h in range(heads):
            if not moba:
                mask[h, t, document_start : t + 1] = True
                continue
            for c in chosen[t][h * len(chosen[t]) // heads]:
                if c >= 0:
                    mask[h, t, table[c][0] : min(table[c][1], t + 1)] = True
    return mask
