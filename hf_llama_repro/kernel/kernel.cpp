// What Python calls (`cpu_kernel.py`).

#include "attention.h"
#include "decoder.h"
#include "linear.h"

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
#pragma omp parallel num_threads(threads)
    {
        const Share mine(matrix.rows, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> block(BLOCK * tokens);
        apply<P, T>(matrix, mine.first, mine.last, {x, nullptr, nullptr}, tokens, block.data(),
                    [=](int64_t row, int64_t token, float value) { store(outputs + token * matrix.rows + row, value); });
    }
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

void llama_repro_attention(const Attention *attention) {
    if (attention->dtype == FP32) ManyQueries<FloatProducts, float>(*attention).run();
    else ManyQueries<Bf16Products, bf16>(*attention).run();
}
}
