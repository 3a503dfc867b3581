// A matrix and few vectors: the reading of the matrix is what takes the time, so that it is read once, in order.
//
// Weights are those of the PyTorch modules, in place: fp32, bf16, or int8 with a factor for each row. Sums are fp32.

#pragma once

#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <limits>

struct Linear {
    const void *weight;   // (rows, columns)
    const float *factor;  // (rows,) for int8, else null
    const void *bias;     // (rows,) in the model's dtype, or null
    int64_t rows, columns;
    int32_t dtype;
};

// Products of a weight row with an activation row. A kind of activation says how many are taken at a time and how.
struct FloatProducts {
    typedef float X;
    typedef floats Sum;
    static constexpr int WIDTH = LANES;
    static constexpr int MOST = 6;      // tokens whose sums with 4 rows the compiler keeps in registers
    static constexpr int SHORTS = 64;   // tokens up to which ShortProducts are faster with int8 weights
    template <class W> static inline floats weights(const W *at) { return load(at); }
    static inline floats inputs(const X *at) { return load(at); }
    static inline floats add(floats sum, floats w, floats x) { return sum + w * x; }
    static inline float total(Sum x) { return sum(x); }
    static inline floats columns(const uint32_t *at) { return load((const float *)at); }
    static inline floats splat(const uint32_t *at) { return floats{} + *(const float *)at; }
};
#ifdef BF16_PRODUCTS
struct HalfProducts {
    typedef bf16 X;
    typedef __m512 Sum;
    static constexpr int WIDTH = 32, MOST = 6, SHORTS = 3;
    static inline __m512bh weights(const bf16 *at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline __m512bh weights(const int8_t *at) {  // -128 to 127 are bf16 numbers
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + 16))));
        return _mm512_cvtne2ps_pbh(high, low);
    }
    static inline __m512bh inputs(const X *at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline __m512 add(__m512 sum, __m512bh w, __m512bh x) { return _mm512_dpbf16_ps(sum, w, x); }
    static inline float total(Sum x) { return _mm512_reduce_add_ps(x); }
    static inline __m512bh columns(const uint32_t *at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline __m512bh splat(const uint32_t *at) { return (__m512bh)_mm512_set1_epi32(int(*at)); }
};
#endif

#ifdef SHORT_PRODUCTS
// int8 weights with activations that were rounded to whole multiples of a token's factor: sums are exact.
struct ShortProducts {
    typedef int16_t X;
    typedef __m512i Sum;
    static constexpr int WIDTH = 32, MOST = 4;
    static inline __m512i weights(const int8_t *at) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at)); }
    static inline __m512i inputs(const X *at) { return _mm512_loadu_si512(at); }
    static inline __m512i add(__m512i sum, __m512i w, __m512i x) { return _mm512_dpwssd_epi32(sum, w, x); }
    static inline float total(Sum x) { return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(x)); }
};
#endif

// What a linear layer is applied to, (tokens, columns): as it is, and for int8 weights as `shorts` times the token's
// factor, or null.
template <class X> struct Inputs {
    const X *values;
    const int16_t *shorts;
    const float *factors;  // (tokens,), or null
};

