// What Python calls (`cpu_kernel.py`). Compiled once for each kind of processor, into a library of its own.

#include "attention.h"
#include "decoder.h"
#include "linear.h"
#include "processor.h"

#include <new>
#include <stdexcept>
#include <type_traits>

template <class P, class T>
static void linear(const Linear &matrix, const T *inputs, T *outputs, int64_t tokens, int32_t threads) {
    typedef typename P::X X;
    std::vector<X> converted;
    if (!std::is_same<X, T>::value) {
        converted.resize(tokens * matrix.columns);
        for (size_t i = 0; i < converted.size(); ++i) store(&converted[i], to_float(inputs[i]));
    }
    const X *x = converted.empty() ? (const X *)inputs : converted.data();
    std::vector<float> blocks(threads * BLOCK * tokens);  // here, since no exception may leave the threads
#pragma omp parallel num_threads(threads)
    {
        const Share mine(matrix.rows, omp_get_thread_num(), omp_get_num_threads());
        apply<P, T>(matrix, mine.first, mine.last, {x, nullptr, nullptr}, tokens, blocks.data() + omp_get_thread_num() * BLOCK * tokens,
                    [=](int64_t row, int64_t token, float value) { store(outputs + token * matrix.rows + row, value); });
    }
}

#ifdef BF16_PRODUCTS
typedef HalfProducts Bf16Products;
#else
typedef FloatProducts Bf16Products;
#endif

enum Outcome : int32_t { DONE = 0, NO_MEMORY = 1, FAILED = 2 };

template <class Work> static int32_t outcome(Work work) noexcept {
    try {
        work();
        return DONE;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    } catch (const std::length_error &) {  // more than a vector can count
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

// Raised with every change of what the structures or the arguments below mean; `cpu_kernel.py` has the same.
constexpr int64_t ABI = 1;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void llama_repro_abi(int64_t numbers[6]) {
    const int64_t own[6] = {ABI, sizeof(Linear), sizeof(Layer), sizeof(Model), sizeof(Step), sizeof(Attention)};
    std::copy(own, own + 6, numbers);
}

EXPORTED uint32_t llama_repro_processor() { return processor(); }

EXPORTED int32_t llama_repro_forward(const Model *model, const Step *step) {
    return outcome([=] {
        if (model->dtype == FP32) forward<FloatProducts, float>(*model, *step);
        else forward<Bf16Products, bf16>(*model, *step);
    });
}

EXPORTED int32_t llama_repro_linear(const void *weight, const void *bias, const void *inputs, void *outputs, int64_t rows,
                                    int64_t columns, int64_t tokens, int32_t dtype, int32_t threads) {
    return outcome([=] {
        const Linear matrix = {weight, nullptr, bias, rows, columns, dtype};
        if (dtype == FP32) linear<FloatProducts>(matrix, (const float *)inputs, (float *)outputs, tokens, threads);
        else linear<Bf16Products>(matrix, (const bf16 *)inputs, (bf16 *)outputs, tokens, threads);
    });
}

EXPORTED int32_t llama_repro_attention(const Attention *attention) {
    return outcome([=] {
        if (attention->dtype == FP32) ManyQueries<FloatProducts, float>(*attention).run();
        else ManyQueries<Bf16Products, bf16>(*attention).run();
    });
}
