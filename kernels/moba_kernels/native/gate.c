/* The gate on the threads of a CPU: the chunks that every query picks. See route/README.md.
 *
 * A thread owns the queries of a block under one KV head. It goes through the chunks that any of them may pick, some at a
 * time and packed for products in fp64; every score is rounded to fp32 once and kept if it may be among a row's best. A
 * row collects what it keeps until there is no more room, and then goes on with its best so far.
 *
 * T queries at hand, C chunks, H query heads, K KV heads, R heads that pick, P picks. A row is one (query, head that
 * picks) of a block.
 */

#include "rows.h"
#include "threads.h"

typedef double vd __attribute__((vector_size(4 * W), aligned(8), may_alias));
typedef i64 vl __attribute__((vector_size(4 * W), aligned(8), may_alias));
typedef float vh __attribute__((vector_size(2 * W), aligned(4), may_alias));
typedef int32_t vhi __attribute__((vector_size(2 * W), aligned(4), may_alias));

/* A tile of the products has TILE rows and WIDE chunks, and some tiles' chunks are packed at once; SPARE is what a row
 * collects beyond twice its picks; up to FEW keys are sorted by counting.
 */
enum { LANES = W / 2, TILE = 6, WIDE = PANEL * LANES, CHUNKS = 4 * WIDE, SPARE = 32, FEW = 4 * LANES };

/* route/native.py has the same structure. */
typedef struct {
    Rows q, means; /* [T,H,D]; [C,K,D] */
    const i64 *first, *own; /* [T], ascending: a query's candidates are chunks first .. own - 1 */
    void *picks;            /* [T,R,P]: int16 or int32, -1 = none */
    i64 num_queries, num_heads, num_kv_heads, num_routed, num_slots, dim, wide_picks;
    i64 query_block, num_threads;
} Gate;

/* What a thread works in; one allocation. A key is a score above its chunk: no two are equal, and ties go to the later
 * chunk.
 */
typedef struct {
    float *line;
    double *q, *means;      /* [rows, D]; [D, WIDE] for every WIDE chunks */
    int32_t *scores;        /* [TILE, CHUNKS], as integers that sort as the scores do */
    i64 *keys, *other;      /* [rows, room]; [room] */
    i64 *count;             /* [rows]: keys at hand */
    int32_t *lowest;        /* [rows]: scores below it are not among the best */
    uint32_t random;
} Scratch;

typedef struct {
    Gate *gate;
    i64 num_blocks;
    atomic_long ticket;
    atomic_bool failed;
} Job;

INLINE i64 rows_of_query(const Gate *gate) { return gate->num_routed / gate->num_kv_heads; }
INLINE i64 room_of(const Gate *gate) { return 2 * gate->num_slots + SPARE + W; }

/* Bytes of a scratch, which begins at `memory`. */
static i64 lay_out(const Gate *gate, Scratch *s, char *memory)
{
    const i64 rows = up(gate->query_block * rows_of_query(gate), TILE), room = room_of(gate);
    i64 at = 0;
    s->line = take(memory, &at, up(gate->dim, W) * sizeof(float));
    s->q = take(memory, &at, rows * gate->dim * sizeof(double));
    s->means = take(memory, &at, CHUNKS * gate->dim * sizeof(double));
    s->scores = take(memory, &at, (TILE * CHUNKS + W) * sizeof(int32_t)); /* read in whole vectors from anywhere */
    s->keys = take(memory, &at, (rows * room + FEW) * sizeof(i64));
    s->other = take(memory, &at, (room + LANES) * sizeof(i64));
    s->count = take(memory, &at, rows * sizeof(i64));
    s->lowest = take(memory, &at, rows * sizeof(int32_t));
    return at;
}

/* Queries from .. from + num - 1 in fp64, their heads summed where a group picks as one. */
static void read_queries(const Gate *gate, Scratch *s, i64 kv_head, i64 from, i64 num)
{
    const i64 per_query = rows_of_query(gate), members = gate->num_heads / gate->num_routed, rows = num * per_query;
    memset(s->q, 0, up(rows, TILE) * gate->dim * sizeof(double));
    for (i64 row = 0; row < rows; row++)
        for (i64 m = 0; m < members; m++) {
            const i64 head = (kv_head * per_query + row % per_query) * members + m;
            double *to = s->q + row * gate->dim;
            read_row(&gate->q, from + row / per_query, head, gate->dim, s->line);
            for (i64 d = 0; d < gate->dim; d++) to[d] += s->line[d];
        }
}

