// One forward pass of a LLaMA over a few new tokens, from embeddings to logits, with a cache of keys and values.
//
// Decoding is bound by the reading of the weights: each is read once, in the order it lies in, by the thread that owns
// its row, for all tokens at once. Weights are those of the PyTorch modules, in place: fp32, bf16, or int8 with a factor
// for each row. The residual stream, norms, scores and sums are fp32; keys and values are stored in the model's dtype.
//
// Shapes: tokens (batch * seq) new ones, total (cached and new), heads (of Q), kv_heads, head_dim.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define BF16_PRODUCTS 1
#endif

enum Dtype : int32_t { FP32 = 0, BF16 = 1, INT8 = 2 };

struct bf16 {
    uint16_t bits;
};

extern "C" {

struct Linear {
    const void *weight;   // (rows, columns)
    const float *factor;  // (rows,) for int8, else null
    const void *bias;     // (rows,) in the model's dtype, or null
    int64_t rows, columns;
    int32_t dtype;
};

struct Layer {
    Linear q, k, v, o, gate, up, down;
    const void *input_norm, *post_attention_norm;  // (hidden,) in the model's dtype
};

struct Model {
    const Layer *layers;
    const void *norm;
    Linear head;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, intermediate;
    float eps, scaling;
    int32_t dtype;  // of norms, biases, cache and logits: FP32 or BF16
};

struct Step {
    float *hidden;               // (tokens, hidden): embeddings; overwritten
    const float *cos, *sin;      // (batch or 1, seq, head_dim / 2)
    const uint8_t *mask;         // (batch, total) 1: may be looked at; or null
    void *const *keys, *const *values;  // a layer's: (batch, kv_heads, capacity, head_dim)
    void *logits;                // (batch, kept, vocabulary)
    int64_t batch, seq, past, capacity, kept, angles_batch;  // kept: last positions of a sequence whose logits are wanted
    int32_t threads;
};
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers and vectors of them

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return x; }
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
static inline float sum(floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// e^x to fp32's precision, for x <= 0; 0 below -87. With x = n ln 2 + r: 2^n times a polynomial in r (Cephes' expf).
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
    const integers kept = x > -87.0f;
    const floats product = y * factor;
    integers bits;
    std::memcpy(&bits, &product, sizeof(bits));
    bits &= kept;
    floats result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// Products of a weight row with an activation row. A kind of activation says how many are taken at a time and how.
struct FloatProducts {
    typedef float X;
    typedef floats Sum;
    static constexpr int WIDTH = LANES;
    template <class W> static inline floats weights(const W *at) { return load(at); }
    static inline floats inputs(const X *at) { return load(at); }
    static inline floats add(floats sum, floats w, floats x) { return sum + w * x; }
    static inline float total(Sum x) { return sum(x); }
};
#ifdef BF16_PRODUCTS
struct HalfProducts {
    typedef bf16 X;
    typedef __m512 Sum;
    static constexpr int WIDTH = 32;
    static inline __m512bh weights(const bf16 *at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline __m512bh weights(const int8_t *at) {  // -128 to 127 are bf16 numbers
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + 16))));
        return _mm512_cvtne2ps_pbh(high, low);
    }
    static inline __m512bh inputs(const X *at) { return (__m512bh)_mm512_loadu_si512(at); }
    static inline __m512 add(__m512 sum, __m512bh w, __m512bh x) { return _mm512_dpbf16_ps(sum, w, x); }
    static inline float total(Sum x) { return _mm512_reduce_add_ps(x); }
};
#endif

