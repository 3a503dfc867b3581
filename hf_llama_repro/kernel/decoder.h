// One forward pass of a LLaMA over a few new tokens, from embeddings to logits, with a cache of keys and values.
//
// Each matrix is read once, by the threads that own its rows, for all tokens at once. The residual stream, norms, scores
// and sums are fp32; keys and values are stored in the model's dtype.
//
// Shapes: tokens (batch * seq) new ones, total (cached and new), heads (of Q), kv_heads, head_dim.

#pragma once

#include "linear.h"
#include "parallel.h"

#include <cmath>
#include <limits>
#include <vector>

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

static bool has_int8(const Model &model) {
    for (int64_t number = 0; number < model.num_layers; ++number) {
        const Layer &layer = model.layers[number];
        for (const Linear *linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
            if (linear->dtype == INT8) return true;
    }
    return model.head.dtype == INT8;
}

// What one thread does of a forward pass, and the memory that it does it in.
template <class P, class T> class Pass {
    typedef typename P::X X;
    const Model &model;
    const Step &step;
    Shared &shared;
    const int thread, threads;
    const int64_t tokens, total, groups, chunks;
    std::vector<X> input;  // this thread's copy of what a linear layer is applied to
    std::vector<int16_t> shorts;  // (tokens, columns), of a linear layer with int8 weights; empty where none takes them
    std::vector<float> factors;   // (tokens,)
    std::vector<float> scores, block, gates;
    std::vector<float> turned_query;  // (head_dim,)
    std::vector<float> shares;        // (chunks,)

  public:
    Pass(const Model &model, const Step &step, Shared &shared, int thread, int threads)
        : model(model), step(step), shared(shared), thread(thread), threads(threads), tokens(step.batch * step.seq),
          total(step.past + step.seq), groups(model.heads / model.kv_heads), chunks((total + CHUNK - 1) / CHUNK),
          input(tokens * std::max(model.hidden, model.heads * model.head_dim)), scores(CHUNK),
          block(BLOCK * tokens), gates(BLOCK * tokens), turned_query(model.head_dim), shares(chunks) {
#ifdef SHORT_PRODUCTS
        if (tokens <= P::SHORTS && has_int8(model)) {
            shorts.resize(tokens * std::max({model.hidden, model.heads * model.head_dim, model.intermediate}));
            factors.resize(tokens);
        }
#endif
    }

    void run() {
        for (int64_t number = 0; number < model.num_layers; ++number) {
            const Layer &layer = model.layers[number];
            norm(layer.input_norm);
            const Inputs<X> activations = inputs(input.data(), {&layer.q, &layer.k, &layer.v});
            project(layer.q, activations, shared.query), project(layer.k, activations, shared.key), project(layer.v, activations, shared.value);
            barrier();
            T *keys = (T *)step.keys[number], *values = (T *)step.values[number];
            append(keys, values);
            barrier();
            attend(keys, values);
            barrier();
            combine();
            add(layer.o, inputs(input.data(), {&layer.o}));
            barrier();
            norm(layer.post_attention_norm);
            swiglu(layer);
            barrier();
            add(layer.down, inputs((const X *)shared.inner.data(), {&layer.down}));
            barrier();
        }
        head();
    }

  private:
    void barrier() {
#pragma omp barrier
    }

    // Activations (tokens, columns) as the input of linear layers, of which any may have int8 weights.
    Inputs<X> inputs(const X *values, std::initializer_list<const Linear *> linears) {
#ifdef SHORT_PRODUCTS
        for (const Linear *linear : linears) {
            if (linear->dtype != INT8 || shorts.empty()) continue;
            const int64_t columns = linear->columns;
            for (int64_t token = 0; token < tokens; ++token)
                factors[token] = round_to_shorts(values + token * columns, columns, shorts.data() + token * columns);
            return {values, shorts.data(), factors.data()};
        }
#endif
        return {values, nullptr, nullptr};
    }

    Share share(int64_t count) const { return Share(count, thread, threads); }

    void norm(const void *weight) {
        for (int64_t token = 0; token < tokens; ++token)
            normed(step.hidden + token * model.hidden, (const T *)weight, model.hidden, model.eps,
                   input.data() + token * model.hidden);
    }

    void project(const Linear &linear, const Inputs<X> &inputs, std::vector<float> &result) {
        Share mine = share(linear.rows);
        float *into = result.data();
        int64_t rows = linear.rows;
        apply<P, T>(linear, mine.first, mine.last, inputs, tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { into[token * rows + row] = value; });
    }

    void add(const Linear &linear, const Inputs<X> &inputs) {
        Share mine = share(linear.rows);
        float *hidden = step.hidden;
        int64_t rows = linear.rows;
        apply<P, T>(linear, mine.first, mine.last, inputs, tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { hidden[token * rows + row] += value; });
    }

    // Rotates the new queries and keys, and puts the keys and values into the cache.
    void append(T *keys, T *values) {
        const int64_t size = model.head_dim, half = size / 2, per_token = model.heads + 2 * model.kv_heads;
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
        if (first < last) {
            const float subtracted = largest == NOTHING ? 0 : largest;  // no key is seen, or every score is NaN
            std::fill(scores.begin() + (last - first), scores.end(), NOTHING);  // up to a whole vector
            for (int64_t key = 0; key < last - first; key += LANES) {
                const floats weights = exponential(load(scores.data() + key) - subtracted);
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
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const float weight = shared.weight[chunk * count + head];
                shares[chunk] = weight ? std::exp(shared.largest[chunk * count + head] - largest) : 0.0f;
                weight_sum += shares[chunk] * weight;
            }
            for (int64_t i = 0; i < size; ++i) {
                float value = 0;
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    if (shares[chunk]) value += shares[chunk] * shared.mixed[(chunk * count + head) * size + i];
                store(input.data() + head * size + i, weight_sum ? value / weight_sum : 0.0f);
            }
        }
    }

    void swiglu(const Layer &layer) {
        const Share mine = share(layer.gate.rows);
        const int64_t rows = layer.gate.rows;
        const Inputs<X> activations = inputs(input.data(), {&layer.gate, &layer.up});
        X *inner = (X *)shared.inner.data();
        // A block of rows of both at a time: the gate's values wait in the first-level cache.
        for (int64_t first = mine.first; first < mine.last; first += BLOCK) {
            const int64_t last = std::min(first + BLOCK, mine.last);
            apply<P, T>(layer.gate, first, last, activations, tokens, block.data(), [&](int64_t row, int64_t token, float value) {
                gates[(row - first) * tokens + token] = value / (1 + std::exp(-value));
            });
            apply<P, T>(layer.up, first, last, activations, tokens, block.data(), [&](int64_t row, int64_t token, float value) {
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
        apply<P, T>(model.head, mine.first, mine.last, inputs(input.data(), {&model.head}), step.batch * kept, block.data(),
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
    in_parallel(step.threads, [&](int thread, int threads) { return Pass<P, T>(model, step, shared, thread, threads); });
}
