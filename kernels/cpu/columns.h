// Rounds a block of columns (kernels/columns.py), V::N rows of the weight at a time, each of them in a lane.
#pragma once
#include <cstring>
#include <utility>

#include "native.h"

namespace ultralowbit {
namespace {

template <class V>
struct Columns {
  using F = typename V::F;
  static constexpr int64_t N = V::N;
  static constexpr int64_t kTogether = 8;  // columns whose errors reach the later ones in one go

  static F at(const float* from, int64_t index) { return V::loadf(from + index * N); }

  // The last level whose lower bound x reaches; levels and their bounds take turns.
  static F nearest(F x, const float* table, int64_t levels) {
    F value = at(table, 0);
    for (int64_t i = 1; i < levels; i++) value = V::if_reached(x, at(table, 2 * i - 1), at(table, 2 * i), value);
    return value;
  }

  // One column after the other; leaves values [columns, N], and adds R^T (weight - values) to rest [columns, N].
  static void compensate(const BlockJob& job, const float* weight, const float* tables, float* values, float* rest) {
    const int64_t n = job.columns, table_size = (2 * job.levels - 1) * N;
    for (int64_t low = 0; low < n; low += kTogether) {
      const int64_t high = std::min(low + kTogether, n);
      F error[kTogether];
      for (int64_t j = low; j < high; j++) {
        const float* row = job.R + j * n;
        const F w = at(weight, j), wanted = V::add(w, V::div(at(rest, j), V::set1(row[j])));
        const F value = nearest(wanted, tables + job.group[j] * table_size, job.levels);
        V::storef(values + j * N, value);
        error[j - low] = V::sub(w, value);
        for (int64_t k = j; k < high; k++)
          V::storef(rest + k * N, V::fma(V::set1(row[k]), error[j - low], at(rest, k)));
      }
      for (int64_t k = high; k < n; k++) {
        F sum = at(rest, k);
        for (int64_t j = low; j < high; j++) sum = V::fma(V::set1(job.R[j * n + k]), error[j - low], sum);
        V::storef(rest + k * N, sum);
      }
    }
  }

  // gradient [columns, N] = R rest
  static void gradient_of(const BlockJob& job, const float* rest, float* gradient) {
    const int64_t n = job.columns;
    for (int64_t j = 0; j < n; j++) {
      F even = V::zero(), odd = V::zero();  // two chains of sums
      int64_t k = j;
      for (; k + 1 < n; k += 2) {
        even = V::fma(V::set1(job.R[j * n + k]), at(rest, k), even);
        odd = V::fma(V::set1(job.R[j * n + k + 1]), at(rest, k + 1), odd);
      }
      if (k < n) even = V::fma(V::set1(job.R[j * n + k]), at(rest, k), even);
      V::storef(gradient + j * N, V::add(even, odd));
    }
  }

  // One pass over the columns; whether a value has changed.
  static bool sweep(const BlockJob& job, bool forwards, const float* tables, float* values, float* gradient) {
    const int64_t n = job.columns, table_size = (2 * job.levels - 1) * N;
    bool moved = false;
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = forwards ? i : n - 1 - i;
      const float* row = job.gram + j * n;
      const F held = at(values, j), wanted = V::add(held, V::div(at(gradient, j), V::set1(row[j])));
      const F value = nearest(wanted, tables + job.group[j] * table_size, job.levels), change = V::sub(held, value);
      if (!V::any(change)) continue;
      moved = true;
      V::storef(values + j * N, value);
      for (int64_t k = 0; k < n; k++) V::storef(gradient + k * N, V::fma(V::set1(row[k]), change, at(gradient, k)));
    }
    return moved;
  }

  // rest += R^T (before - values)
  static void add(const BlockJob& job, const float* before, const float* values, float* rest) {
    const int64_t n = job.columns;
    for (int64_t j = 0; j < n; j++) {
      const F change = V::sub(at(before, j), at(values, j));
      if (!V::any(change)) continue;
      for (int64_t k = j; k < n; k++)
        V::storef(rest + k * N, V::fma(V::set1(job.R[j * n + k]), change, at(rest, k)));
    }
  }

  static void copy(const float* from, int64_t count, float* to) {
    std::memset(to, 0, N * sizeof(float));
    std::memcpy(to, from, count * sizeof(float));
  }

  // Rows [first, first + count), count <= N. Rows do not depend on each other, nor on which of them share a tile.
  static void round(const BlockJob& job, int64_t first, int64_t count, float* scratch) {
    const int64_t n = job.columns, L = job.levels;
    float *weight = scratch, *values = weight + n * N, *rest = values + n * N, *gradient = rest + n * N;
    float* tables = gradient + n * N;
    for (int64_t j = 0; j < n; j++) {
      copy(job.weight + j * job.out + first, count, weight + j * N);
      copy(job.rest + j * job.out + first, count, rest + j * N);
    }
    for (int64_t g = 0; g < job.groups; g++)
      for (int64_t i = 0; i < L; i++) {
        float* level = tables + (g * (2 * L - 1) + 2 * i) * N;
        copy(job.tables + (g * L + i) * job.out + first, count, level);
        if (i) V::storef(level - N, V::div(V::add(at(level, 0), V::loadf(level - 2 * N)), V::set1(2)));
      }
    compensate(job, weight, tables, values, rest);
    if (job.sweeps) {
      gradient_of(job, rest, gradient);
      float* before = weight;  // which is not needed any more
      std::memcpy(before, values, n * N * sizeof(float));
      for (int64_t s = 0; s < job.sweeps; s++)
        if (!sweep(job, s % 2, tables, values, gradient)) break;
      add(job, before, values, rest);
    }
    for (int64_t j = 0; j < n; j++) {
      std::memcpy(job.values + j * job.out + first, values + j * N, count * sizeof(float));
      std::memcpy(job.rest + j * job.out + first, rest + j * N, count * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace ultralowbit