// sums[r][t] = <weight row r, input t>, for ROWS neighbouring rows and TOKENS neighbouring inputs.
// Rows that are read side by side are several streams to the processor, which then fetches ahead half as fast as along
// one: AHEAD asks for the next ROWS rows, in the order they lie in.
template <class P, class W, int ROWS, int TOKENS, bool AHEAD>
static inline void products(const W *weight, const typename P::X *input, int64_t columns, float (*sums)[TOKENS]) {
    typename P::Sum partial[ROWS][TOKENS] = {};
    const W *next = weight + ROWS * columns;
    int64_t column = 0;
    for (; column + P::WIDTH <= columns; column += P::WIDTH) {
        decltype(P::weights(weight)) w[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            if (AHEAD) __builtin_prefetch(next + ROWS * column + r * P::WIDTH, 0, 2);
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
    case 5: return tile<P, W, ROWS, 5, AHEAD>(linear, row, inputs, into, stride);
    case 6: return tile<P, W, ROWS, 6, AHEAD>(linear, row, inputs, into, stride);
    }
}

// into[token][row - first] for the rows from `first` to `last`.
template <class P, class W>
static void rows_of(const Linear &linear, int64_t first, int64_t last, const typename P::X *inputs, int64_t tokens, float *into) {
    constexpr int64_t MOST = 6;  // tokens whose sums with four rows fit into the registers
    const int64_t stride = last - first, columns = linear.columns;
    if (tokens == 1) {
        for (int64_t row = first; row < last; ++row) tile<P, W, 1, 1, false>(linear, row, inputs, into + row - first, stride);
        return;
    }
    const int64_t groups = (tokens + MOST - 1) / MOST, size = (tokens + groups - 1) / groups;
    int64_t row = first;
    for (; row + 4 <= last; row += 4) {
        tiles<P, W, 4, true>(linear, row, inputs, size, into + row - first, stride);
        for (int64_t t = size; t < tokens; t += size)
            tiles<P, W, 4, false>(linear, row, inputs + t * columns, std::min(size, tokens - t), into + t * stride + row - first, stride);
    }
    for (; row < last; ++row)
        for (int64_t t = 0; t < tokens; t += size)
            tiles<P, W, 1, false>(linear, row, inputs + t * columns, std::min(size, tokens - t), into + t * stride + row - first, stride);
}

constexpr int64_t BLOCK = 32;  // rows whose results are put aside before they are used

// Calls each(row, token, value) for the rows from `first` to `last` of a linear layer, its bias added.
template <class P, class T, class Each>
static void apply(const Linear &linear, int64_t first, int64_t last, const typename P::X *inputs, int64_t tokens, float *block, Each each) {
    for (int64_t start = first; start < last; start += BLOCK) {
        const int64_t stop = std::min(start + BLOCK, last);
        if (linear.dtype == INT8) rows_of<P, int8_t>(linear, start, stop, inputs, tokens, block);
        else rows_of<P, T>(linear, start, stop, inputs, tokens, block);
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t row = start; row < stop; ++row) {
                const float value = block[token * (stop - start) + row - start];
                each(row, token, linear.bias ? value + to_float(((const T *)linear.bias)[row]) : value);
            }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The pass

// The part of `count` things that a thread does.
struct Share {
    int64_t first, last;
    Share(int64_t count, int thread, int threads) {
        int64_t blocks = (count + 3) / 4;
        first = std::min(count, 4 * (blocks * thread / threads));
        last = std::min(count, 4 * (blocks * (thread + 1) / threads));
    }
};

constexpr int64_t CHUNK = 256;  // keys that are taken together by a thread

template <class X, class T>
static void normed(const float *x, const T *weight, int64_t hidden, float eps, X *result) {
    floats squares = {};
    int64_t i = 0;
    for (; i + LANES <= hidden; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < hidden; ++i) total += x[i] * x[i];
    float factor = 1 / std::sqrt(total / hidden + eps);
    for (int64_t j = 0; j < hidden; ++j) store(result + j, x[j] * factor * to_float(weight[j]));
}

template <class T>
static void turned(const float *x, const float *cos, const float *sin, int64_t head_dim, T *result) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        store(result + i, x[i] * cos[i] - x[i + half] * sin[i]);
        store(result + i + half, x[i + half] * cos[i] + x[i] * sin[i]);
    }
}

template <class T> static float dot(const float *query, const T *key, int64_t count) {
    floats products = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) products += load(query + i) * load(key + i);
    float total = sum(products);
    for (; i < count; ++i) total += query[i] * to_float(key[i]);
    return total;
}

