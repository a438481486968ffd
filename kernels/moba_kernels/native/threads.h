/* The same work on several threads, which take parts of it as they come free; memory for what each of them works in. */

#pragma once

#include "vectors.h"

#include <stdatomic.h>
#include <stdlib.h>

/* work(job) on this thread and on most - 1 more; on fewer where no more can be had. */
void moba_on_threads(i64 most, void (*work)(void *), void *job);

/* The next `bytes` of an allocation that is laid out piece by piece; pieces begin at cache lines. */
static inline void *take(char **at, i64 bytes)
{
    void *here = *at;
    *at += up(bytes, 64);
    return here;
}
