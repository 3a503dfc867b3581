// Attention of many queries: causal, or with a mask of what each may look at.
//
// Keys and values are packed once for all the query heads that share them, so that both products, queries with keys and
// weights with values, are the same small one: a few rows against columns that lie side by side. It takes 32-bit words:
// one fp32 number, or two bf16 numbers that are summed over together.

#pragma once

#include "linear.h"
#include "parallel.h"

#include <limits>
#include <vector>

struct Attention {
    const void *query, *key, *value;  // (batch, heads, seq, head_dim), (batch, kv_heads, total, head_dim)
    const uint8_t *mask;              // (batch, heads, seq, total) 1: may be looked at; null: causal, and total is seq
    void *output;                     // (batch, seq, heads, head_dim), contiguous
    int64_t batch, heads, kv_heads, seq, total, head_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3], mask_strides[3];  // in values, of the first three dimensions
    float scaling;
    int32_t dtype, threads;
};

constexpr int ROWS = 8;              // queries that are taken together
constexpr int COLUMNS = 2 * LANES;   // keys, or channels of values

// product[row][column] = sum over words of rows[row][word] * columns[word][column], for ROWS rows and COLUMNS columns.
template <class P>
static void multiply(const uint32_t *rows, int64_t row_stride, const uint32_t *columns, int64_t words, float *product, int64_t stride) {
    typename P::Sum sums[ROWS][2] = {};
    for (int64_t word = 0; word < words; ++word) {
        const auto left = P::columns(columns + word * COLUMNS), right = P::columns(columns + word * COLUMNS + LANES);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
            const auto factor = P::splat(rows + row * row_stride + word);
            sums[row][0] = P::add(sums[row][0], left, factor);
            sums[row][1] = P::add(sums[row][1], right, factor);
        }
    }
    for (int row = 0; row < ROWS; ++row) std::memcpy(product + row * stride, sums[row], sizeof(sums[row]));
}