template <class T> static void add_scaled(float *result, float factor, const T *value, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats sum = load(result + i) + factor * load(value + i);
        std::memcpy(result + i, &sum, sizeof(sum));
    }
    for (; i < count; ++i) result[i] += factor * to_float(value[i]);
}

// What the threads share: (tokens, ...) each.
struct Shared {
    std::vector<float> query, key, value;       // before and after the rotation of the query
    std::vector<float> mixed, largest, weight;  // attention of a chunk of keys: (chunks, tokens, heads, ...)
    std::vector<char> inner;                    // SwiGLU's product, (tokens, intermediate)
};

template <class P, class T> class Pass {
    typedef typename P::X X;
    const Model &model;
    const Step &step;
    Shared &shared;
    const int thread, threads;
    const int64_t tokens, total, groups, chunks;
    std::vector<X> input;  // this thread's copy of what a linear layer is applied to
    std::vector<float> scores, block, gates;

  public:
    Pass(const Model &model, const Step &step, Shared &shared, int thread, int threads)
        : model(model), step(step), shared(shared), thread(thread), threads(threads), tokens(step.batch * step.seq),
          total(step.past + step.seq), groups(model.heads / model.kv_heads), chunks((total + CHUNK - 1) / CHUNK),
          input(tokens * std::max(model.hidden, model.heads * model.head_dim)), scores(CHUNK),
          block(BLOCK * tokens), gates(BLOCK * tokens) {}

    void run() {
        for (int64_t number = 0; number < model.num_layers; ++number) {
            const Layer &layer = model.layers[number];
            norm(layer.input_norm);
            project(layer.q, shared.query), project(layer.k, shared.key), project(layer.v, shared.value);
            barrier();
            T *keys = (T *)step.keys[number], *values = (T *)step.values[number];
            append(keys, values);
            barrier();
            attend(keys, values);
            barrier();
            combine();
            add(layer.o, input.data());
            barrier();
            norm(layer.post_attention_norm);
            swiglu(layer);
            barrier();
            add(layer.down, (const X *)shared.inner.data());
            barrier();
        }
        head();
    }

  private:
    void barrier() {
#pragma omp barrier
    }

    Share share(int64_t count) const { return Share(count, thread, threads); }

    void norm(const void *weight) {
        for (int64_t token = 0; token < tokens; ++token)
            normed(step.hidden + token * model.hidden, (const T *)weight, model.hidden, model.eps,
                   input.data() + token * model.hidden);
    }

    void project(const Linear &linear, std::vector<float> &result) {
        Share mine = share(linear.rows);
        float *into = result.data();
        int64_t rows = linear.rows;
        apply<P, T>(linear, mine.first, mine.last, input.data(), tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { into[token * rows + row] = value; });
    }

    void add(const Linear &linear, const X *inputs) {
        Share mine = share(linear.rows);
        float *hidden = step.hidden;
        int64_t rows = linear.rows;
        apply<P, T>(linear, mine.first, mine.last, inputs, tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { hidden[token * rows + row] += value; });
    }

    // Rotates the new queries and keys, and puts the keys and values into the cache.
    void append(T *keys, T *values) {
        const int64_t size = model.head_dim, half = size / 2, per_token = model.heads + 2 * model.kv_heads;
        std::vector<float> turned_query(size);
        for (int64_t task = thread; task < tokens * per_token; task += threads) {
            const int64_t token = task / per_token, head = task % per_token;
            const int64_t sequence = token / step.seq, place = token % step.seq;
            const int64_t angle = ((step.angles_batch == 1 ? 0 : sequence) * step.seq + place) * half;
            if (head < model.heads) {
                float *query = shared.query.data() + (token * model.heads + head) * size;
                turned(query, step.cos + angle, step.sin + angle, size, turned_query.data());
                for (int64_t i = 0; i < size; ++i) query[i] = turned_query[i] * model.scaling;
                continue;
            }
            const int64_t kv_head = (head - model.heads) / 2;
            const int64_t into = ((sequence * model.kv_heads + kv_head) * step.capacity + step.past + place) * size;
            const int64_t from = (token * model.kv_heads + kv_head) * size;
            if ((head - model.heads) % 2) {
                for (int64_t i = 0; i < size; ++i) store(values + into + i, shared.value[from + i]);
            } else {
                turned(shared.key.data() + from, step.cos + angle, step.sin + angle, size, keys + into);
            }
        }
    }

    // Softmax-weighted values of each chunk of keys, before the division: with the largest score and the sum of weights.
    void attend(const T *keys, const T *values) {
        for (int64_t task = thread; task < chunks * step.batch * model.kv_heads; task += threads) {
            const int64_t chunk = task % chunks, head = task / chunks;  // head: (batch, kv_heads)
            const int64_t sequence = head / model.kv_heads, first = chunk * CHUNK;
            const T *own_keys = keys + head * step.capacity * model.head_dim;
            const T *own_values = values + head * step.capacity * model.head_dim;
            for (int64_t place = 0; place < step.seq; ++place) {
                const int64_t last = std::min(first + CHUNK, step.past + place + 1);
                for (int64_t group = 0; group < groups; ++group)
                    attend_one(chunk, sequence, place, head % model.kv_heads * groups + group, first, last, own_keys, own_values);
            }
        }
    }

    void attend_one(int64_t chunk, int64_t sequence, int64_t place, int64_t head, int64_t first, int64_t last,
                    const T *keys, const T *values) {
        const int64_t size = model.head_dim, token = sequence * step.seq + place;
        const int64_t query_at = token * model.heads + head, at = chunk * tokens * model.heads + query_at;
        const float *query = shared.query.data() + query_at * size;
        const uint8_t *mask = step.mask ? step.mask + sequence * total : nullptr;
        constexpr float NOTHING = -std::numeric_limits<float>::infinity();
        float largest = NOTHING, weight_sum = 0;
        for (int64_t key = first; key < last; ++key) {
            scores[key - first] = !mask || mask[key] ? dot(query, keys + key * size, size) : NOTHING;
            largest = std::max(largest, scores[key - first]);
        }
        float *mixed = shared.mixed.data() + at * size;
        std::fill(mixed, mixed + size, 0.0f);
        if (largest > NOTHING) {
            std::fill(scores.begin() + (last - first), scores.end(), NOTHING);  // up to a whole vector
            for (int64_t key = 0; key < last - first; key += LANES) {
                const floats weights = exponential(load(scores.data() + key) - largest);
                std::memcpy(scores.data() + key, &weights, sizeof(weights));
                weight_sum += sum(weights);
            }
            for (int64_t key = first; key < last; ++key) add_scaled(mixed, scores[key - first], values + key * size, size);
        }
        shared.largest[at] = largest, shared.weight[at] = weight_sum;
    }

    // The attention output of all heads, from its chunks, as the input of the output projection.
    void combine() {
        const int64_t size = model.head_dim, count = tokens * model.heads;
        for (int64_t head = 0; head < count; ++head) {
            float largest = -std::numeric_limits<float>::infinity(), weight_sum = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) largest = std::max(largest, shared.largest[chunk * count + head]);
            std::vector<float> factors(chunks, 0.0f);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                if (!shared.weight[chunk * count + head]) continue;
                factors[chunk] = std::exp(shared.largest[chunk * count + head] - largest);
                weight_sum += factors[chunk] * shared.weight[chunk * count + head];
            }
            for (int64_t i = 0; i < size; ++i) {
                float value = 0;
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    if (factors[chunk]) value += factors[chunk] * shared.mixed[(chunk * count + head) * size + i];
                store(input.data() + head * size + i, weight_sum ? value / weight_sum : 0.0f);
            }
        }
    }

    void swiglu(const Layer &layer) {
        const Share mine = share(layer.gate.rows);
        const int64_t rows = layer.gate.rows;
        X *inner = (X *)shared.inner.data();
        // A block of rows of both at a time: the gate's values wait in the first-level cache.
        for (int64_t first = mine.first; first < mine.last; first += BLOCK) {
            const int64_t last = std::min(first + BLOCK, mine.last);
            apply<P, T>(layer.gate, first, last, input.data(), tokens, block.data(), [&](int64_t row, int64_t token, float value) {
                gates[(row - first) * tokens + token] = value / (1 + std::exp(-value));
            });
            apply<P, T>(layer.up, first, last, input.data(), tokens, block.data(), [&](int64_t row, int64_t token, float value) {
                store(inner + token * rows + row, gates[(row - first) * tokens + token] * value);
            });
        }
    }

    void head() {
        const int64_t kept = step.kept;
        for (int64_t sequence = 0; sequence < step.batch; ++sequence)
            for (int64_t place = 0; place < kept; ++place)
                normed(step.hidden + (sequence * step.seq + step.seq - kept + place) * model.hidden, (const T *)model.norm,
                       model.hidden, model.eps, input.data() + (sequence * kept + place) * model.hidden);
        const Share mine = share(model.head.rows);
        T *logits = (T *)step.logits;
        const int64_t rows = model.head.rows;
        apply<P, T>(model.head, mine.first, mine.last, input.data(), step.batch * kept, block.data(),
                    [=](int64_t row, int64_t token, float value) { store(logits + token * rows + row, value); });
    }
};

