// Instruction sets and threads.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

// One body, compiled for several instruction sets; the best one that the processor has is taken when the module loads.
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define FOR_EACH_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE inline __attribute__((always_inline))
#else
#define FOR_EACH_ISA
#define INLINE inline
#endif

// Calls part(data) in so many threads of the OpenMP runtime that torch has loaded: a second pool of
// threads would compete with torch's, which wait busily. One thread where that runtime is not GNU's.
inline void in_parallel(void (*part)(void*), void* data, unsigned threads) {
#if defined(__linux__)
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (parallel != nullptr && threads > 1) {
        parallel(part, data, threads, 0);
        return;
    }
#endif
    part(data);
}
