/* Vectors of fp32, and e^x: what the kernels compute with.
 *
 * One width of vector is chosen when this is compiled, the widest that the compiler may use here. GCC and clang both
 * know vector types; the only instructions that are asked for by name are those that neither finds by itself.
 */

#pragma once

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* W lanes a vector; a tile of a product is up to PANEL of them wide, so that registers hold its sums. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#define PANEL 4
#elif defined(__AVX2__)
#include <immintrin.h>
#define W 8
#define PANEL 2
#else
#define W 4
#define PANEL 4
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int64_t i64;

INLINE i64 min64(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 max64(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 up(i64 a, i64 to) { return (a + to - 1) / to * to; }

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf load(const float *from) { return *(const vf *)from; }
INLINE void store(float *to, vf x) { *(vf *)to = x; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* x as a float: the compiler may not fuse the product that gave it with the sum that takes it. */
INLINE vf rounded(vf x)
{
#if defined(__x86_64__) || defined(__i386__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

/* n < W: that many lanes, the others 0. */
INLINE vf load_part(const float *from, i64 n)
{
    vf x = {0};
    if (n >= W) return load(from);
    memcpy(&x, from, n * sizeof(float));
    return x;
}

INLINE void store_part(float *to, vf x, i64 n)
{
    if (n >= W) store(to, x);
    else memcpy(to, &x, n * sizeof(float));
}

#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return choose(a > b, a, b); }
#endif
INLINE vf vsum(vf a, vf b) { return a + b; }

/* Is any lane of a comparison true? */
INLINE bool any(vi mask)
{
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

/* ROTATE(x, n): lane i + n (modulo W) in lane i. MIX: four lanes of a (0 .. 3) and b (4 .. 7). */
#if W == 16
#define EACH(f, n) f(0, n), f(1, n), f(2, n), f(3, n), f(4, n), f(5, n), f(6, n), f(7, n), f(8, n), f(9, n), f(10, n), \
                   f(11, n), f(12, n), f(13, n), f(14, n), f(15, n)
#elif W == 8
#define EACH(f, n) f(0, n), f(1, n), f(2, n), f(3, n), f(4, n), f(5, n), f(6, n), f(7, n)
#else
#define EACH(f, n) f(0, n), f(1, n), f(2, n), f(3, n)
#endif
#define LANE(i, n) ((i) + (n)) % W
#if defined(__clang__)
#define ROTATE(x, n) __builtin_shufflevector(x, x, EACH(LANE, n))
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define ROTATE(x, n) __builtin_shuffle(x, (vi){EACH(LANE, n)})
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif
#define OVER_LANES(name, f)                                                                                          \
    INLINE float name(vf x)                                                                                          \
    {                                                                                                                \
        if (W > 8) x = f(x, ROTATE(x, 8));                                                                           \
        if (W > 4) x = f(x, ROTATE(x, 4));                                                                           \
        x = f(x, ROTATE(x, 2));                                                                                      \
        x = f(x, ROTATE(x, 1));                                                                                      \
        return x[0];                                                                                                 \
    }
OVER_LANES(top_of, vmax)
OVER_LANES(sum_of, vsum)

/* e^x to about one unit in the last place; 0 below e^-87.3, where fp32 ends. NaN stays NaN.
 *
 * e^x = 2^n e^r with n the integer nearest to x / ln 2, found by adding 1.5 * 2^23, which leaves no place for a fraction;
 * e^r is the polynomial of Cephes' expf, for |r| <= ln(2) / 2.
 */
INLINE vf vexp(vf x)
{
    const float lowest = -87.3f, highest = 88.3f, whole = 12582912.0f;
    const vi below = x < lowest;
    x = choose(below, splat(lowest), x);
    x = choose(x > highest, splat(highest), x);
    const vf shifted = x * 1.44269504088896341f + whole, n = shifted - whole;
    const vf r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const vi power = ((vi)shifted - 0x4B400000 + 127) << 23; /* the bits of 2^n */
    return choose(below, (vf){0}, y * (vf)power);
}