template <class P, class T> static void forward(const Model &model, const Step &step) {
    const int64_t tokens = step.batch * step.seq, chunks = (step.past + step.seq + CHUNK - 1) / CHUNK;
    Shared shared;
    shared.query.resize(tokens * model.heads * model.head_dim);
    shared.key.resize(tokens * model.kv_heads * model.head_dim);
    shared.value.resize(tokens * model.kv_heads * model.head_dim);
    shared.mixed.resize(chunks * tokens * model.heads * model.head_dim);
    shared.largest.resize(chunks * tokens * model.heads);
    shared.weight.resize(chunks * tokens * model.heads);
    shared.inner.resize(tokens * model.intermediate * sizeof(typename P::X));
#pragma omp parallel num_threads(step.threads)
    Pass<P, T>(model, step, shared, omp_get_thread_num(), omp_get_num_threads()).run();
}

template <class P, class T>
static void linear(const Linear &matrix, const T *inputs, T *outputs, int64_t tokens, int32_t threads) {
    typedef typename P::X X;
    std::vector<X> converted;
    if (!std::is_same<X, T>::value) {
        converted.resize(tokens * matrix.columns);
        for (size_t i = 0; i < converted.size(); ++i) store(&converted[i], to_float(inputs[i]));
    }
    const X *x = converted.empty() ? (const X *)inputs : converted.data();
#pragma omp parallel num_threads(threads)
    {
        const Share mine(matrix.rows, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> block(BLOCK * tokens);
        apply<P, T>(matrix, mine.first, mine.last, x, tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { store(outputs + token * matrix.rows + row, value); });
    }
}

template <class T> static void dequantize(const int8_t *weight, const float *factor, T *outputs, int64_t rows, int64_t columns, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = row * columns; i < (row + 1) * columns; ++i) store(outputs + i, weight[i] * factor[row]);
}

