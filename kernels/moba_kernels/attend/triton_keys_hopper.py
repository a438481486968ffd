"""dK and dV on Hopper by specialised warps: what `key_gradients_kernel` of triton_keys.py does, item for item.

A program owns 128 keys and has three groups of four warps. One fetches: it gathers the rows of a unit (q, dout, lse,
delta) into a stage of shared memory, some units ahead, and says by an mbarrier (`full`) when they have come. Two
multiply, with 64 keys each, and say by another (`empty`) that they have read the stage. Nothing else ties the groups to
each other, so while one computes its weights the other has the tensor cores; warps that go in step leave them idle.

Written in Gluon, the layer of Triton in which layouts, shared memory and barriers are the author's. The interpreter
does not know it; tests run it by an emulation of their own, `make gpu-test` holds it to the reference like every other
kernel, `make aot` to its limits.

Shape letters as in triton_keys.py: M rows of a unit, N keys of a group of warps (half of a tile), D head dim, E value
dim. Names with _s lie in shared memory: a stage holds q [M, D], dout [M, E] and lse, delta and visible [M].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Registers of a thread: an even share of a multiprocessor's 64 K when the program starts, then what each group needs.
FIRST_REGISTERS = 168
_FETCHING_REGISTERS, _MULTIPLYING_REGISTERS = gl.constexpr(40), gl.constexpr(232)
_GROUP_THREADS = gl.constexpr(128)

_COUNTS = ("num_rows", "kv_first", "num_tiles", "num_chunks", "num_slots")


@gluon.jit
def _row_ids(at_M, stop, entries, num_rows, ROWS_OF_ENTRY: gl.constexpr):  # type: ignore[no-untyped-def]
    """[M] row ids of the rows at_M, or, with entries, of places in a list; num_rows = no row."""
    row_M = at_M
    if ROWS_OF_ENTRY > 0:
        entry_M = gl.load(entries + at_M // ROWS_OF_ENTRY, mask=at_M < stop, other=0)
        row_M = entry_M * ROWS_OF_ENTRY + at_M % ROWS_OF_ENTRY
    return gl.where(at_M < stop, row_M, num_rows)


@gluon.jit
def _copy_rows(buffer, source, row_M, num_rows, stride_t, stride_h, GROUP: gl.constexpr, ROWS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Start copying rows (token, head of the group) to a buffer [M, dim]; zeros for row ids >= num_rows."""
    dim = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, ROWS))
    at_M = (row_M // GROUP).to(gl.int64) * stride_t + (row_M % GROUP).to(gl.int64) * stride_h
    async_copy.async_copy_global_to_shared(buffer, source + at_M[:, None] + dim[None, :], (row_M < num_rows)[:, None])


@gluon.jit
def _fetch_unit(  # type: ignore[no-untyped-def]
    turn, at, stop, q, dout, row_sums, visible, entries, num_rows, strides, stages, barriers,
    GROUP: gl.constexpr, ROWS_OF_ENTRY: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Start copying the rows at .. at + M - 1 (of a list, with ROWS_OF_ENTRY) as soon as their stage is free."""
    q_s, dout_s, lse_s, delta_s, visible_s = stages
    full, empty = barriers
    stride_qt, stride_qh, stride_ot, stride_oh = strides
    STAGES: gl.constexpr = q_s.shape[0]
    M: gl.constexpr = q_s.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SUMS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    HALF: gl.constexpr = M // 2
    # In the layout of rows, and in that of one number a row.
    lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, ROWS))
    low_M = _row_ids(at + lane, stop, entries, num_rows, ROWS_OF_ENTRY)
    sums_row_M = _row_ids(at + gl.arange(0, M, layout=SUMS), stop, entries, num_rows, ROWS_OF_ENTRY)
    stage = turn % STAGES
    mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
    async_copy.async_copy_global_to_shared(lse_s.index(stage), row_sums + sums_row_M * 2)
    async_copy.async_copy_global_to_shared(delta_s.index(stage), row_sums + sums_row_M * 2 + 1)
    if MASKED:
        there_M = sums_row_M < num_rows
        async_copy.async_copy_global_to_shared(visible_s.index(stage), visible + sums_row_M // GROUP, there_M)
    q_to, dout_to = q_s.index(stage), dout_s.index(stage)
    _copy_rows(q_to.slice(0, HALF), q, low_M, num_rows, stride_qt, stride_qh, GROUP, ROWS)
    _copy_rows(dout_to.slice(0, HALF), dout, low_M, num_rows, stride_ot, stride_oh, GROUP, ROWS)
    high_M = _row_ids(at + HALF + lane, stop, entries, num_rows, ROWS_OF_ENTRY)
    _copy_rows(q_to.slice(HALF, HALF), q, high_M, num_rows, stride_qt, stride_qh, GROUP, ROWS)
    _copy_rows(dout_to.slice(HALF, HALF), dout, high_M, num_rows, stride_ot, stride_oh, GROUP, ROWS)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)  # every thread, once its copies are there


@gluon.jit
def _fetch(  # type: ignore[no-untyped-def]
    q, dout, row_sums, visible, entries, num_rows, strides, rows, turns, stages, barriers,
    GROUP: gl.constexpr, ROWS_OF_ENTRY: gl.constexpr,
):  # fmt: skip
    """All units of the item, in order."""
    diagonal_first, diagonal_stop, list_first, list_stop = rows
    masked_turns, all_turns = turns
    M: gl.constexpr = stages[0].shape[1]
    for turn in range(masked_turns):
        _fetch_unit(
            turn, diagonal_first + turn * M, diagonal_stop, q, dout, row_sums, visible, entries, num_rows, strides,
            stages, barriers, GROUP, 0, True,
        )  # fmt: skip
    for turn in range(masked_turns, all_turns):
        _fetch_unit(
            turn, list_first + turn * M, list_stop, q, dout, row_sums, visible, entries, num_rows,
            strides, stages, barriers, GROUP, ROWS_OF_ENTRY, False,
        )  # fmt: skip


@gluon.jit
def _add_unit(  # type: ignore[no-untyped-def]
    turn, dk_ND, dv_NE, k_s, v_s, key_first, scale_log2, stages, barriers, MASKED: gl.constexpr
):
    """dk and dv with the share of one unit; dk still lacks the softmax scale."""
    q_s, dout_s, lse_s, delta_s, visible_s = stages
    full, empty = barriers
    dtype: gl.constexpr = q_s.dtype
    STAGES: gl.constexpr = q_s.shape[0]
    M: gl.constexpr = q_s.shape[1]
    N: gl.constexpr = k_s.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    SUMS: gl.constexpr = gl.SliceLayout(0, SCORES)
    LEFT_K: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dk_ND.type.layout, k_width=2)
    LEFT_V: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv_NE.type.layout, k_width=2)
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), turn // STAGES & 1)
    fence_async_shared()  # what copies have written, for the tensor cores
    q, dout = q_s.index(stage), dout_s.index(stage)
    zero = gl.full([N, M], 0.0, gl.float32, layout=SCORES)
    s_NM = warpgroup_mma(k_s, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp_NM = warpgroup_mma(v_s, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    s_NM = warpgroup_mma_wait(1, deps=(s_NM,))
    # lse and delta are read as late as can be: in this layout each takes half the registers of the scores.
    p_NM = gl.exp2(s_NM * scale_log2 - lse_s.index(stage).load(SUMS)[None, :])
    if MASKED:
        key_N = key_first + gl.arange(0, N, layout=gl.SliceLayout(1, SCORES))
        p_NM = gl.where(key_N[:, None] < visible_s.index(stage).load(SUMS)[None, :], p_NM, 0.0)
    dv_NE = warpgroup_mma(gl.convert_layout(p_NM.to(dtype), LEFT_V), dout, dv_NE, is_async=True)
    dp_NM = warpgroup_mma_wait(1, deps=(dp_NM,))
    ds_NM = p_NM * (dp_NM - delta_s.index(stage).load(SUMS)[None, :])
    dk_ND = warpgroup_mma(gl.convert_layout(ds_NM.to(dtype), LEFT_K), q, dk_ND, is_async=True)
    dv_NE, dk_ND = warpgroup_mma_wait(0, deps=(dv_NE, dk_ND))
    gl.thread_barrier()  # all four warps have read the stage: one thread says so
    mbarrier.arrive(empty.index(stage), count=1)
    return dk_ND, dv_NE


@gluon.jit
def _load_keys(buffer, source, first, stop, stride):  # type: ignore[no-untyped-def]
    """Keys from `first` on to a buffer [N, dim]; zeros from `stop` on."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    key_N = first + gl.arange(0, buffer.shape[0], layout=gl.SliceLayout(1, ROWS))
    dim = gl.arange(0, buffer.shape[1], layout=gl.SliceLayout(0, ROWS))
    at_N = key_N.to(gl.int64) * stride
    buffer.store(gl.load(source + at_N[:, None] + dim[None, :], mask=(key_N < stop)[:, None], other=0.0))


@gluon.jit
def _store_rows(target, x, first, stop, stride):  # type: ignore[no-untyped-def]
    """x, narrowed, to target's rows from `first` on that lie below `stop`."""
    row = first + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    dim = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    at = target + (row.to(gl.int64) * stride)[:, None] + dim[None, :]
    gl.store(at, x.to(target.dtype.element_ty), mask=(row < stop)[:, None])


@gluon.jit
def _keep(facts, PLACE: gl.constexpr, x):  # type: ignore[no-untyped-def]
    """facts[PLACE] = x, int32."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    facts.index(PLACE).store(gl.full([1], 0, gl.int32, layout=ONE) + x)


@gluon.jit
def _recall(facts, PLACE: gl.constexpr):  # type: ignore[no-untyped-def]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(facts.index(PLACE).load(ONE), 0)


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    PART: gl.constexpr, k, v, dk, dv, pieces, strides, key_first, key_stop, scale, scale_log2, turns, facts, k_s, v_s,
    stages, barriers,
):  # fmt: skip
    """dk and dv of one half of the keys. facts (first key, stop key, KV head, slot or -1): for the end, since in
    registers they would be in the way of the products."""
    stride_ks, stride_vs, stride_dks, stride_dkh, stride_dvs, stride_dvh = strides
    masked_turns, all_turns = turns
    k_s, v_s = k_s.index(PART), v_s.index(PART)
    N: gl.constexpr = k_s.shape[0]
    D: gl.constexpr = k_s.shape[1]
    E: gl.constexpr = v_s.shape[1]
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    key_first += PART * N
    _load_keys(k_s, k, key_first, key_stop, stride_ks)
    _load_keys(v_s, v, key_first, key_stop, stride_vs)
    fence_async_shared()
    gl.thread_barrier()
    dk_ND = gl.full([N, D], 0.0, gl.float32, layout=KEYS)
    dv_NE = gl.full([N, E], 0.0, gl.float32, layout=VALUES)
    for turn in range(masked_turns):
        dk_ND, dv_NE = _add_unit(turn, dk_ND, dv_NE, k_s, v_s, key_first, scale_log2, stages, barriers, True)
    for turn in range(masked_turns, all_turns):
        dk_ND, dv_NE = _add_unit(turn, dk_ND, dv_NE, k_s, v_s, key_first, scale_log2, stages, barriers, False)
    dk_ND = dk_ND * scale
    first, stop = _recall(facts, 0), _recall(facts, 1)
    kv_at, slot = _recall(facts, 2).to(gl.int64), _recall(facts, 3)
    if slot < 0:
        _store_rows(dk + kv_at * stride_dkh, dk_ND, first + PART * N, stop, stride_dks)
        _store_rows(dv + kv_at * stride_dvh, dv_NE, first + PART * N, stop, stride_dvs)
    else:
        piece = pieces + slot.to(gl.int64) * (2 * N * (D + E))
        _store_rows(piece, dk_ND, PART * N, 2 * N, D + E)
        _store_rows(piece + D, dv_NE, PART * N, 2 * N, D + E)


@gluon.jit(do_not_specialize=_COUNTS)
def hopper_key_gradients(  # type: ignore[no-untyped-def]
    q, k, v, dout, row_sums, dk, dv, pieces, visible, tiles, items, results, entries, list_edges,
    scale, scale_log2, num_rows, kv_first, num_tiles, num_chunks, num_slots,
    stride_qt, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_ot, stride_oh,
    stride_dks, stride_dkh, stride_dvs, stride_dvh,
    GROUP: gl.constexpr, ROWS_OF_ENTRY: gl.constexpr, DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One item: units first_unit .. stop_unit - 1 of a tile (tables: triton_key_tables.py). A turn is a unit of it."""
    item = items + gl.program_id(0) * 3
    owner = gl.load(item)
    if owner < 0:
        return
    first_unit, stop_unit = gl.load(item + 1), gl.load(item + 2)
    kv = owner // num_tiles
    kv_at = (kv_first + kv).to(gl.int64)
    tile = tiles + (owner % num_tiles) * 6
    key_first, key_stop = gl.load(tile), gl.load(tile + 1)
    diagonal_first, diagonal_stop = gl.load(tile + 2) * GROUP, gl.load(tile + 3) * GROUP
    diagonal_units = gl.cdiv(diagonal_stop - diagonal_first, BLOCK_M)
    list_first, list_stop = diagonal_stop, gl.load(tile + 4) * GROUP
    if ROWS_OF_ENTRY > 0:
        edge = list_edges + (kv * num_chunks + gl.load(tile + 5)).to(gl.int64) * num_slots
        entries += gl.load(edge)
        list_first = diagonal_stop * 0
        list_stop = (gl.load(edge + num_slots) - gl.load(edge)).to(gl.int32) * ROWS_OF_ENTRY
    turns = gl.maximum(gl.minimum(stop_unit, diagonal_units) - first_unit, 0), stop_unit - first_unit
    # Of turn 0, if there were no other kind of units.
    diagonal_first += first_unit * BLOCK_M
    list_first += (first_unit - diagonal_units) * BLOCK_M
    rows = diagonal_first, diagonal_stop, list_first, list_stop

    dtype: gl.constexpr = q.dtype.element_ty
    HALF: gl.constexpr = BLOCK_N // 2
    K_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, DIM], dtype)
    V_ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, VALUE_DIM], dtype)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2, HALF, DIM], K_ROWS)
    v_s = gl.allocate_shared_memory(dtype, [2, HALF, VALUE_DIM], V_ROWS)
    stages = (
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, DIM], K_ROWS),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, VALUE_DIM], V_ROWS),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], PLAIN),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], PLAIN),
        gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], PLAIN),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=_GROUP_THREADS)
        mbarrier.init(empty.index(stage), count=2)
    barriers = full, empty
    facts = gl.allocate_shared_memory(gl.int32, [4, 1], PLAIN)
    _keep(facts, 0, key_first)
    _keep(facts, 1, key_stop)
    _keep(facts, 2, kv_first + kv)
    _keep(facts, 3, gl.load(results + gl.program_id(0) * 2 + 1))
    gl.thread_barrier()

    k, v = k + kv_at * stride_kh, v + kv_at * stride_vh
    q, dout = q + kv_at * GROUP * stride_qh, dout + kv_at * GROUP * stride_oh
    row_sums += kv.to(gl.int64) * (num_rows + 1) * 2
    row_strides = stride_qt, stride_qh, stride_ot, stride_oh
    key_strides = stride_ks, stride_vs, stride_dks, stride_dkh, stride_dvs, stride_dvh
    gl.warp_specialize(
        [
            (_multiply, (
                0, k, v, dk, dv, pieces, key_strides, key_first, key_stop, scale, scale_log2, turns, facts, k_s, v_s,
                stages, barriers,
            )),
            (_multiply, (
                1, k, v, dk, dv, pieces, key_strides, key_first, key_stop, scale, scale_log2, turns, facts, k_s, v_s,
                stages, barriers,
            )),
            (_fetch, (
                q, dout, row_sums, visible, entries, num_rows, row_strides, rows, turns, stages, barriers,
                GROUP, ROWS_OF_ENTRY,
            )),
        ],
        [4, 4],
        [_MULTIPLYING_REGISTERS, _FETCHING_REGISTERS],
    )  # fmt: skip
