// Weights of serial signs and their gradients (kernels/signs.py), a row at a time.
#pragma once
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

  // `scratch` holds 2 * columns.
  static void weight(const SignsJob& job, int64_t row, float* scratch) {
    float *__restrict x = scratch, *__restrict w = scratch + job.columns;
    centred(job, row, x);
    for (int64_t g = 0; g < job.groups; g++) {
      const int64_t low = g * job.group, high = end(job, g);
      for (int64_t p = 0; p < job.planes; p++) {
        const int64_t at = (row * job.planes + p) * job.groups + g;
        const float size = job.scale[at], stored = job.stored[at];
        for (int64_t k = low; k < high; k++) {
          const bool up = x[k] >= 0;
          const float level = up ? stored : -stored;
          w[k] = p ? w[k] + level : level;
          x[k] -= up ? size : -size;
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

  // `scratch` holds 2 * columns.
  static void gradient(const SignsJob& job, int64_t row, float* scratch) {
    const int64_t n = job.columns, sums = job.planes + (job.offset != nullptr);
    float *__restrict x = scratch, *__restrict g = scratch + n;
    centred(job, row, x);
    load(static_cast<const char*>(job.weight) + row * n * (job.dtype ? 2 : 4), job.dtype, n, g);
    if (job.hadamard) hadamard(g, n, job.hadamard);
    for (int64_t i = 0; i < job.groups; i++) {
      const int64_t low = i * job.group, count = end(job, i) - low;
      float* sum = job.sums + row * sums * job.groups + i;
      for (int64_t p = 0; p < job.planes; p++)
        sum[p * job.groups] = signed_sum(x + low, g + low, count, job.scale[(row * job.planes + p) * job.groups + i]);
      if (job.offset) sum[job.planes * job.groups] = Rows<V>::sum(g + low, count);
      const float slope = job.slope[row * job.groups + i];
      for (int64_t k = low; k < low + count; k++) g[k] *= slope;
    }
    save(g, job.latent_dtype, n, job.latent_gradient, row * n);
  }

  // The sum of sign(x) g; leaves x - size sign(x).
  static float signed_sum(float* __restrict x, const float* __restrict g, int64_t n, float size) {
    constexpr int kParts = 16;
    float part[kParts] = {};
    int64_t k = 0;
    for (; k + kParts <= n; k += kParts)
      for (int i = 0; i < kParts; i++) {
        const bool up = x[k + i] >= 0;
        part[i] += up ? g[k + i] : -g[k + i];
        x[k + i] -= up ? size : -size;
      }
    for (; k < n; k++) {
      const bool up = x[k] >= 0;
      part[k % kParts] += up ? g[k] : -g[k];
      x[k] -= up ? size : -size;
    }
    double total = 0;
    for (float p : part) total += p;
    return float(total);
  }
};

}  // namespace
}  // namespace ultralowbit
