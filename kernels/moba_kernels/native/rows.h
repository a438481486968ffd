/* Rows of tensors, read in fp32. */

#pragma once

#include "vectors.h"

/* [tokens, heads, dim], its last dim dense. native/__init__.py has the same structure. */
typedef struct {
    const void *data;
    i64 token, head; /* elements from one to the next */
    i64 dtype;       /* 0 fp32, 1 bf16, 2 fp16 */
} Rows;

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