// Rounds `count` activations to whole multiples of the factor that is returned. They are as large as 16 bits and the
// 32 bits of a lane's sum allow: 15 bits up to 8,192 columns, 13 bits with 28,672.
template <class X> static float round_to_shorts(const X *values, int64_t count, int16_t *shorts) {
    const float most = std::min<float>(32767, 2147483647 / (128 * ((count + 15) / 16)));
    // Sizes are compared as whole numbers, among which infinity and NaN are the largest.
    integers sizes = {};
    int32_t size = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const integers some = bits_of(load(values + i)) & 0x7fffffff;
        sizes = some > sizes ? some : sizes;
    }
    for (int lane = 0; lane < LANES; ++lane) size = std::max(size, sizes[lane]);
    for (int64_t j = i; j < count; ++j) size = std::max(size, bits_of(to_float(values[j])) & 0x7fffffff);
    if (size >= 0x7f800000) {
        std::fill(shorts, shorts + count, int16_t(0));
        return std::numeric_limits<float>::quiet_NaN();  // times anything
    }
    float largest;
    std::memcpy(&largest, &size, sizeof(largest));
    const float factor = largest > 0 ? most / largest : 0;
    for (i = 0; i + LANES <= count; i += LANES) {
        const floats multiple = load(values + i) * factor, half = multiple < 0 ? floats{} - 0.5f : floats{} + 0.5f;
        const auto whole = __builtin_convertvector(__builtin_convertvector(multiple + half, integers), int16s);
        std::memcpy(shorts + i, &whole, sizeof(whole));
    }
    for (; i < count; ++i) {
        const float multiple = to_float(values[i]) * factor;
        shorts[i] = int16_t(int32_t(multiple + std::copysign(0.5f, multiple)));
    }
    return largest / most;
}

constexpr int64_t AHEAD_BYTES = 8192;

// sums[r][t] = <weight row r, input t>, for ROWS neighbouring rows and TOKENS neighbouring inputs.
// Rows that are read side by side are several streams to the processor, which then fetches ahead half as fast as along
// one: AHEAD asks for what lies 8 KB further on, in the order it lies in.
template <class P, class W, int ROWS, int TOKENS, bool AHEAD>
static inline void products(const W *weight, const typename P::X *input, int64_t columns, float (*sums)[TOKENS]) {
    typename P::Sum partial[ROWS][TOKENS] = {};
    const char *next = (const char *)weight + AHEAD_BYTES;
    int64_t column = 0;
    for (; column + P::WIDTH <= columns; column += P::WIDTH) {
        decltype(P::weights(weight)) w[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            if (AHEAD) __builtin_prefetch(next + (ROWS * column + r * P::WIDTH) * sizeof(W), 0, 2);
            w[r] = P::weights(weight + r * columns + column);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            auto x = P::inputs(input + t * columns + column);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) partial[r][t] = P::add(partial[r][t], w[r], x);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = P::total(partial[r][t]);
    for (; column < columns; ++column)
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] += to_float(weight[r * columns + column]) * to_float(input[t * columns + column]);
}

// into[token][row] for ROWS rows of a linear layer and TOKENS tokens; `stride` is the distance of two tokens in `into`.
template <class P, class W, int ROWS, int TOKENS, bool AHEAD>
static void tile(const Linear &linear, int64_t row, const typename P::X *inputs, float *into, int64_t stride) {
    float sums[ROWS][TOKENS];
    products<P, W, ROWS, TOKENS, AHEAD>((const W *)linear.weight + row * linear.columns, inputs, linear.columns, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t)
            into[t * stride + r] = linear.factor ? sums[r][t] * linear.factor[row + r] : sums[r][t];
}

template <class P, class W, int ROWS, bool AHEAD>
static void tiles(const Linear &linear, int64_t row, const typename P::X *inputs, int64_t tokens, float *into, int64_t stride) {
    switch (tokens) {
    case 1: return tile<P, W, ROWS, 1, AHEAD>(linear, row, inputs, into, stride);
    case 2: return tile<P, W, ROWS, 2, AHEAD>(linear, row, inputs, into, stride);
    case 3: return tile<P, W, ROWS, 3, AHEAD>(linear, row, inputs, into, stride);
    case 4: return tile<P, W, ROWS, 4, AHEAD>(linear, row, inputs, into, stride);
    }
    if constexpr (ROWS < 4 || P::MOST > 4) {
        if (tokens == 5) return tile<P, W, ROWS, 5, AHEAD>(linear, row, inputs, into, stride);
        if (tokens == 6) return tile<P, W, ROWS, 6, AHEAD>(linear, row, inputs, into, stride);
    }
    if constexpr (ROWS < 4) {
        if (tokens == 7) return tile<P, W, ROWS, 7, AHEAD>(linear, row, inputs, into, stride);
        if (tokens == 8) return tile<P, W, ROWS, 8, AHEAD>(linear, row, inputs, into, stride);
    }
}

