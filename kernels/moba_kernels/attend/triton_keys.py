"""dK and dV in Triton: a program owns a tile of keys and adds up every row that attends to it, in fp32 registers.

A row is one (query, query head) of a KV head: row id = query at hand * H/K + head in the group, so all query heads of a
group add into the same tile. A tile of keys lies in one causal segment. Its rows come in units of BLOCK_M:

1. diagonal units, with a mask: queries of the segment that see some keys of the tile (under MoBA also those that see
   all of it: they are few);
2. then, under Full, whole units: queries of the segment that see all of it; under MoBA, list units: rows that picked
   its chunk, gathered by index. A segment that somebody outside picks is one chunk; where a document is covered its
   segment spans several chunks, and their lists are empty.

Work is cut into items of at most W units of one tile, so that a chunk that nearly every query picks (an attention sink)
does not keep one program busy for ever: W is max(MIN_UNITS, a share of all units that bounds the number of pieces), and
is worked out on the device. A tile with one item, the usual case, writes dk and dv itself. The items of a longer one
write fp32 pieces to a scratch of at most SCRATCH_BYTES, which a second kernel adds in order. No atomics: runs are
bit-equal.

Shape letters: T queries at hand, S keys at hand, H query heads, K key/value heads, D head dim, E value dim, M rows of a
unit, N keys of a tile, G causal segments, C chunks, P pick slots, X tiles of all KV heads, I items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_math import HAS_GLUON, LOG2_E, TRITON_TYPE, Variant, add_dot, dot, narrow, target_of
from .call import AttendCall
from .triton_config import groups_of_variants, padded
from .triton_geometry import DeviceGeometry
from .triton_key_blocks import KeyBlocks, key_blocks
from .triton_key_tables import key_items, key_tiles, longest_segment
from .triton_lists import PickLists
from .triton_rows import sums_by_head

if HAS_GLUON:
    from . import triton_keys_hopper as hopper

# Units an item holds at least: below it, the fp32 piece that a split costs is no longer small beside the work.
MIN_UNITS = 32
# Bound of the fp32 pieces of split tiles, whatever the routing.
SCRATCH_BYTES = 128 << 20
# Key rows that one program of the summing kernel takes.
SUM_ROWS = 16
SUM_WARPS, SUM_STAGES = 4, 2


@triton.jit
def _load_rows(base, row_M, num_rows, stride_t, stride_h, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M, BLOCK]: rows of one KV head gathered by row id; zeros for row ids >= num_rows."""
    dim = tl.arange(0, BLOCK)
    offset_M = (row_M // GROUP).to(tl.int64) * stride_t + (row_M % GROUP).to(tl.int64) * stride_h
    mask = (row_M < num_rows)[:, None]
    if DIM < BLOCK:
        mask = mask & (dim < DIM)[None, :]
    return tl.load(base + offset_M[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _add_unit(  # type: ignore[no-untyped-def]
    dk_ND, dv_NE, k_ND, v_NE, row_M, visible_M, key_N, q, dout, row_sums, scale_log2, num_rows,
    stride_qt, stride_qh, stride_ot, stride_oh,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv with the share of one unit of rows; dk still lacks the softmax scale.

    The spare row num_rows has lse = +inf, and so has a row that sees no key: their weights are 0.
    """
    q_MD = _load_rows(q, row_M, num_rows, stride_qt, stride_qh, GROUP, DIM, k_ND.shape[1])
    # Where it is asked for decides whether the registers suffice (`make aot`).
    if GROUP > 1:
        dout_ME = _load_rows(dout, row_M, num_rows, stride_ot, stride_oh, GROUP, VALUE_DIM, v_NE.shape[1])
    s_NM = dot(k_ND, tl.trans(q_MD)) * scale_log2
    p_NM = tl.exp2(s_NM - tl.load(row_sums + row_M * 2)[None, :])
    if MASKED:
        p_NM = tl.where(key_N[:, None] < visible_M[None, :], p_NM, 0.0)
    if GROUP == 1:
        dout_ME = _load_rows(dout, row_M, num_rows, stride_ot, stride_oh, GROUP, VALUE_DIM, v_NE.shape[1])
    dv_NE = add_dot(dv_NE, narrow(p_NM, q_MD.dtype), dout_ME)
    dp_NM = dot(v_NE, tl.trans(dout_ME))
    ds_NM = p_NM * (dp_NM - tl.load(row_sums + row_M * 2 + 1)[None, :])
    dk_ND = add_dot(dk_ND, narrow(ds_NM, q_MD.dtype), q_MD)
    return dk_ND, dv_NE


@triton.jit
def _rows_of_unit(  # type: ignore[no-untyped-def]
    unit, first, stop, entries, num_rows, ROWS_OF_ENTRY: tl.constexpr, BLOCK_M: tl.constexpr
):
    """[M] row ids of a unit of the rows first .. stop - 1, or, with entries, of places in a list; num_rows = no row."""
    at_M = first + unit * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M = at_M
    if ROWS_OF_ENTRY > 0:
        entry_M = tl.load(entries + at_M // ROWS_OF_ENTRY, mask=at_M < stop, other=0)
        row_M = entry_M * ROWS_OF_ENTRY + at_M % ROWS_OF_ENTRY
    return tl.where(at_M < stop, row_M, num_rows)


@triton.jit
def _store_tile(  # type: ignore[no-untyped-def]
    dst, tile_ND, key_N, key_stop, stride_s, DIM: tl.constexpr
):
    """Rows of a tile to dst[key], narrowed to its dtype."""
    dim = tl.arange(0, tile_ND.shape[1])
    mask = (key_N < key_stop)[:, None] & (dim < DIM)[None, :]
    offset_N = key_N.to(tl.int64) * stride_s
    tl.store(dst + offset_N[:, None] + dim[None, :], narrow(tile_ND, dst.dtype.element_ty), mask=mask)


@triton.jit
def _store_piece(pieces, slot, tile_ND, first_column, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of an item to its columns of pieces[slot], fp32 [N, WIDTH]."""
    row = tl.arange(0, tile_ND.shape[0])
    column = first_column + tl.arange(0, tile_ND.shape[1])
    start = slot.to(tl.int64) * tile_ND.shape[0] * WIDTH
    tl.store(pieces + start + row[:, None] * WIDTH + column[None, :], tile_ND)


_COUNTS = ("num_rows", "kv_first", "num_tiles", "num_chunks", "num_slots")


@triton.jit(do_not_specialize=_COUNTS)
def key_gradients_kernel(  # type: ignore[no-untyped-def]
    q, k, v, dout, row_sums, dk, dv, pieces, visible, tiles, items, results, entries, list_edges,
    scale, scale_log2, num_rows, kv_first, num_tiles, num_chunks, num_slots,
    stride_qt, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_ot, stride_oh,
    stride_dks, stride_dkh, stride_dvs, stride_dvh,
    GROUP: tl.constexpr, ROWS_OF_ENTRY: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One item: units first_unit .. stop_unit - 1 of a tile (tables: triton_key_tables.py)."""
    item = items + tl.program_id(0) * 3
    owner = tl.load(item)
    if owner < 0:
        return
    first_unit, stop_unit = tl.load(item + 1), tl.load(item + 2)
    kv = owner // num_tiles
    tile = tiles + (owner % num_tiles) * 6
    key_first, key_stop = tl.load(tile), tl.load(tile + 1)
    diagonal, whole, rows_stop = tl.load(tile + 2) * GROUP, tl.load(tile + 3) * GROUP, tl.load(tile + 4) * GROUP
    kv_at = (kv_first + kv).to(tl.int64)
    q, dout = q + kv_at * GROUP * stride_qh, dout + kv_at * GROUP * stride_oh
    row_sums += kv.to(tl.int64) * (num_rows + 1) * 2
    key_N = key_first + tl.arange(0, BLOCK_N)
    k_ND = _load_rows(k + kv_at * stride_kh, key_N, key_stop, stride_ks, 0, 1, DIM, BLOCK_D)
    v_NE = _load_rows(v + kv_at * stride_vh, key_N, key_stop, stride_vs, 0, 1, VALUE_DIM, BLOCK_E)
    dk_ND, dv_NE = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    diagonal_units = tl.cdiv(whole - diagonal, BLOCK_M)
    for unit in range(first_unit, tl.minimum(stop_unit, diagonal_units)):
        row_M = _rows_of_unit(unit, diagonal, whole, entries, num_rows, 0, BLOCK_M)
        visible_M = tl.load(visible + row_M // GROUP, mask=row_M < num_rows, other=0)
        dk_ND, dv_NE = _add_unit(
            dk_ND, dv_NE, k_ND, v_NE, row_M, visible_M, key_N, q, dout, row_sums, scale_log2, num_rows,
            stride_qt, stride_qh, stride_ot, stride_oh, GROUP, DIM, VALUE_DIM, True,
        )  # fmt: skip
    if ROWS_OF_ENTRY > 0:
        edge = list_edges + (kv * num_chunks + tl.load(tile + 5)).to(tl.int64) * num_slots
        entries += tl.load(edge)
        whole = 0
        rows_stop = (tl.load(edge + num_slots) - tl.load(edge)).to(tl.int32) * ROWS_OF_ENTRY
    first_unit = tl.maximum(first_unit - diagonal_units, 0)
    # Row ids ahead by hand: a pipelined load of indices would make every step wait for all copies under way.
    row_M = _rows_of_unit(first_unit, whole, rows_stop, entries, num_rows, ROWS_OF_ENTRY, BLOCK_M)
    if AHEAD == 2:
        next_M = _rows_of_unit(first_unit + 1, whole, rows_stop, entries, num_rows, ROWS_OF_ENTRY, BLOCK_M)
    for unit in range(first_unit + AHEAD, stop_unit - diagonal_units + AHEAD):
        last_M = _rows_of_unit(unit, whole, rows_stop, entries, num_rows, ROWS_OF_ENTRY, BLOCK_M)
        dk_ND, dv_NE = _add_unit(
            dk_ND, dv_NE, k_ND, v_NE, row_M, row_M, key_N, q, dout, row_sums, scale_log2, num_rows,
            stride_qt, stride_qh, stride_ot, stride_oh, GROUP, DIM, VALUE_DIM, False,
        )  # fmt: skip
        # The minimum changes nothing. Ids that are merely handed on would be waited for before the products.
        if AHEAD == 2:
            row_M = tl.minimum(next_M, num_rows)
            next_M = last_M
        else:
            row_M = tl.minimum(last_M, num_rows)
    dk_ND *= scale
    # Asked for again: kept through the loops they would take registers that products need. (So would the address of
    # the item: results are a table of their own.)
    result = results + tl.program_id(0) * 2
    owner, slot = tl.load(result), tl.load(result + 1)
    tile = tiles + (owner % num_tiles) * 6
    key_N, key_stop = tl.load(tile, volatile=True) + tl.arange(0, BLOCK_N), tl.load(tile + 1, volatile=True)
    kv_at = (kv_first + owner // num_tiles).to(tl.int64)
    if slot < 0:
        _store_tile(dk + kv_at * stride_dkh, dk_ND, key_N, key_stop, stride_dks, DIM)
        _store_tile(dv + kv_at * stride_dvh, dv_NE, key_N, key_stop, stride_dvs, VALUE_DIM)
    else:
        _store_piece(pieces, slot, dk_ND, 0, BLOCK_D + BLOCK_E)
        _store_piece(pieces, slot, dv_NE, BLOCK_D, BLOCK_D + BLOCK_E)


@triton.jit(do_not_specialize=_COUNTS)
def sum_pieces_kernel(  # type: ignore[no-untyped-def]
    dk, dv, pieces, sums, tiles, kv_first, num_tiles, stride_dks, stride_dkh, stride_dvs, stride_dvh,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of one split tile: its pieces, added in order."""
    owner = tl.load(sums + tl.program_id(0) * 3)
    if owner < 0:
        return
    slot, slot_stop = tl.load(sums + tl.program_id(0) * 3 + 1), tl.load(sums + tl.program_id(0) * 3 + 2)
    row_N = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_D, column_E = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_E)
    dk_ND = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv_NE = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for piece in range(slot, slot_stop):
        at_N = (tl.cast(piece, tl.int64) * BLOCK_N + row_N) * (BLOCK_D + BLOCK_E)
        dk_ND += tl.load(pieces + at_N[:, None] + column_D[None, :])
        dv_NE += tl.load(pieces + at_N[:, None] + column_E[None, :])
    kv_at = (kv_first + owner // num_tiles).to(tl.int64)
    tile = tiles + (owner % num_tiles) * 6
    key_N, key_stop = tl.load(tile) + row_N, tl.load(tile + 1)
    _store_tile(dk + kv_at * stride_dkh, dk_ND, key_N, key_stop, stride_dks, DIM)
    _store_tile(dv + kv_at * stride_dvh, dv_NE, key_N, key_stop, stride_dvs, VALUE_DIM)


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    call: AttendCall,
    geometry: DeviceGeometry,
    lists: PickLists | None,
    kv_first: int,
    kv_stop: int,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dk[:, kv_first:kv_stop] and dv[:, kv_first:kv_stop] of every key at hand. arXiv 2502.13189, eq. 2 to 4.

    Args:
        dout: [T,H,E] gradient of the merged output; q: [T,H,D]; k: [S,K,D]; v: [S,K,E]: bf16, fp16 or fp32, one dtype
            (another one of dout is converted), last dim contiguous.
        lse: fp32 [T,H], natural log, over *all* keys; -inf = the row takes no part. delta: fp32 [T,H].
        geometry: of the call. lists: the picks of all queries for KV heads kv_first .. kv_stop - 1; None where nobody
            picks outside the segments.
        dk: [S,K,D], dv: [S,K,E]: any floating dtype, last dim contiguous; what they hold is overwritten.

    P = exp(scale q k^T - lse); dv = P^T dout; dS = P (dout v^T - delta); dk = scale dS^T q. Scratch: 8 bytes a
    row, tables of about 40 bytes a tile and KV head, pieces of at most SCRATCH_BYTES.
    """
    num_queries, num_keys, heads, group = q.shape[0], k.shape[0], kv_stop - kv_first, q.shape[1] // k.shape[1]
    if not num_keys or not heads:
        return
    if not num_queries:
        dk[:, kv_first:kv_stop], dv[:, kv_first:kv_stop] = 0, 0
        return
    dout, row_sums = dout.to(q.dtype), sums_by_head(lse, delta, kv_first * group, heads * group, heads)
    usual = longest_segment(call) if lists is None or call.routing is None else call.routing.spec.chunk_size
    blocks = key_blocks(
        q.shape[2], v.shape[2], q.dtype, target_of(q.device), usual, group,
        picks=lists is not None, aligned=_rows_are_aligned(q) and _rows_are_aligned(dout),
    )  # fmt: skip
    dims = _dims(q.shape[2], v.shape[2], blocks)
    width = dims["BLOCK_D"] + dims["BLOCK_E"]
    tiles = geometry.derived(("key tiles", blocks.block_n), lambda: key_tiles(call, geometry, blocks.block_n, num_keys))
    most = _most_units(call, lists, heads * tiles.shape[0], num_queries, group, blocks, usual)
    num_pieces = min(SCRATCH_BYTES // (4 * blocks.block_n * width), 2 * most // MIN_UNITS)
    table = key_items(tiles, lists, heads, group, blocks.block_m, num_pieces, MIN_UNITS)
    pieces = q.new_empty((num_pieces, blocks.block_n, width), dtype=torch.float32)
    kernel, options = _kernel_of(blocks, dims)
    kernel[(table.items.shape[0],)](
        q, k, v, dout, row_sums, dk, dv, pieces, geometry.visible_T, tiles, table.items, table.results,
        tiles if lists is None else lists.entries_E, tiles if lists is None else lists.edges,
        call.scale, call.scale * LOG2_E.value, num_queries * group, kv_first, tiles.shape[0],
        geometry.num_chunks, 1 if lists is None else lists.num_slots,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
        GROUP=group, ROWS_OF_ENTRY=0 if lists is None else group // lists.rows_per_query,
        BLOCK_M=blocks.block_m, **options,
    )  # fmt: skip
    if num_pieces:
        sum_pieces_kernel[(table.sums.shape[0], blocks.block_n // SUM_ROWS)](
            dk, dv, pieces, table.sums, tiles, kv_first, tiles.shape[0], *dk.stride()[:2], *dv.stride()[:2],
            ROWS=SUM_ROWS, **dims, num_warps=SUM_WARPS, num_stages=SUM_STAGES,
        )  # fmt: skip


def _rows_are_aligned(x: Tensor) -> bool:
    """Does every row of x [tokens, heads, dim] begin at 16 bytes, by strides that launches specialise on?"""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0


def _kernel_of(blocks: KeyBlocks, dims: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """The kernel for such tiles, and those of its constants and launch options that are its own."""
    if not blocks.specialised:
        options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        return key_gradients_kernel, {"AHEAD": blocks.ahead, **options, **dims}
    constants = {name: dims[name] for name in ("DIM", "VALUE_DIM", "BLOCK_N")}
    options = {"num_warps": blocks.num_warps, "maxnreg": hopper.FIRST_REGISTERS}
    return hopper.hopper_key_gradients, {"STAGES": blocks.num_stages, **options, **constants}


def _dims(head_dim: int, value_dim: int, blocks: KeyBlocks) -> dict[str, int]:
    """Compile-time constants of both kernels."""
    return {
        "DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_N": blocks.block_n,
        "BLOCK_D": padded(head_dim),
        "BLOCK_E": padded(value_dim),
    }


def _most_units(
    call: AttendCall,
    lists: PickLists | None,
    num_tiles: int,
    num_queries: int,
    group: int,
    blocks: KeyBlocks,
    keys: int,
) -> int:
    """The units of all tiles are no more; known on the host. keys: most keys of a list's chunk."""
    units = num_tiles * (min(num_queries, longest_segment(call)) * group // blocks.block_m + 2)
    if lists is not None:
        tiles_of_chunk = -(-keys // blocks.block_n)
        rows = lists.entries_E.numel() * group // lists.rows_per_query
        units += tiles_of_chunk * rows // blocks.block_m + num_tiles
    return units


def variants(head_dims: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], target: int) -> Iterator[Variant]:
    """The compiled forms that launches use on `target`. Results of another dtype than the inputs' (the fp32 of
    partials) only change the last store: one form stands for them."""
    for (head_dim, value_dim), dtype in product(head_dims, dtypes):
        for group in groups_of_variants(head_dim, value_dim, dtype):
            shapes = {
                picks: list(dict.fromkeys(
                    key_blocks(head_dim, value_dim, dtype, target, keys, group, picks=picks, aligned=aligned)
                    for keys, aligned in ((1 << 20, True), (1 << 20, False), (64, True), (32, True))
                ))
                for picks in (True, False)
            }  # fmt: skip
            forms = [(blocks, rows, dtype) for rows in dict.fromkeys((1, group, 0)) for blocks in shapes[rows > 0]]
            forms += [(shapes[True][0], 1, torch.float32)] if dtype != torch.float32 else []
            for blocks, rows_of_entry, result in forms:
                kernel, constants = _kernel_of(blocks, _dims(head_dim, value_dim, blocks))
                constants |= {"GROUP": group, "ROWS_OF_ENTRY": rows_of_entry, "BLOCK_M": blocks.block_m}
                lists_of = {0: "full", 1: "head"}.get(rows_of_entry, "group")
                yield _variant(kernel, f"{lists_of}, {group} heads a group", dtype, result, constants)
        for blocks in shapes[False]:
            constants = {"ROWS": SUM_ROWS, "num_warps": SUM_WARPS, "num_stages": SUM_STAGES}
            constants |= _dims(head_dim, value_dim, blocks)
            yield _variant(sum_pieces_kernel, "sum", dtype, dtype, constants)


def _variant(
    kernel: Any,
    what: str,
    dtype: torch.dtype,
    result: torch.dtype,
    arguments: dict[str, int],
) -> Variant:
    """arguments: constants and launch options, as a launch gives them."""
    constants = {name: x for name, x in arguments.items() if name in kernel.arg_names}
    element = {"dk": TRITON_TYPE[result], "dv": TRITON_TYPE[result], "list_edges": "i64"}
    element |= dict.fromkeys(("q", "k", "v", "dout"), TRITON_TYPE[dtype])
    element |= dict.fromkeys(("row_sums", "pieces"), "fp32")
    types = {}
    for argument in kernel.arg_names:
        if argument.startswith("scale"):
            types[argument] = "fp32"
        elif argument.startswith("stride_") or argument in _COUNTS:
            types[argument] = "i32"
        elif argument not in constants:
            types[argument] = "*" + element.get(argument, "i32")
    dims = f"{constants['DIM']}/{constants['VALUE_DIM']} {TRITON_TYPE[dtype]}"
    label = f"{kernel.__name__} {dims} {constants['BLOCK_N']} keys, {what}, {TRITON_TYPE[result]} result"
    aligned = frozenset(types) - {"scale", "scale_log2", *_COUNTS}
    return Variant(
        label, kernel, types, constants, arguments["num_warps"], arguments.get("num_stages", 1), constants["DIM"],
        dtype, aligned, arguments.get("maxnreg"),
    )  # fmt: skip