#ifdef BF16_PRODUCTS
typedef HalfProducts Bf16Products;
#else
typedef FloatProducts Bf16Products;
#endif

extern "C" {

void llama_repro_forward(const Model *model, const Step *step) {
    if (model->dtype == FP32) forward<FloatProducts, float>(*model, *step);
    else forward<Bf16Products, bf16>(*model, *step);
}

void llama_repro_linear(const void *weight, const void *bias, const void *inputs, void *outputs, int64_t rows, int64_t columns,
                        int64_t tokens, int32_t dtype, int32_t threads) {
    const Linear matrix = {weight, nullptr, bias, rows, columns, dtype};
    if (dtype == FP32) linear<FloatProducts>(matrix, (const float *)inputs, (float *)outputs, tokens, threads);
    else linear<Bf16Products>(matrix, (const bf16 *)inputs, (bf16 *)outputs, tokens, threads);
}

void llama_repro_dequantize(const void *weight, const float *factor, void *outputs, int64_t rows, int64_t columns, int32_t dtype,
                            int32_t threads) {
    if (dtype == FP32) dequantize((const int8_t *)weight, factor, (float *)outputs, rows, columns, threads);
    else dequantize((const int8_t *)weight, factor, (bf16 *)outputs, rows, columns, threads);
}
}