// into[token][row - first] for the rows from `first` to `last`, ROWS and at most MOST tokens at a time.
template <class P, class W, int ROWS, int MOST>
static void groups_of(const Linear &linear, int64_t first, int64_t last, const typename P::X *inputs, int64_t tokens, float *into) {
    const int64_t stride = last - first, columns = linear.columns;
    const int64_t groups = (tokens + MOST - 1) / MOST, size = (tokens + groups - 1) / groups;
    int64_t row = first;
    for (; row + ROWS <= last; row += ROWS) {
        tiles<P, W, ROWS, true>(linear, row, inputs, size, into + row - first, stride);
        for (int64_t t = size; t < tokens; t += size)
            tiles<P, W, ROWS, false>(linear, row, inputs + t * columns, std::min(size, tokens - t), into + t * stride + row - first, stride);
    }
    for (; row < last; ++row)
        for (int64_t t = 0; t < tokens; t += size)
            tiles<P, W, 1, false>(linear, row, inputs + t * columns, std::min(size, tokens - t), into + t * stride + row - first, stride);
}

constexpr int64_t FIRST_LEVEL = 24 << 10;  // bytes of inputs that stay in the first-level cache while weights pass

// into[token][row - first] for the rows from `first` to `last`. The sums of 2 rows and 8 tokens fit into the
// registers as well as those of 4 rows and MOST tokens do; the inputs are then read twice as often.
template <class P, class W>
static void rows_of(const Linear &linear, int64_t first, int64_t last, const typename P::X *inputs, int64_t tokens, float *into) {
    if (tokens == 1) {
        for (int64_t row = first; row < last; ++row)
            tile<P, W, 1, 1, false>(linear, row, inputs, into + row - first, last - first);
    } else if ((tokens == 7 || tokens == 8) && tokens * linear.columns * int64_t(sizeof(*inputs)) <= FIRST_LEVEL) {
        groups_of<P, W, 2, 8>(linear, first, last, inputs, tokens, into);
    } else {
        groups_of<P, W, 4, P::MOST>(linear, first, last, inputs, tokens, into);
    }
}

constexpr int64_t BLOCK = 32;  // rows whose results are put aside before they are used

// Calls each(row, token, value) for the rows from `first` to `last` of a linear layer, its bias added.
template <class P, class T, class Each>
static void apply(const Linear &linear, int64_t first, int64_t last, const Inputs<typename P::X> &inputs, int64_t tokens, float *block, Each each) {
    for (int64_t start = first; start < last; start += BLOCK) {
        const int64_t stop = std::min(start + BLOCK, last);
#ifdef SHORT_PRODUCTS
        if (inputs.shorts && linear.dtype == INT8) rows_of<ShortProducts, int8_t>(linear, start, stop, inputs.shorts, tokens, block);
        else
#endif
        if (linear.dtype == INT8) rows_of<P, int8_t>(linear, start, stop, inputs.values, tokens, block);
        else rows_of<P, T>(linear, start, stop, inputs.values, tokens, block);
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t row = start; row < stop; ++row) {
                const float product = block[token * (stop - start) + row - start];
                const float value = linear.dtype == INT8 && inputs.factors ? product * inputs.factors[token] : product;
                each(row, token, linear.bias ? value + to_float(((const T *)linear.bias)[row]) : value);
            }
    }
}

// The part of `count` things that a thread does.
struct Share {
    int64_t first, last;
    Share(int64_t count, int thread, int threads) {
        int64_t blocks = (count + 3) / 4;
        first = std::min(count, 4 * (blocks * thread / threads));
        last = std::min(count, 4 * (blocks * (thread + 1) / threads));
    }
};
