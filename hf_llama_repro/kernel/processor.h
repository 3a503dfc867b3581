// Which of the libraries that this source is compiled into the processor can run, and what PyTorch has in it.

#pragma once

#include <cstdint>

enum Processor : uint32_t { HAS_AVX2 = 1, HAS_AVX512_BF16 = 2, HAS_AMX = 4 };

#if defined(__x86_64__)
#include <cpuid.h>

// What `setup.py` compiles for; the system must keep the registers as well, which the compiler's own query looks at.
static uint32_t processor() {
    __builtin_cpu_init();
    uint32_t found = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found |= HAS_AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
            found |= HAS_AVX512_BF16;
    }
    uint32_t a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d & (1u << 24)) found |= HAS_AMX;
    return found;
}
#else
static uint32_t processor() { return 0; }
#endif
