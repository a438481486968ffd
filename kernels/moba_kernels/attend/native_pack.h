/* Rows of tensors in fp32, and keys packed for the products of native_math.h. */

#include "native_math.h"

/* [tokens, heads, dim], its last dim dense. native.py has the same structure. */
typedef struct {
    const void *data;
    i64 token, head; /* elements from one to the next */
    i64 dtype;       /* 0 fp32, 1 bf16, 2 fp16 */
} Rows;

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

/* The exponent's bias is 112 more in fp32; inf and NaN have all of its bits set. Not every compiler has _Float16. */
INLINE float of_half(uint16_t half)
{
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p112f;
    memcpy(&bits, &x, sizeof x);
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* One row in fp32, zeros up to whole vectors. */
INLINE void read_row(const Rows *from, i64 token, i64 head, i64 dim, float *to)
{
    const i64 at = token * from->token + head * from->head;
    i64 d = 0;
    if (from->dtype == 0) {
        const float *row = (const float *)from->data + at;
        for (; d + W <= dim; d += W) store(to + d, load(row + d));
        for (; d < dim; d++) to[d] = row[d];
    } else if (from->dtype == 1) {
        const uint16_t *row = (const uint16_t *)from->data + at;
        for (; d < dim; d++) {
            const uint32_t bits = (uint32_t)row[d] << 16;
            memcpy(to + d, &bits, sizeof bits);
        }
    } else {
        const uint16_t *row = (const uint16_t *)from->data + at;
        for (; d < dim; d++) to[d] = of_half(row[d]);
    }
    for (; d % W; d++) to[d] = 0;
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
