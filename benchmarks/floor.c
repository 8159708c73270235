// Bare loops over the operands of what is measured, split evenly between threads: floors.

#include <stdint.h>

// Under the penalty's gradient: each operand is read once, the gradient written once, 20
// bytes a parameter. No value, no checks, no chunks: nothing that adds to the traffic of memory.
// The tensors stay where they are; every thread takes one contiguous range of all elements.

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

// Under an optimizer's step: parameters and moments, `written` of them, are read and written, the
// gradient and perhaps Fisher and anchor, `read` of them, are read. One sum and one product each, so
// that nothing but the traffic of memory takes time. written and read are constants where inlined.
static inline void traffic(float *const *outs, int written, const float *const *ins, int read,
                           int64_t begin, int64_t end) {
  float *restrict p = outs[0], *restrict m = outs[1], *restrict v = written > 2 ? outs[2] : 0;
  const float *restrict g = ins[0], *restrict f = read > 1 ? ins[1] : 0,
                      *restrict a = read > 1 ? ins[2] : 0;
  for (int64_t i = begin; i < end; ++i) {
    const float sum = read > 1 ? g[i] + f[i] + a[i] : g[i];
    p[i] = 0.5f * p[i] + sum;
    m[i] = 0.5f * m[i] + sum;
    if (written > 2) v[i] = 0.5f * v[i] + sum;
  }
}

void step_traffic(float *const *outs, int written, const float *const *ins, int read,
                  int64_t elements, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t begin = elements / threads * thread;
    const int64_t end = thread + 1 == threads ? elements : elements / threads * (thread + 1);
    if (written == 2 && read == 1) traffic(outs, 2, ins, 1, begin, end);
    if (written == 2 && read == 3) traffic(outs, 2, ins, 3, begin, end);
    if (written == 3 && read == 1) traffic(outs, 3, ins, 1, begin, end);
    if (written == 3 && read == 3) traffic(outs, 3, ins, 3, begin, end);
  }
}
