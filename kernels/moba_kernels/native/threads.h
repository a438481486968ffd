/* The same work on several threads, which take parts of it as they come free. */

#include <pthread.h>

#include <stdatomic.h>
#include <stdlib.h>

/* work(job) on this thread and on most - 1 more; on fewer where no more can be had. */
static void on_threads(i64 most, void *(*work)(void *), void *job)
{
    pthread_t *threads = calloc(most, sizeof *threads);
    i64 started = 0;
    while (threads && started < most - 1 && !pthread_create(threads + started, NULL, work, job)) started++;
    work(job);
    for (i64 i = 0; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
}

/* The next `bytes` of an allocation that is laid out piece by piece; pieces begin at cache lines. */
static void *take(char **at, i64 bytes)
{
    void *here = *at;
    *at += up(bytes, 64);
    return here;
}
