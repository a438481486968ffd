/* Attention on the threads of a CPU: a query's own segment up to itself, and the chunks it picked. See attend/README.md.
 *
 * Forward: a thread owns the queries of a block under one KV head. Their results stay in its cache while it goes through
 * the keys, 256 at a time and packed for the products: first the segment, then chunk after chunk, each with the rows of
 * the block that picked it. Softmax is online: a row holds its highest score so far and what its weights add up to.
 *
 * Backward: a cell is a block of queries and a range of keys. A cell adds to dq after the cell of the same queries before
 * it, and to dk and dv after that of the same keys, so sums have one order whatever the threads do. Cells are handed out
 * antidiagonal by antidiagonal, so what a cell waits for has been handed out before.
 */

#include "masks.h"

#include <pthread.h>
#include <sched.h>

typedef struct {
    Call *call;
    bool backward;
    i64 num_blocks;
    atomic_long ticket;
    atomic_bool failed;
    atomic_char *done; /* backward: [K, A, blocks] */
    pthread_mutex_t counts;
} Job;

static void read_rows(const Rows *from, const i64 *rows, i64 num, i64 dim, float *to)
{
    for (i64 i = 0; i < num; i++) read_row(from, query_of(rows[i]), head_of(rows[i]), dim, to + i * up(dim, W));
}

/* Fold keys into the results of rows, of which row i sees the first seen[i]; `width` covers them all. */
static void forward_tile(const Call *call, Scratch *s, const i64 *rows, const i64 *seen, i64 num, i64 width)
{
    const i64 q = up(call->dim, W), group = call->num_heads / call->num_kv_heads;
    const float scale = (float)call->scale;
    read_rows(&call->q, rows, num, call->dim, s->q);
    product(num, width, call->dim, (Matrix){s->q, q, 1}, s->k_columns, s->weights_of, false);
    for (i64 i = 0; i < num; i++) {
        float *weights = s->weights_of[i], *out = call->out + nth(call, rows[i]) * call->value_dim;
        float *total = total_of(s, rows[i], group), *highest = call->lse + nth(call, rows[i]);
        s->into[i] = out;
        const bool masked = is_masked(call, rows[i]);
        if (masked) {
            for (i64 j = 0; j < width; j += W) store(weights + j, load(weights + j) * scale);
            s->attended -= hide(call, s, rows[i], weights, -INFINITY);
        }
        const float times = masked ? 1 : scale; /* scaled before the mask: -inf * 0 would be NaN */
        vf top = splat(-INFINITY);
        for (i64 j = 0; j < width; j += W) {
            vf x = load(weights + j) * times;
            if (j + W > seen[i])
                for (i64 lane = max64(0, seen[i] - j); lane < W; lane++) x[lane] = -INFINITY;
            store(weights + j, x);
            top = vmax(x, top);
        }
        vf sum = load(total);
        if (any(top > splat(*highest))) {
            const float here = top_of(top), shrink = expf(*highest - here); /* 0 for the first keys of a row */
            for (i64 d = 0; d < call->value_dim; d++) out[d] *= shrink;
            sum *= shrink;
            *highest = here;
        }
        const float subtract = *highest == -INFINITY ? 0.0f : *highest; /* a row that has seen nothing yet */
        for (i64 j = 0; j < width; j += W) {
            const vf weight = vexp(load(weights + j) - subtract);
            store(weights + j, weight);
            sum += weight;
        }
        store(total, sum);
    }
    product(num, call->value_dim, width, (Matrix){s->weights, WEIGHTS, 1}, s->v_rows, s->into, true);
}

