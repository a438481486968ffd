/* The same work on several threads, which take parts of it as they come free; memory for what each of them works in. */

#pragma once

#include "vectors.h"

#include <stdatomic.h>
#include <stdlib.h>

/* work(job) on `threads` threads at one time, this one among them; where some would have to be made, on no more than it
 * has parts.
 */
void moba_on_threads(i64 threads, i64 parts, void (*work)(void *), void *job);

/* Where the next piece of an allocation begins, `bytes` long; pieces begin at cache lines. `at` is what has been taken.
 * Without memory only sizes add up.
 */
static inline void *take(char *memory, i64 *at, i64 bytes)
{
    void *here = memory ? memory + *at : NULL;
    *at += up(bytes, 64);
    return here;
}
