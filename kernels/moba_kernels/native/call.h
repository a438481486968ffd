/* A call of attend.c, and what its threads work in.
 *
 * T queries at hand, S keys at hand, H query heads, K KV heads, R heads that pick, P picks, C chunks, A ranges of keys.
 * A row is one (query, head): query << HEAD_BITS | head.
 */

#pragma once

#include "products.h"
#include "threads.h"

enum { HEAD_BITS = 20 };
enum { ROWS = 48, KEYS = 256, KEYS_BACKWARD = 128, WEIGHTS = KEYS + W /* a row of weights, off the powers of two */ };

/* How a query takes its picks: all are in its segment, or they go by lists, or its segment, the document, has a mask. */
enum { PLAIN, LISTED, MASKED };

/* attend/native.py has the same structure. */
typedef struct {
    Rows q, k, v, dout;
    float *out, *lse;      /* [T,H,Dv], [T,H]; backward reads lse */
    float *dq, *dk, *dv;   /* [T,H,D], [S,K,D], [S,K,Dv], added to */
    const float *delta;    /* [T,H] */
    const i64 *own_begin, *own_end; /* [T]: the keys of a query's segment up to itself */
    const void *picks;     /* [T,R,P], P dense: uint16 (65535 = none) or int32 (-1 = none); NULL without picks */
    const uint8_t *ways;   /* [T]: PLAIN, LISTED or MASKED */
    const i64 *own_chunk;  /* [T] */
    const i64 *chunk_keys; /* [C+1]: chunk c has keys chunk_keys[c] .. chunk_keys[c+1] - 1 of those at hand */
    const i64 *range_keys, *range_chunks; /* [A+1] */
    i64 num_queries, num_heads, num_kv_heads, dim, value_dim, num_routed, num_slots, wide_picks;
    i64 picks_token, picks_head; /* elements from one to the next */
    i64 query_block, num_words, num_ranges, num_threads;
    i64 attended, scored; /* counted here */
    double scale;
} Call;

/* What a thread works in; one allocation. */
typedef struct {
    float *lines, *q, *dout, *weights, *dscores, *totals;
    Panels k_rows, v_rows, k_columns, v_columns;
    float *dk, *dv;
    float *into[ROWS], *weights_of[ROWS], *dscores_of[ROWS], *dk_of[KEYS_BACKWARD], *dv_of[KEYS_BACKWARD];
    i64 *ends, *listed, *rows, *own_rows, *own_limits;
    int32_t *chunks;
    uint64_t *taken; /* of each picking head of a MASKED query num_words: bit n, does it take chunk own - 1 - n? */
    i64 first, head; /* of the rows at hand */
    i64 key, num_keys, chunk, chunk_stop; /* of the tile at hand: its keys, and the chunks that have some of them */
    i64 attended, scored;
} Scratch;

/* Picking heads under one KV head. */
INLINE i64 routed_of(const Call *call) { return call->num_routed / call->num_kv_heads; }

/* Bytes of a scratch, which begins at `memory`. */
static i64 lay_out(const Call *call, Scratch *s, char *memory)
{
    const i64 q = up(call->dim, W), v = up(call->value_dim, W), group = call->num_heads / call->num_kv_heads;
    const i64 rows = call->query_block * group, f = sizeof(float);
    const i64 entries = call->picks ? rows * call->num_slots : 0;
    i64 chunks = 0;
    for (i64 a = 0; call->picks && a < call->num_ranges; a++)
        chunks = max64(chunks, call->range_chunks[a + 1] - call->range_chunks[a]);
    i64 at = 0;
    s->lines = take(memory, &at, 4 * max64(q, v) * f);
    s->k_rows.data = take(memory, &at, KEYS * q * f);
    s->v_rows.data = take(memory, &at, KEYS * v * f);
    s->k_columns.data = take(memory, &at, KEYS * q * f);
    s->v_columns.data = take(memory, &at, KEYS * v * f);
    s->q = take(memory, &at, ROWS * q * f);
    s->dout = take(memory, &at, ROWS * v * f);
    s->weights = take(memory, &at, ROWS * WEIGHTS * f);
    s->dscores = take(memory, &at, ROWS * WEIGHTS * f);
    s->dk = take(memory, &at, KEYS_BACKWARD * q * f);
    s->dv = take(memory, &at, KEYS_BACKWARD * v * f);
    s->totals = take(memory, &at, rows * W * f);
    s->ends = take(memory, &at, (chunks + 1) * sizeof(i64));
    s->chunks = take(memory, &at, (entries + 1) * sizeof(int32_t)); /* one more: the last try is written, too */
    s->listed = take(memory, &at, (entries + 1) * sizeof(i64));
    s->rows = take(memory, &at, entries * sizeof(i64));
    s->taken = take(memory, &at, call->query_block * routed_of(call) * call->num_words * sizeof(uint64_t));
    s->own_rows = take(memory, &at, rows * sizeof(i64));
    s->own_limits = take(memory, &at, rows * sizeof(i64));
    for (i64 i = 0; memory && i < ROWS; i++) {
        s->weights_of[i] = s->weights + i * WEIGHTS;
        s->dscores_of[i] = s->dscores + i * WEIGHTS;
    }
    for (i64 j = 0; memory && j < KEYS_BACKWARD; j++) {
        s->dk_of[j] = s->dk + j * q;
        s->dv_of[j] = s->dv + j * v;
    }
    return at;
}

INLINE i64 row_of(i64 query, i64 head) { return query << HEAD_BITS | head; }
INLINE i64 query_of(i64 row) { return row >> HEAD_BITS; }
INLINE i64 head_of(i64 row) { return row & ((1 << HEAD_BITS) - 1); }
/* Which of all rows [T,H] it is. */
INLINE i64 nth(const Call *call, i64 row) { return query_of(row) * call->num_heads + head_of(row); }

/* What the weights of a row add up to, a vector whose lanes are added at the end. */
INLINE float *total_of(const Scratch *s, i64 row, i64 group)
{
    return s->totals + ((query_of(row) - s->first) * group + head_of(row) - s->head) * W;
}

INLINE i64 pick_of(const Call *call, i64 index)
{
    if (call->wide_picks) return ((const int32_t *)call->picks)[index];
    const i64 pick = ((const uint16_t *)call->picks)[index];
    return pick == 65535 ? -1 : pick;
}