/* p = exp(scale q k - lse); ds = scale p (dout v - delta); dq += ds k, dk += ds q, dv += p dout. */
static void backward_tile(const Call *call, Scratch *s, const i64 *rows, const i64 *seen, i64 num, i64 width)
{
    const i64 q = up(call->dim, W), v = up(call->value_dim, W);
    const float scale = (float)call->scale;
    read_rows(&call->q, rows, num, call->dim, s->q);
    read_rows(&call->dout, rows, num, call->value_dim, s->dout);
    product(num, width, call->dim, (Matrix){s->q, q, 1}, s->k_columns, s->weights_of, false);
    product(num, width, call->value_dim, (Matrix){s->dout, v, 1}, s->v_columns, s->dscores_of, false);
    for (i64 i = 0; i < num; i++) {
        float *weights = s->weights_of[i], *dscores = s->dscores_of[i];
        const float lse = call->lse[nth(call, rows[i])], delta = call->delta[nth(call, rows[i])];
        s->into[i] = call->dq + nth(call, rows[i]) * call->dim;
        for (i64 j = 0; j < width; j += W) {
            vf weight = vexp(rounded(load(weights + j) * scale) - lse); /* the forward pass's scores, to the bit */
            if (j + W > seen[i])
                for (i64 lane = max64(0, seen[i] - j); lane < W; lane++) weight[lane] = 0;
            store(weights + j, weight);
            store(dscores + j, (load(dscores + j) - delta) * scale * weight);
        }
        if (is_masked(call, rows[i])) {
            s->attended -= hide(call, s, rows[i], weights, 0);
            hide(call, s, rows[i], dscores, 0);
        }
    }
    product(num, call->dim, width, (Matrix){s->dscores, WEIGHTS, 1}, s->k_rows, s->into, true);
    product(width, v, num, (Matrix){s->weights, 1, WEIGHTS}, (Panels){s->dout, num, v, true}, s->dv_of, true);
    product(width, q, num, (Matrix){s->dscores, 1, WEIGHTS}, (Panels){s->q, num, q, true}, s->dk_of, true);
}

static void add_rows(float *to, const float *from, i64 num, i64 dim, i64 to_row, i64 from_row)
{
    for (i64 j = 0; j < num; j++)
        for (i64 d = 0; d < dim; d++) to[j * to_row + d] += from[j * from_row + d];
}

/* Rows of one KV head against keys first .. first + count - 1, of which row i sees limits[i] (all without limits). */
static void visit(const Call *call, Scratch *s, bool backward, i64 kv_head, const i64 *rows, const i64 *limits, i64 num,
                  i64 first, i64 count)
{
    const i64 dim = call->dim, value_dim = call->value_dim, q = up(dim, W), v = up(value_dim, W);
    const i64 at_once = backward ? KEYS_BACKWARD : KEYS;
    i64 seen[ROWS], row = 0;
    for (i64 begin = 0; begin < count; begin += at_once) {
        const i64 some = min64(at_once, count - begin), at = (first + begin) * call->num_kv_heads + kv_head;
        while (limits && row < num && limits[row] <= begin) row++; /* limits ascend */
        if (row == num) return;
        if (limits && call->num_words) find_tile(call, s, first + begin, some);
        pack(&call->k, first + begin, some, kv_head, dim, s->lines, backward ? &s->k_rows : NULL, &s->k_columns);
        pack(&call->v, first + begin, some, kv_head, value_dim, s->lines, backward ? NULL : &s->v_rows,
             backward ? &s->v_columns : NULL);
        if (backward) {
            memset(s->dk, 0, KEYS_BACKWARD * q * sizeof(float));
            memset(s->dv, 0, KEYS_BACKWARD * v * sizeof(float));
        }
        for (i64 from = row; from < num; from += ROWS) {
            const i64 tile = min64(ROWS, num - from);
            i64 most = 0;
            for (i64 i = 0; i < tile; i++) {
                seen[i] = limits ? min64(some, limits[from + i] - begin) : some;
                most = max64(most, seen[i]);
                s->attended += seen[i];
            }
            const i64 width = up(most, W);
            s->scored += tile * width;
            if (backward) backward_tile(call, s, rows + from, seen, tile, width);
            else forward_tile(call, s, rows + from, seen, tile, width);
        }
        if (backward) {
            add_rows(call->dk + at * dim, s->dk, some, dim, call->num_kv_heads * dim, q);
            add_rows(call->dv + at * value_dim, s->dv, some, value_dim, call->num_kv_heads * value_dim, v);
        }
    }
}