template <class P, class T> class ManyQueries {
    typedef typename P::X X;
    static constexpr int64_t PAIR = sizeof(uint32_t) / sizeof(X);
    const Attention &a;
    const int64_t key_tiles, channel_tiles, words;  // words of a query or key
    std::vector<uint32_t> keys, values;             // (batch * kv_heads, key_tiles, words, COLUMNS), (.., channel_tiles, key words, COLUMNS)

  public:
    explicit ManyQueries(const Attention &a)
        : a(a), key_tiles((a.total + COLUMNS - 1) / COLUMNS), channel_tiles((a.head_dim + COLUMNS - 1) / COLUMNS),
          words(a.head_dim / PAIR), keys(a.batch * a.kv_heads * key_tiles * words * COLUMNS),
          values(a.batch * a.kv_heads * channel_tiles * key_tiles * (COLUMNS / PAIR) * COLUMNS) {}

    void run() {
        in_parallel(a.threads, [&](int, int) { return Worker(*this); });
    }

  private:
    // A thread, and its memory for the queries that it takes together.
    class Worker {
        ManyQueries &all;
        std::vector<float> scores;
        std::vector<X> weights, queries;

      public:
        explicit Worker(ManyQueries &all)
            : all(all), scores(ROWS * all.key_tiles * COLUMNS), weights(ROWS * all.key_tiles * COLUMNS),
              queries(ROWS * all.a.head_dim) {}

        void run() {
            const Attention &a = all.a;
            const int64_t groups = a.heads / a.kv_heads, blocks = (a.seq + ROWS - 1) / ROWS;
#pragma omp for schedule(static)
            for (int64_t task = 0; task < a.batch * a.kv_heads * all.key_tiles; ++task)
                all.pack(task / all.key_tiles, task % all.key_tiles);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < a.batch * a.heads * blocks; ++task) {
                const int64_t head = task / blocks;  // (batch, heads)
                all.attend(head / a.heads, head % a.heads, head / a.heads * a.kv_heads + head % a.heads / groups,
                           (blocks - 1 - task % blocks) * ROWS, queries.data(), scores.data(), weights.data());
            }
        }
    };

    const T *at(const void *data, const int64_t *strides, int64_t batch, int64_t head, int64_t place) const {
        return (const T *)data + batch * strides[0] + head * strides[1] + place * strides[2];
    }

    uint32_t *key_tile(int64_t head, int64_t tile) { return keys.data() + (head * key_tiles + tile) * words * COLUMNS; }

    uint32_t *value_tile(int64_t head, int64_t tile) {
        return values.data() + (head * channel_tiles + tile) * key_tiles * (COLUMNS / PAIR) * COLUMNS;
    }

    void pack(int64_t head, int64_t tile) {  // head: (batch, kv_heads)
        X *packed_keys = (X *)key_tile(head, tile);
        for (int64_t column = 0; column < std::min<int64_t>(COLUMNS, a.total - tile * COLUMNS); ++column) {
            const int64_t place = tile * COLUMNS + column;
            const T *key = at(a.key, a.key_strides, head / a.kv_heads, head % a.kv_heads, place);
            const T *value = at(a.value, a.value_strides, head / a.kv_heads, head % a.kv_heads, place);
            for (int64_t i = 0; i < a.head_dim; ++i)
                convert(key[i], packed_keys + (i / PAIR * COLUMNS + column) * PAIR + i % PAIR);
            for (int64_t i = 0; i < a.head_dim; ++i) {
                X *packed = (X *)value_tile(head, i / COLUMNS);
                convert(value[i], packed + (place / PAIR * COLUMNS + i % COLUMNS) * PAIR + place % PAIR);
            }
        }
    }

    static void convert(T from, X *to) { store(to, to_float(from)); }

    void attend(int64_t batch, int64_t head, int64_t kv_head, int64_t first, X *queries, float *scores, X *weights) {
        const int64_t rows = std::min<int64_t>(ROWS, a.seq - first), stride = key_tiles * COLUMNS;
        const int64_t tiles = (seen_by(batch, head, first, rows) + COLUMNS - 1) / COLUMNS, columns = tiles * COLUMNS;
        for (int64_t row = 0; row < ROWS; ++row) {  // past the last query: the last once more
            const T *query = at(a.query, a.query_strides, batch, head, first + std::min(row, rows - 1));
            for (int64_t i = 0; i < a.head_dim; ++i) convert(query[i], queries + row * a.head_dim + i);
        }
        for (int64_t tile = 0; tile < tiles; ++tile)
            multiply<P>((const uint32_t *)queries, words, key_tile(kv_head, tile), words, scores + tile * COLUMNS, stride);
        float totals[ROWS] = {};
        for (int64_t row = 0; row < ROWS; ++row) {
            if (row < rows) totals[row] = softmax(batch, head, first + row, columns, scores + row * stride, weights + row * columns);
            else std::memset(weights + row * columns, 0, columns * sizeof(X));
        }
        float mixed[ROWS * COLUMNS];
        for (int64_t tile = 0; tile < channel_tiles; ++tile) {
            multiply<P>((const uint32_t *)weights, columns / PAIR, value_tile(kv_head, tile), columns / PAIR, mixed, COLUMNS);
            for (int64_t row = 0; row < rows; ++row) {
                T *output = (T *)a.output + ((batch * a.seq + first + row) * a.heads + head) * a.head_dim + tile * COLUMNS;
                const float factor = totals[row] ? 1 / totals[row] : 0;
                for (int64_t i = 0; i < std::min<int64_t>(COLUMNS, a.head_dim - tile * COLUMNS); ++i)
                    store(output + i, mixed[row * COLUMNS + i] * factor);
            }
        }
    }

    // How many keys there are up to the last one that one of these queries may look at.
    int64_t seen_by(int64_t batch, int64_t head, int64_t first, int64_t rows) const {
        if (!a.mask) return first + rows;
        int64_t seen = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const uint8_t *mask = mask_of(batch, head, first + row);
            int64_t key = a.total;
            while (key > seen && !mask[key - 1]) --key;
            seen = key;
        }
        return seen;
    }

    const uint8_t *mask_of(int64_t batch, int64_t head, int64_t place) const {
        return a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1] + place * a.mask_strides[2];
    }

    // The weights of a query before their division by their sum, which is returned: 0 where it may look at nothing.
    float softmax(int64_t batch, int64_t head, int64_t place, int64_t columns, float *scores, X *weights) const {
        constexpr float NOTHING = -std::numeric_limits<float>::infinity();
        const int64_t seen = std::min(columns, a.mask ? a.total : place + 1);
        if (a.mask) {
            const uint8_t *mask = mask_of(batch, head, place);
            for (int64_t key = 0; key < seen; ++key) scores[key] = mask[key] ? scores[key] : NOTHING;
        }
        std::fill(scores + seen, scores + columns, NOTHING);
        floats most = floats{} + NOTHING;
        for (int64_t key = 0; key < columns; key += LANES) {
            const floats some = load(scores + key);
            most = some > most ? some : most;
        }
        float largest = NOTHING;
        for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
        if (largest == NOTHING) largest = 0;  // no key may be looked at, or every score is NaN
        floats total = {};
        for (int64_t key = 0; key < columns; key += LANES) {
            const floats some = exponential((load(scores + key) - largest) * a.scaling);
            store(weights + key, some);
            total += some;
        }
        return sum(total);
    }
};
