/* MASKED queries: all chunks of their document before their own are multiplied out, and those not picked are hidden. */

#pragma once

#include "call.h"

/* Note which chunks MASKED queries of first .. stop - 1 picked. */
static void mark(const Call *call, Scratch *s, i64 kv_head, i64 first, i64 stop)
{
    const i64 routed = routed_of(call);
    uint64_t *taken = s->taken;
    memset(taken, 0, (stop - first) * routed * call->num_words * sizeof(uint64_t));
    for (i64 t = first; t < stop; t++)
        for (i64 r = 0; r < routed; r++, taken += call->num_words) {
            const i64 at = t * call->picks_token + (kv_head * routed + r) * call->picks_head;
            for (i64 p = 0; call->ways[t] == MASKED && p < call->num_slots; p++) {
                const i64 pick = pick_of(call, at + p), n = call->own_chunk[t] - 1 - pick;
                if (pick >= 0 && n >= 0 && n < call->num_words * 64) taken[n / 64] |= (uint64_t)1 << n % 64;
            }
        }
}

/* Note the keys of a tile, and which chunks have some of them. */
static void find_tile(const Call *call, Scratch *s, i64 key, i64 num_keys)
{
    const i64 num_chunks = call->range_chunks[call->num_ranges];
    s->key = key;
    s->num_keys = num_keys;
    i64 low = 0, high = num_chunks; /* chunk_keys[low] <= key < chunk_keys[high] */
    while (low + 1 < high) {
        const i64 middle = (low + high) / 2;
        if (call->chunk_keys[middle] <= key) low = middle;
        else high = middle;
    }
    s->chunk = low;
    while (low < num_chunks && call->chunk_keys[low] < key + num_keys) low++;
    s->chunk_stop = low;
}

INLINE bool is_masked(const Call *call, i64 row) { return call->num_words && call->ways[query_of(row)] == MASKED; }

/* Of the chunks before a MASKED row's own, put `hidden` in place of what it did not pick, and return how many keys. */
static i64 hide(const Call *call, const Scratch *s, i64 row, float *scores, float hidden)
{
    const i64 members = call->num_heads / call->num_routed, own = call->own_chunk[query_of(row)];
    const i64 nearest = max64(0, own - s->chunk_stop), farthest = own - 1 - s->chunk;
    const i64 picking = (query_of(row) - s->first) * routed_of(call) + (head_of(row) - s->head) / members;
    const uint64_t *taken = s->taken + picking * call->num_words;
    i64 keys = 0;
    for (i64 n = nearest, some = 0; n <= farthest; n += some) {
        some = min64(64 - n % 64, farthest + 1 - n);
        uint64_t left = ~taken[n / 64] >> n % 64;
        if (some < 64) left &= ((uint64_t)1 << some) - 1;
        for (; left; left &= left - 1) {
            const i64 *edge = call->chunk_keys + own - 1 - (n + __builtin_ctzll(left));
            const i64 from = max64(edge[0] - s->key, 0), to = min64(edge[1] - s->key, s->num_keys);
            i64 j = from;
            for (; j + W <= to; j += W) store(scores + j, splat(hidden));
            for (; j < to; j++) scores[j] = hidden;
            keys += to - from;
        }
    }
    return keys;
}
