// Work by several threads that ends with an exception of the calling thread where memory is not to be had: one that
// leaves a parallel region would end the process, and a thread that is missing at a barrier would hang it.

#pragma once

#include <atomic>
#include <new>
#include <omp.h>
#include <optional>

// Each thread makes its own worker, make(thread, threads), which takes all the memory that it is going to need, and
// runs it where every thread could.
template <class Make> static void in_parallel(int32_t threads, Make make) {
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        std::optional<decltype(make(0, 1))> worker;
        try {
            worker.emplace(make(omp_get_thread_num(), omp_get_num_threads()));
        } catch (...) {  // memory, or a size that no memory has
            failed = true;
        }
#pragma omp barrier
        if (!failed) worker->run();
    }
    if (failed) throw std::bad_alloc();
}
