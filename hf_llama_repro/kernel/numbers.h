// Numbers, and vectors of them: bf16 is computed with as fp32.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define BF16_PRODUCTS 1
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SHORT_PRODUCTS 1
#endif

enum Dtype : int32_t { FP32 = 0, BF16 = 1, INT8 = 2 };

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int16_t int16s __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return x; }
static inline float to_float(int16_t x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline void store(float *at, float x) { *at = x; }
static inline void store(bf16 *at, float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) at->bits = 0x7fc0;
    else at->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class V> static inline V load_as(const void *at) {
    V vector;
    std::memcpy(&vector, at, sizeof(V));
    return vector;
}
static inline floats load(const float *at) { return load_as<floats>(at); }
static inline floats load(const bf16 *at) {
    words bits = __builtin_convertvector(load_as<halves>(at), words) << 16;
    floats values;
    std::memcpy(&values, &bits, sizeof(values));
    return values;
}
static inline floats load(const int8_t *at) {
#ifdef __AVX512F__
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
#else
    return __builtin_convertvector(load_as<bytes>(at), floats);
#endif
}
static inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
static inline integers bits_of(floats x) {
    integers bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
static inline float sum(floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// e^x to fp32's precision, for x <= 0; 0 below -87, NaN for NaN. With x = n ln 2 + r: 2^n times a polynomial in r (Cephes' expf).
static inline floats exponential(floats x) {
    const floats scaled = x * 1.44269504f - 0.5f;
    const integers n = __builtin_convertvector(scaled, integers);  // towards zero, which is up here
    const floats whole = __builtin_convertvector(n, floats);
    const floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const integers power = (n + 127) << 23;
    floats factor;
    std::memcpy(&factor, &power, sizeof(factor));
    const integers kept = ~(x <= -87.0f);
    const floats product = y * factor;
    integers bits;
    std::memcpy(&bits, &product, sizeof(bits));
    bits &= kept;
    floats result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}
static inline void store(float *at, floats x) { std::memcpy(at, &x, sizeof(x)); }
static inline void store(bf16 *at, floats x) {
#ifdef BF16_PRODUCTS
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    for (int lane = 0; lane < LANES; ++lane) store(at + lane, x[lane]);
#endif
}
