// What every kernel does with a row of numbers: conversions, sums, and multiplying by block Hadamard matrices.
#pragma once
#include <cmath>
#include <cstring>

#include "native.h"

namespace ultralowbit {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  return value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <class V>
struct Rows {
  static constexpr int N = V::N;

  static void load(const void* from, int64_t dtype, int64_t n, float* to) {
    const auto* half = static_cast<const uint16_t*>(from);
    if (dtype == 0) {
      std::memcpy(to, from, n * sizeof(float));
    } else if (dtype == 1) {
      for (int64_t i = 0; i < n; i++) to[i] = bits_to_float(uint32_t(half[i]) << 16);
    } else {
      for (int64_t i = 0; i < n; i += N) V::store_n(to + i, V::halves_n(half + i, n - i), n - i);
    }
  }

  static void save(const float* from, int64_t dtype, int64_t n, void* to, int64_t at) {
    auto* half = static_cast<uint16_t*>(to) + at;
    if (dtype == 0) {
      std::memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
    } else if (dtype == 1) {
      for (int64_t i = 0; i < n; i++) half[i] = to_bfloat16(from[i]);
    } else {
      float part[N];
      for (int64_t i = 0; i < n; i += N) {
        const int64_t count = n - i < N ? n - i : N;
        std::memset(part, 0, sizeof part);
        std::memcpy(part, from + i, count * sizeof(float));
        uint16_t rounded[N];
        V::to_halves(V::loadf(part), rounded);
        std::memcpy(half + i, rounded, count * sizeof(uint16_t));
      }
    }
  }

  static float sum(const float* x, int64_t n) {
    float part[16] = {};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
      for (int i = 0; i < 16; i++) part[i] += x[k + i];
    for (; k < n; k++) part[k % 16] += x[k];
    double total = 0;
    for (float p : part) total += p;
    return float(total);
  }

  // The row times the matrix of `InputTransform`, with the bits of `block_hadamard`: blocks of `block`, smaller ones
  // where that does not fit.
  static void hadamard(float* x, int64_t n, int64_t block) {
    for (int64_t at = 0; at < n; at += block) {
      while (block > n - at) block /= 2;
      walsh(x + at, block);
    }
  }

 private:
  static void walsh(float* x, int64_t size) {
    int64_t half = 1;
    if (size >= kTogether) {
      for (int64_t i = 0; i < size; i += kTogether) rounds_within(x + i);
      half = kTogether;
    }
    for (; half < size; half *= 2)
      for (int64_t i = 0; i < size; i += 2 * half) {
        float *__restrict a = x + i, *__restrict b = a + half;
        for (int64_t k = 0; k < half; k++) {
          const float sum = a[k] + b[k], difference = a[k] - b[k];
          a[k] = sum;
          b[k] = difference;
        }
      }
    const float scale = float(1 / std::sqrt(double(size)));
    for (int64_t k = 0; k < size; k++) x[k] *= scale;
  }

  static constexpr int64_t kTogether = 16;  // numbers whose rounds are shuffles of registers

  // x[k] = x[k ^ half] + x[k], less it in the second of a pair, for half = 1, 2, 4, 8
  static void rounds_within(float* x) {
    float from[kTogether], to[kTogether];
    std::memcpy(from, x, sizeof from);
#pragma GCC unroll 4
    for (int half = 1; half < kTogether; half *= 2) {
#pragma GCC unroll 16
      for (int k = 0; k < kTogether; k++) to[k] = from[k ^ half] + (k & half ? -from[k] : from[k]);
      std::memcpy(from, to, sizeof from);
    }
    std::memcpy(x, from, sizeof from);
  }
};

}  // namespace
}  // namespace ultralowbit
