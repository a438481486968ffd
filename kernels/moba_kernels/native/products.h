/* Products of small matrices of fp32, and keys packed for them. */

#pragma once

#include "rows.h"

enum { MOST_ROWS = 12 };

/* A matrix whose element (i, k) is at i * row + k * step. */
typedef struct {
    const float *data;
    i64 row, step;
} Matrix;

/* c[i][column ..] (+)= a[i, :depth] b[:depth, NV vectors] for MR rows, `last` lanes of the last vector.
 *
 * Every element is one chain of products over k, whatever MR and NV: a row's bits do not depend on its neighbours.
 */
INLINE void multiply(const int MR, const int NV, i64 depth, Matrix a, const float *b, i64 b_row, float *const *c,
                     i64 column, i64 last, bool add)
{
    vf sum[MOST_ROWS][PANEL];
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = (vf){0};
    for (i64 k = 0; k < depth; k++) {
        vf row[PANEL];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) row[j] = load(b + k * b_row + j * W);
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            const vf x = splat(a.data[i * a.row + k * a.step]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            float *to = c[i] + column + j * W;
            const i64 lanes = j == NV - 1 ? last : W;
            if (add) sum[i][j] += load_part(to, lanes);
            store_part(to, sum[i][j], lanes);
        }
}

/* The shapes of tiles: fewer vectors leave registers for more rows, and it takes some eight sums to keep the units busy. */
#define ROWS_OF_ANY(f, NV) f(6, NV) f(4, NV) f(3, NV) f(2, NV) f(1, NV)
#define ROWS_OF_1(f) f(12, 1) f(8, 1) ROWS_OF_ANY(f, 1)
#if PANEL == 4
#define ROWS_OF_2(f) f(12, 2) f(8, 2) ROWS_OF_ANY(f, 2)
#else
#define ROWS_OF_2(f) ROWS_OF_ANY(f, 2)
#endif

typedef void Tile(i64, Matrix, const float *, i64, float *const *, i64, i64, bool);
#define DEFINE(MR, NV)                                                                                               \
    static __attribute__((noinline)) void tile_##MR##_##NV(i64 depth, Matrix a, const float *b, i64 b_row,           \
                                                           float *const *c, i64 column, i64 last, bool add)          \
    {                                                                                                                \
        multiply(MR, NV, depth, a, b, b_row, c, column, last, add);                                                  \
    }
ROWS_OF_1(DEFINE)
ROWS_OF_2(DEFINE)
#if PANEL == 4
ROWS_OF_ANY(DEFINE, 3)
ROWS_OF_ANY(DEFINE, 4)
#endif

INLINE Tile *tile_of(i64 rows, i64 vectors, i64 *taken)
{
#define TAKE(MR, NV)                                                                                                 \
    if (rows >= MR) {                                                                                                \
        *taken = MR;                                                                                                 \
        return tile_##MR##_##NV;                                                                                     \
    }
    switch (vectors) {
    case 1: ROWS_OF_1(TAKE) break;
    case 2: ROWS_OF_2(TAKE) break;
#if PANEL == 4
    case 3: ROWS_OF_ANY(TAKE, 3) break;
    case 4: ROWS_OF_ANY(TAKE, 4) break;
#endif
    }
    return NULL;
}

/* b [rows, columns] in panels of PANEL vectors side by side: panel after panel, each [rows, its width], the last one
 * narrower. Columns are whole vectors. As `plain` it is one row after another, as it would be anywhere.
 */
typedef struct {
    float *data;
    i64 rows, columns;
    bool plain;
} Panels;

/* c[i][:columns] (+)= a[i, :depth] b[:depth, :columns] for `rows` rows. */
static void product(i64 rows, i64 columns, i64 depth, Matrix a, Panels b, float *const *c, bool add)
{
    for (i64 column = 0; column < columns; column += PANEL * W) {
        const i64 width = min64(PANEL * W, b.columns - column), some = min64(width, columns - column);
        const i64 vectors = up(some, W) / W, last = some - (vectors - 1) * W;
        const float *panel = b.data + (b.plain ? column : column * b.rows);
        for (i64 row = 0, taken = 0; row < rows; row += taken) {
            const Matrix from = {a.data + row * a.row, a.row, a.step};
            tile_of(rows - row, vectors, &taken)(depth, from, panel, b.plain ? b.columns : width, c + row, column, last,
                                                 add);
        }
    }
}

/* to[d * stride + j] = from[j * dim + d] for four rows j; dim is a multiple of 4. */
INLINE void transpose4(const float *from, i64 dim, float *to, i64 stride)
{
    for (i64 d = 0; d < dim; d += 4) {
        const v4 a = *(const v4 *)(from + d), b = *(const v4 *)(from + dim + d);
        const v4 c = *(const v4 *)(from + 2 * dim + d), e = *(const v4 *)(from + 3 * dim + d);
        const v4 ab01 = MIX(a, b, 0, 4, 1, 5), ab23 = MIX(a, b, 2, 6, 3, 7);
        const v4 ce01 = MIX(c, e, 0, 4, 1, 5), ce23 = MIX(c, e, 2, 6, 3, 7);
        *(v4 *)(to + d * stride) = MIX(ab01, ce01, 0, 1, 4, 5);
        *(v4 *)(to + (d + 1) * stride) = MIX(ab01, ce01, 2, 3, 6, 7);
        *(v4 *)(to + (d + 2) * stride) = MIX(ab23, ce23, 0, 1, 4, 5);
        *(v4 *)(to + (d + 3) * stride) = MIX(ab23, ce23, 2, 3, 6, 7);
    }
}

/* Keys first .. first + count - 1 of a head, zeros up to whole vectors: [keys, dim] and [dim, keys], where asked for. */
static void pack(const Rows *from, i64 first, i64 count, i64 head, i64 dim, float *lines, Panels *rows, Panels *columns)
{
    const i64 keys = up(count, W), width = up(dim, W);
    if (rows) *rows = (Panels){rows->data, keys, width, false};
    if (columns) *columns = (Panels){columns->data, width, keys, false};
    for (i64 four = 0; four < keys; four += 4) {
        for (i64 j = four; j < four + 4; j++) {
            float *line = lines + (j - four) * width;
            if (j < count) read_row(from, first + j, head, dim, line);
            else memset(line, 0, width * sizeof(float));
            for (i64 column = 0; rows && column < width; column += PANEL * W) {
                const i64 some = min64(PANEL * W, width - column);
                float *to = rows->data + column * keys + j * some;
                for (i64 d = 0; d < some; d += W) store(to + d, load(line + column + d));
            }
        }
        if (columns) {
            const i64 panel = four / (PANEL * W) * (PANEL * W), some = min64(PANEL * W, keys - panel);
            transpose4(lines, width, columns->data + panel * width + four - panel, some);
        }
    }
}