/* Chunks from .. from + num - 1 in fp64, WIDE side by side, zeros up to WIDE. */
static void read_means(const Gate *gate, Scratch *s, i64 kv_head, i64 from, i64 num)
{
    for (i64 c = 0; c < up(num, WIDE); c++) {
        double *to = s->means + c / WIDE * WIDE * gate->dim + c % WIDE;
        if (c < num) read_row(&gate->means, from + c, kv_head, gate->dim, s->line);
        else memset(s->line, 0, gate->dim * sizeof(float));
        for (i64 d = 0; d < gate->dim; d++) to[d * WIDE] = s->line[d];
    }
}

/* Scores of TILE rows and WIDE chunks. Each is one chain of products over D, whatever else is in the call. */
static __attribute__((noinline)) void score_tile(i64 dim, const double *q, const double *means, int32_t *scores)
{
    vd sum[TILE][PANEL];
#pragma GCC unroll 6
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
        for (int j = 0; j < PANEL; j++) sum[i][j] = (vd){0};
    for (i64 d = 0; d < dim; d++) {
        vd mean[PANEL];
#pragma GCC unroll 4
        for (int j = 0; j < PANEL; j++) mean[j] = *(const vd *)(means + d * WIDE + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < TILE; i++) {
            const vd x = q[i * dim + d] - (vd){0};
#pragma GCC unroll 4
            for (int j = 0; j < PANEL; j++) sum[i][j] += x * mean[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
        for (int j = 0; j < PANEL; j++) {
            const vh score = __builtin_convertvector(sum[i][j], vh) + 0.0f; /* makes -0 and 0 the same */
            const vhi bits = (vhi)score;
            *(vhi *)(scores + i * CHUNKS + j * LANES) = bits ^ ((bits >> 31) & 0x7fffffff); /* sorts as an integer */
        }
}

/* keys in falling order, by how many are above each; up to FEW, whole vectors are read. */
INLINE void sort_few(i64 *keys, i64 num)
{
    vl key[FEW / LANES], above[FEW / LANES];
    i64 sorted[FEW], place[FEW];
#pragma GCC unroll 4
    for (int v = 0; v < FEW / LANES; v++) {
        key[v] = *(const vl *)(keys + v * LANES);
        above[v] = (vl){0};
    }
    for (i64 i = 0; i < num; i++) {
        const vl other = keys[i] - (vl){0};
#pragma GCC unroll 4
        for (int v = 0; v < FEW / LANES; v++) above[v] -= other > key[v];
    }
    memcpy(place, above, sizeof place);
    for (i64 i = 0; i < num; i++) sorted[place[i]] = keys[i];
    memcpy(keys, sorted, num * sizeof(i64));
}

INLINE i64 any_of(Scratch *s, const i64 *keys, i64 num)
{
    s->random = s->random * 1664525u + 1013904223u; /* Numerical Recipes */
    return keys[(uint64_t)s->random * num >> 32];
}

/* The keys above one of them come first; how many these are: at least one, and not all. num >= 3. */
static i64 split(Scratch *s, i64 *keys, i64 num)
{
    const i64 third = num / 3;
    const i64 a = any_of(s, keys, third), b = any_of(s, keys + third, third), c = any_of(s, keys + 2 * third, third);
    const i64 pivot = max64(min64(a, b), min64(max64(a, b), c));
    i64 high = 0, *other = s->other, i = 0;
#if defined(__AVX512F__)
    for (; i + LANES <= num; i += LANES) {
        const __m512i key = _mm512_loadu_si512(keys + i);
        const __mmask8 up = _mm512_cmpgt_epi64_mask(key, _mm512_set1_epi64(pivot));
        _mm512_storeu_si512(keys + high, _mm512_maskz_compress_epi64(up, key));
        _mm512_storeu_si512(other + i - high, _mm512_maskz_compress_epi64(~up, key));
        high += __builtin_popcount(up);
    }
#endif
    for (; i < num; i++) { /* no branch, which would be guessed wrong half of the time */
        const i64 key = keys[i];
        keys[high] = other[i - high] = key;
        high += key > pivot;
    }
    memcpy(keys + high, other, (num - high) * sizeof(i64));
    return high;
}

/* The `most` largest of keys come first, in falling order if they shall be sorted: Hoare's Find and Quicksort. */
static void best(Scratch *s, i64 *keys, i64 num, i64 most, bool sorted)
{
    while (num > FEW && most > 0) {
        const i64 high = split(s, keys, num);
        if (high > most) {
            num = high;
            continue;
        }
        if (sorted) best(s, keys, high, high, true);
        keys += high;
        num -= high;
        most -= high;
    }
    if (most > 0) sort_few(keys, num);
}

/* Scores of chunks chunk .. chunk + num - 1 for a row: those that may be among its best are kept. */
static void collect(const Gate *gate, Scratch *s, i64 row, const int32_t *scores, i64 chunk, i64 num)
{
    const i64 room = room_of(gate), slots = gate->num_slots;
    i64 *keys = s->keys + row * room, count = s->count[row];
    int32_t lowest = s->lowest[row];
    for (i64 j = 0; j < num; j += W) {
        if (!any(*(const vi *)(scores + j) >= lowest - (vi){0})) continue;
        for (i64 lane = j; lane < min64(num, j + W); lane++) {
            keys[count] = (i64)((uint64_t)(uint32_t)scores[lane] << 32 | (uint64_t)(chunk + lane));
            count += scores[lane] >= lowest;
        }
        if (count < room - W) continue;
        best(s, keys, count, slots, false);
        count = slots;
        i64 least = keys[0];
        for (i64 i = 1; i < slots; i++) least = min64(least, keys[i]);
        lowest = (int32_t)(least >> 32);
    }
    s->count[row] = count;
    s->lowest[row] = lowest;
}

static void write_picks(const Gate *gate, Scratch *s, i64 row, i64 to)
{
    const i64 slots = gate->num_slots, some = min64(s->count[row], slots);
    i64 *keys = s->keys + row * room_of(gate);
    best(s, keys, s->count[row], some, true);
    for (i64 p = 0; p < slots; p++) {
        const int32_t pick = p < some ? (int32_t)keys[p] : -1;
        if (gate->wide_picks) ((int32_t *)gate->picks)[to + p] = pick;
        else ((int16_t *)gate->picks)[to + p] = (int16_t)pick;
    }
}

static void gate_block(const Gate *gate, Scratch *s, i64 kv_head, i64 from, i64 num)
{
    const i64 per_query = rows_of_query(gate), rows = num * per_query, stop = gate->own[from + num - 1];
    read_queries(gate, s, kv_head, from, num);
    for (i64 row = 0; row < rows; row++) {
        s->count[row] = 0;
        s->lowest[row] = INT32_MIN;
    }
    for (i64 begin = gate->first[from]; begin < stop; begin += CHUNKS) {
        const i64 end = min64(stop, begin + CHUNKS);
        read_means(gate, s, kv_head, begin, end - begin);
        for (i64 row = 0; row < rows; row += TILE) {
            const i64 most = min64(TILE, rows - row);
            const i64 low = max64(begin, gate->first[from + row / per_query]);
            const i64 high = min64(end, gate->own[from + (row + most - 1) / per_query]);
            for (i64 at = (low - begin) / WIDE * WIDE; at < high - begin; at += WIDE)
                score_tile(gate->dim, s->q + row * gate->dim, s->means + at * gate->dim, s->scores + at);
            for (i64 i = 0; i < most; i++) {
                const i64 query = from + (row + i) / per_query;
                const i64 chunk = max64(begin, gate->first[query]), num_chunks = min64(end, gate->own[query]) - chunk;
                collect(gate, s, row + i, s->scores + i * CHUNKS + chunk - begin, chunk, num_chunks);
            }
        }
    }
    for (i64 row = 0; row < rows; row++)
        write_picks(gate, s, row,
                    ((from + row / per_query) * gate->num_routed + kv_head * per_query + row % per_query) *
                        gate->num_slots);
}

static void work(void *argument)
{
    Job *job = argument;
    const Gate *gate = job->gate;
    Scratch s = {0};
    const i64 heads = gate->num_kv_heads, parts = heads * job->num_blocks;
    i64 ticket = atomic_fetch_add(&job->ticket, 1);
    if (ticket >= parts) return; /* nothing is left for this thread */
    char *memory = aligned_alloc(64, lay_out(gate, &s, NULL));
    if (!memory) {
        atomic_store(&job->failed, true);
        return;
    }
    lay_out(gate, &s, memory);
    for (; ticket < parts && !atomic_load(&job->failed); ticket = atomic_fetch_add(&job->ticket, 1)) {
        const i64 from = (job->num_blocks - 1 - ticket / heads) * gate->query_block; /* most candidates first */
        gate_block(gate, &s, ticket % heads, from, min64(gate->query_block, gate->num_queries - from));
    }
    free(memory);
}

/* 0, or 1 where there was not enough memory. */
int moba_gate(Gate *gate)
{
    Job job = {.gate = gate, .num_blocks = (gate->num_queries + gate->query_block - 1) / gate->query_block};
    moba_on_threads(gate->num_threads, gate->num_kv_heads * job.num_blocks, work, &job);
    return job.failed;
}
