/* Threads to work on: PyTorch's own where it runs on GNU's OpenMP, or another that can be called like it. After their last
 * operation these wait for the next one without sleeping, and others would have to share the cores with them. It is always
 * asked for as many as PyTorch asks for, since it ends those that a smaller team leaves over.
 */

#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

typedef struct {
    void (*work)(void *);
    void *job;
} Task;

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* A fork has none of the threads, and OpenMP does not notice. */
static void forget_threads(void) { parallel = NULL; }

__attribute__((constructor)) static void find_threads(void)
{
    void *loaded = dlopen(NULL, RTLD_LAZY);
    if (loaded) *(void **)&parallel = dlsym(loaded, "GOMP_parallel");
    pthread_atfork(NULL, NULL, forget_threads);
}

static void *run(void *task)
{
    ((Task *)task)->work(((Task *)task)->job);
    return NULL;
}

void moba_on_threads(i64 threads, i64 parts, void (*work)(void *), void *job)
{
    const i64 most = min64(threads, parts);
    if (most > 1 && parallel) {
        parallel(work, job, (unsigned)threads, 0);
        return;
    }
    pthread_t *others = calloc(max64(most, 1), sizeof *others);
    Task task = {work, job};
    i64 started = 0; /* fewer where no more can be had */
    while (others && started < most - 1 && !pthread_create(others + started, NULL, run, &task)) started++;
    work(job);
    for (i64 i = 0; i < started; i++) pthread_join(others[i], NULL);
    free(others);
}