/* Queries first .. stop - 1 against the keys of their segments that lie in a range. */
static void segments(const Call *call, Scratch *s, bool backward, i64 kv_head, i64 first, i64 stop, i64 range)
{
    const i64 group = call->num_heads / call->num_kv_heads, low = call->range_keys[range];
    const i64 high = call->range_keys[range + 1];
    for (i64 begin = first, end = first; begin < stop; begin = end) {
        while (end < stop && call->own_begin[end] == call->own_begin[begin]) end++;
        const i64 from = max64(call->own_begin[begin], low), to = min64(call->own_end[end - 1], high);
        i64 num = 0;
        for (i64 t = begin; from < to && t < end; t++) {
            const i64 limit = min64(call->own_end[t], high) - from;
            for (i64 g = 0; limit > 0 && g < group; g++) {
                s->own_rows[num] = row_of(t, s->head + g);
                s->own_limits[num++] = limit;
            }
        }
        visit(call, s, backward, kv_head, s->own_rows, s->own_limits, num, from, to - from);
    }
}

/* Queries first .. stop - 1 against the chunks of a range that they picked: a counting sort, then chunk after chunk. */
static void picked(const Call *call, Scratch *s, bool backward, i64 kv_head, i64 first, i64 stop, i64 range)
{
    const i64 group = call->num_heads / call->num_kv_heads, routed = routed_of(call);
    const i64 members = group / routed, slots = call->num_slots;
    const i64 chunk0 = call->range_chunks[range], chunks = call->range_chunks[range + 1] - chunk0;
    i64 num = 0;
    for (i64 t = first; t < stop; t++)
        for (i64 r = 0; call->ways[t] == LISTED && r < routed; r++) {
            const i64 at = t * call->picks_token + (kv_head * routed + r) * call->picks_head;
            const i64 row = row_of(t, s->head + r * members);
            for (i64 p = 0; p < slots; p++) { /* no branch, which would be guessed wrong half of the time */
                const i64 chunk = pick_of(call, at + p) - chunk0;
                s->chunks[num] = (int32_t)chunk;
                s->listed[num] = row;
                num += chunk >= 0 && chunk < chunks; /* -1 - chunk0 is no chunk either */
            }
        }
    memset(s->ends, 0, (chunks + 1) * sizeof(i64));
    for (i64 n = 0; n < num; n++) s->ends[s->chunks[n] + 1] += members;
    for (i64 c = 0; c < chunks; c++) s->ends[c + 1] += s->ends[c];
    for (i64 n = 0; n < num; n++)
        for (i64 m = 0; m < members; m++) s->rows[s->ends[s->chunks[n]]++] = s->listed[n] + m;
    for (i64 c = 0, begin = 0; c < chunks; begin = s->ends[c++]) {
        const i64 key = call->chunk_keys[chunk0 + c], keys = call->chunk_keys[chunk0 + c + 1] - key;
        if (s->ends[c] > begin)
            visit(call, s, backward, kv_head, s->rows + begin, NULL, s->ends[c] - begin, key, keys);
    }
}

static void cell(const Call *call, Scratch *s, bool backward, i64 kv_head, i64 first, i64 stop, i64 range)
{
    s->first = first;
    s->head = kv_head * (call->num_heads / call->num_kv_heads);
    if (call->num_words) mark(call, s, kv_head, first, stop);
    segments(call, s, backward, kv_head, first, stop, range);
    if (call->picks) picked(call, s, backward, kv_head, first, stop, range);
}

