// The floor under the penalty's gradient: each operand is read once, the gradient written once, 20
// bytes a parameter. No value, no checks, no chunks: nothing that adds to the traffic of memory.
// The tensors stay where they are; every thread takes one contiguous range of all elements.
#include <stdint.h>

void add_penalty_grad(float *const *grads, const float *const *params, const float *const *fisher,
                      const float *const *anchor, const int64_t *sizes, int64_t tensors,
                      int64_t elements, float ewc_lambda, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t begin = elements / threads * thread;
    const int64_t end = thread + 1 == threads ? elements : elements / threads * (thread + 1);
    int64_t before = 0;
    for (int64_t tensor = 0; tensor < tensors && before < end; before += sizes[tensor++]) {
      float *restrict g = grads[tensor];
      const float *restrict p = params[tensor];
      const float *restrict f = fisher[tensor];
      const float *restrict a = anchor[tensor];
      const int64_t last = end - before < sizes[tensor] ? end - before : sizes[tensor];
      for (int64_t i = begin > before ? begin - before : 0; i < last; ++i)
        g[i] += ewc_lambda * f[i] * (p[i] - a[i]);
    }
  }
}
