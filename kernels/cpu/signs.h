// Weights of sign planes and their gradients (kernels/signs.py), a row at a time.
#pragma once
#include <algorithm>

#include "rows.h"

namespace ultralowbit {
namespace {

template <class V>
struct Signs : Rows<V> {
  using Rows<V>::hadamard;
  using Rows<V>::load;
  using Rows<V>::save;

  // x = the latent weight of a row less its groups' centres
  static void centred(const SignsJob& job, int64_t row, float* x) {
    const int64_t n = job.columns;
    load(static_cast<const char*>(job.latent) + row * n * (job.latent_dtype ? 2 : 4), job.latent_dtype, n, x);
    if (job.centre)
      for (int64_t g = 0; g < job.groups; g++) {
        const float centre = job.centre[row * job.groups + g];
        for (int64_t k = g * job.group; k < end(job, g); k++) x[k] -= centre;
      }
  }

  static int64_t end(const SignsJob& job, int64_t g) {
    const int64_t stop = (g + 1) * job.group;
    return stop < job.columns ? stop : job.columns;
  }

  // Which levels are nearest to x in one group of a row: bit p of a code is plane p's from the last.
  static void nearest(const SignsJob& job, int64_t row, int64_t g, const float* __restrict x, int32_t* __restrict code) {
    constexpr int kMost = 256;
    const int count = 1 << job.planes;
    float level[kMost];
    int order[kMost];
    level[0] = 0;
    for (int64_t p = 0, n = 1; p < job.planes; p++, n *= 2) {
      const float size = job.scale[(row * job.planes + p) * job.groups + g];
      for (int64_t i = n - 1; i >= 0; i--) {
        const float before = level[i];
        level[2 * i] = before - size, level[2 * i + 1] = before + size;
      }
    }
    for (int i = 0; i < count; i++) order[i] = i;
    std::stable_sort(order, order + count, [&](int a, int b) { return level[a] < level[b]; });
    const int64_t low = g * job.group, high = end(job, g);
    for (int64_t k = low; k < high; k++) code[k] = order[0];
    for (int j = 1; j < count; j++) {
      const float middle = (level[order[j]] + level[order[j - 1]]) * 0.5f;
      const int32_t change = order[j] ^ order[j - 1];
      for (int64_t k = low; k < high; k++) code[k] ^= x[k] >= middle ? change : 0;
    }
  }

  // `scratch` holds 3 * columns.
  static void weight(const SignsJob& job, int64_t row, float* scratch) {
    float *__restrict x = scratch, *__restrict w = scratch + job.columns;
    auto* __restrict code = reinterpret_cast<int32_t*>(w + job.columns);
    centred(job, row, x);
    for (int64_t g = 0; g < job.groups; g++) {
      const int64_t low = g * job.group, high = end(job, g);
      nearest(job, row, g, x, code);
      for (int64_t p = 0; p < job.planes; p++) {
        const float stored = job.stored[(row * job.planes + p) * job.groups + g];
        const int32_t bit = 1 << (job.planes - 1 - p);
        for (int64_t k = low; k < high; k++) {
          const float level = code[k] & bit ? stored : -stored;
          w[k] = p ? w[k] + level : level;
        }
      }
      if (job.offset) {
        const float offset = job.offset[row * job.groups + g];
        for (int64_t k = low; k < high; k++) w[k] += offset;
      }
    }
    if (job.hadamard) hadamard(w, job.columns, job.hadamard);
    save(w, job.dtype, job.columns, job.weight, row * job.columns);
  }

  // `scratch` holds 3 * columns.
  static void gradient(const SignsJob& job, int64_t row, float* scratch) {
    const int64_t n = job.columns, sums = job.planes + (job.offset != nullptr);
    float *__restrict x = scratch, *__restrict g = scratch + n;
    auto* __restrict code = reinterpret_cast<int32_t*>(g + n);
    centred(job, row, x);
    load(static_cast<const char*>(job.weight) + row * n * (job.dtype ? 2 : 4), job.dtype, n, g);
    if (job.hadamard) hadamard(g, n, job.hadamard);
    for (int64_t i = 0; i < job.groups; i++) {
      const int64_t low = i * job.group, count = end(job, i) - low;
      nearest(job, row, i, x, code);
      float* sum = job.sums + row * sums * job.groups + i;
      for (int64_t p = 0; p < job.planes; p++)
        sum[p * job.groups] = signed_sum(code + low, g + low, count, 1 << (job.planes - 1 - p));
      if (job.offset) sum[job.planes * job.groups] = Rows<V>::sum(g + low, count);
      const float slope = job.slope[row * job.groups + i];
      for (int64_t k = low; k < low + count; k++) g[k] *= slope;
    }
    save(g, job.latent_dtype, n, job.latent_gradient, row * n);
  }

  // The sum of b g, with the sign b that a bit of the codes means.
  static float signed_sum(const int32_t* __restrict code, const float* __restrict g, int64_t n, int32_t bit) {
    constexpr int kParts = 16;
    float part[kParts] = {};
    int64_t k = 0;
    for (; k + kParts <= n; k += kParts)
      for (int i = 0; i < kParts; i++) part[i] += code[k + i] & bit ? g[k + i] : -g[k + i];
    for (; k < n; k++) part[k % kParts] += code[k] & bit ? g[k] : -g[k];
    double total = 0;
    for (float p : part) total += p;
    return float(total);
  }
};

}  // namespace
}  // namespace ultralowbit