static void forward_block(const Call *call, Scratch *s, i64 kv_head, i64 first, i64 stop)
{
    const i64 group = call->num_heads / call->num_kv_heads, dim = call->value_dim;
    for (i64 t = first; t < stop; t++)
        for (i64 row = t * call->num_heads + kv_head * group, g = 0; g < group; g++, row++) {
            memset(call->out + row * dim, 0, dim * sizeof(float));
            call->lse[row] = -INFINITY; /* the highest score, until the end */
        }
    memset(s->totals, 0, (stop - first) * group * W * sizeof(float));
    for (i64 range = 0; range < call->num_ranges; range++) cell(call, s, false, kv_head, first, stop, range);
    for (i64 n = 0; n < (stop - first) * group; n++) {
        const i64 row = (first + n / group) * call->num_heads + kv_head * group + n % group;
        const float total = sum_of(load(s->totals + n * W));
        if (call->lse[row] == -INFINITY && total == 0) continue;
        for (i64 d = 0; d < dim; d++) call->out[row * dim + d] /= total;
        call->lse[row] += logf(total);
    }
}

static void backward_cell(const Job *job, Scratch *s, i64 kv_head, i64 nth)
{
    const Call *call = job->call;
    const i64 ranges = call->num_ranges, blocks = job->num_blocks;
    i64 diagonal = 0;
    for (;; diagonal++) {
        const i64 size = min64(min64(diagonal + 1, ranges + blocks - 1 - diagonal), min64(ranges, blocks));
        if (nth < size) break;
        nth -= size;
    }
    const i64 range = max64(0, diagonal - blocks + 1) + nth, block = diagonal - range;
    atomic_char *done = job->done + (kv_head * ranges + range) * blocks + block;
    while (range && !atomic_load_explicit(done - blocks, memory_order_acquire) && !atomic_load(&job->failed)) sched_yield();
    while (block && !atomic_load_explicit(done - 1, memory_order_acquire) && !atomic_load(&job->failed)) sched_yield();
    const i64 first = block * call->query_block;
    cell(call, s, true, kv_head, first, min64(call->num_queries, first + call->query_block), range);
    atomic_store_explicit(done, 1, memory_order_release);
}

static void work(void *argument)
{
    Job *job = argument;
    Call *call = job->call;
    Scratch s = {0};
    const i64 heads = call->num_kv_heads, cells = heads * job->num_blocks * (job->backward ? call->num_ranges : 1);
    i64 ticket = atomic_fetch_add(&job->ticket, 1);
    if (ticket >= cells) return; /* nothing is left for this thread */
    char *memory = aligned_alloc(64, lay_out(call, &s, NULL));
    if (!memory) {
        atomic_store(&job->failed, true);
        return;
    }
    lay_out(call, &s, memory);
    for (; ticket < cells && !atomic_load(&job->failed); ticket = atomic_fetch_add(&job->ticket, 1)) {
        const i64 first = ticket / heads * call->query_block;
        if (job->backward) backward_cell(job, &s, ticket % heads, ticket / heads);
        else forward_block(call, &s, ticket % heads, first, min64(call->num_queries, first + call->query_block));
    }
    pthread_mutex_lock(&job->counts);
    call->attended += s.attended;
    call->scored += s.scored;
    pthread_mutex_unlock(&job->counts);
    free(memory);
}

/* 0, or 1 where there was not enough memory. */
int moba_attend(Call *call, int backward)
{
    Job job = {.call = call, .backward = backward, .counts = PTHREAD_MUTEX_INITIALIZER};
    job.num_blocks = (call->num_queries + call->query_block - 1) / call->query_block;
    job.done = calloc(call->num_kv_heads * call->num_ranges * job.num_blocks, 1);
    if (!job.done) return 1;
    moba_on_threads(call->num_threads, call->num_kv_heads * job.num_blocks, work, &job);
    free(job.done);
    return job.failed;
}
