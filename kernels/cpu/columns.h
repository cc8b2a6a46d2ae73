// Rounds a block of columns (kernels/columns.py), V::N rows of the weight at a time, each of them in a lane.
#pragma once
#include <algorithm>
#include <cstring>

#include "native.h"

namespace ultralowbit {
namespace {

template <class V>
struct Columns {
  using F = typename V::F;
  static constexpr int64_t N = V::N;
  static constexpr int64_t kTogether = 8;  // columns whose changes reach the others in one go

  static F at(const float* from, int64_t index) { return V::loadf(from + index * N); }

  // The last level whose lower bound x reaches; levels and their bounds take turns.
  static F nearest(F x, const float* table, int64_t levels) {
    F value = at(table, 0);
    for (int64_t i = 1; i < levels; i++) value = V::if_reached(x, at(table, 2 * i - 1), at(table, 2 * i), value);
    return value;
  }

  // Changes of some columns, and the row of R or gram that each of them adds to the others.
  struct Changes {
    int64_t count = 0;
    const float* row[kTogether];
    F by[kTogether];

    void add(const float* of, F change) {
      row[count] = of;
      by[count++] = change;
    }
    // to[k] += sum of row[k] by, in the order of the changes, for k in [low, high)
    void reach(int64_t low, int64_t high, float* to) const { reach<kTogether>(low, high, to); }

    template <int Count>
    void reach(int64_t low, int64_t high, float* to) const {
      if constexpr (Count > 0) {
        if (count < Count) return reach<Count - 1>(low, high, to);
        for (int64_t k = low; k < high; k++) {
          F sum = at(to, k);
#pragma GCC unroll 8
          for (int i = 0; i < Count; i++) sum = V::fma(V::set1(row[i][k]), by[i], sum);
          V::storef(to + k * N, sum);
        }
      }
    }
  };

  // to[k] += row[k] change for k in [low, high)
  static void reach(const float* row, F change, int64_t low, int64_t high, float* to) {
    for (int64_t k = low; k < high; k++) V::storef(to + k * N, V::fma(V::set1(row[k]), change, at(to, k)));
  }

  // One column after the other; leaves values [columns, N], and adds R^T (weight - values) to rest [columns, N].
  static void compensate(const BlockJob& job, const float* weight, const float* tables, float* values, float* rest) {
    const int64_t n = job.columns, table_size = (2 * job.levels - 1) * N;
    for (int64_t low = 0; low < n; low += kTogether) {
      const int64_t high = std::min(low + kTogether, n);
      Changes changes;
      for (int64_t j = low; j < high; j++) {
        const float* row = job.R + j * n;
        const F w = at(weight, j), wanted = V::add(w, V::div(at(rest, j), V::set1(row[j])));
        const F value = nearest(wanted, tables + job.group[j] * table_size, job.levels), error = V::sub(w, value);
        V::storef(values + j * N, value);
        changes.add(row, error);
        reach(row, error, j, high, rest);
      }
      changes.reach(high, n, rest);
    }
  }

  // gradient [columns, N] = R rest
  static void gradient_of(const BlockJob& job, const float* rest, float* gradient) {
    constexpr int kChains = 4;  // of sums, since each addition waits for the one before it
    const int64_t n = job.columns;
    for (int64_t j = 0; j < n; j++) {
      const float* row = job.R + j * n;
      F sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
      int64_t k = j;
      for (; k + kChains <= n; k += kChains)
#pragma GCC unroll 4
        for (int i = 0; i < kChains; i++) sum[i] = V::fma(V::set1(row[k + i]), at(rest, k + i), sum[i]);
      for (; k < n; k++) sum[0] = V::fma(V::set1(row[k]), at(rest, k), sum[0]);
      V::storef(gradient + j * N, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    }
  }

  // One pass over the columns; whether a value has changed.
  static bool sweep(const BlockJob& job, bool forwards, const float* tables, float* values, float* gradient) {
    const int64_t n = job.columns, table_size = (2 * job.levels - 1) * N, parts = ceil_div(n, kTogether);
    bool moved = false;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t low = (forwards ? part : parts - 1 - part) * kTogether, high = std::min(low + kTogether, n);
      Changes changes;
      for (int64_t i = low; i < high; i++) {
        const int64_t j = forwards ? i : low + high - 1 - i;
        const float* row = job.gram + j * n;
        const F held = at(values, j), wanted = V::add(held, V::div(at(gradient, j), V::set1(row[j])));
        const F value = nearest(wanted, tables + job.group[j] * table_size, job.levels), change = V::sub(held, value);
        if (!V::any(change)) continue;
        V::storef(values + j * N, value);
        changes.add(row, change);
        reach(row, change, low, high, gradient);
      }
      changes.reach(0, low, gradient);
      changes.reach(high, n, gradient);
      moved |= changes.count > 0;
    }
    return moved;
  }

  // rest += R^T (before - values)
  static void add(const BlockJob& job, const float* before, const float* values, float* rest) {
    const int64_t n = job.columns;
    for (int64_t low = 0; low < n; low += kTogether) {
      const int64_t high = std::min(low + kTogether, n);
      Changes changes;
      for (int64_t j = low; j < high; j++) {
        const F change = V::sub(at(before, j), at(values, j));
        if (!V::any(change)) continue;
        changes.add(job.R + j * n, change);
        reach(job.R + j * n, change, j, high, rest);
      }
      changes.reach(high, n, rest);
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
