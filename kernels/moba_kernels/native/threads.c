/* Threads to work on: PyTorch's own where it runs on GNU's OpenMP, or another that can be called like it. After their last
 * operation these wait for the next one without sleeping, and others would have to share the cores with them.
 */

#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

typedef struct {
    void (*work)(void *);
    void *job;
} Task;

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

__attribute__((constructor)) static void find_threads(void)
{
    void *loaded = dlopen(NULL, RTLD_LAZY);
    if (loaded) *(void **)&parallel = dlsym(loaded, "GOMP_parallel");
}

static void *run(void *task)
{
    ((Task *)task)->work(((Task *)task)->job);
    return NULL;
}

void moba_on_threads(i64 most, void (*work)(void *), void *job)
{
    if (most > 1 && parallel) {
        parallel(work, job, (unsigned)most, 0);
        return;
    }
    pthread_t *threads = calloc(most, sizeof *threads);
    Task task = {work, job};
    i64 started = 0;
    while (threads && started < most - 1 && !pthread_create(threads + started, NULL, run, &task)) started++;
    work(job);
    for (i64 i = 0; i < started; i++) pthread_join(threads[i], NULL);
    free(threads);
}
