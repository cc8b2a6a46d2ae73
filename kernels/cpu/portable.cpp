// Plain C++, 8 rows at a time: what runs where there is nothing better, and what the others are compared with.
#include "kernel.h"

namespace ultralowbit {
namespace {

struct Portable {
  static constexpr int N = 8;
  static constexpr int64_t kRows = N;
  static constexpr bool kDigits = false;
  struct F {
    float at[N];
  };
  struct I {
    uint32_t at[N];
  };

  template <class Result, class Value>
  static Result each(Value value) {
    Result result;
    for (int i = 0; i < N; i++) result.at[i] = value(i);
    return result;
  }

  static F set1(float v) {
    return each<F>([=](int) { return v; });
  }
  static F zero() { return set1(0); }
  static I zeroi() {
    return each<I>([](int) { return 0u; });
  }
  static F loadf(const float* p) {
    return each<F>([=](int i) { return p[i]; });
  }
  static void storef(float* p, F v) { std::memcpy(p, v.at, sizeof v.at); }
  static F add(F a, F b) {
    return each<F>([&](int i) { return a.at[i] + b.at[i]; });
  }
  static F sub(F a, F b) {
    return each<F>([&](int i) { return a.at[i] - b.at[i]; });
  }
  static F div(F a, F b) {
    return each<F>([&](int i) { return a.at[i] / b.at[i]; });
  }
  static F if_reached(F x, F bound, F then, F otherwise) {
    return each<F>([&](int i) { return x.at[i] >= bound.at[i] ? then.at[i] : otherwise.at[i]; });
  }
  static bool any(F v) {
    for (float each : v.at)
      if (each != 0) return true;
    return false;
  }
  static F fma(F a, F b, F c) {
    return each<F>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static I addi(I a, I b) {
    return each<I>([&](int i) { return a.at[i] + b.at[i]; });
  }
  static F to_float(I v) {
    return each<F>([&](int i) { return float(int32_t(v.at[i])); });
  }

  static float to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | magnitude << 13);
    return bits_to_float(float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f) | sign);  // subnormals too
  }
  static uint16_t to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return sign | 0x7E00;
    if (magnitude >= 0x47800000) return sign | 0x7C00;
    if (magnitude < 0x38800000)  // a subnormal half: the addition rounds to its last place
      return sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f));
    return sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
  }
  static F halves_n(const uint16_t* p, int64_t n) {
    return each<F>([=](int i) { return i < n ? to_float(p[i]) : 0.f; });
  }
  static void store_n(float* p, F v, int64_t n) { std::memcpy(p, v.at, (n < N ? n : N) * sizeof(float)); }
  static void to_halves(F v, uint16_t* p) {
    for (int i = 0; i < N; i++) p[i] = to_half(v.at[i]);
  }

  template <bool Bytes>
  static void transpose(const uint16_t* words, int64_t stride, I to[16]) {
    for (int d = 0; d < 16; d++)
      to[d] = each<I>([=](int i) -> uint32_t {
        const uint16_t* row = words + i * stride;
        if (!Bytes) return row[2 * d] | uint32_t(row[2 * d + 1]) << 16;
        const int first = d / 4 * 8 + d % 2 * 4, shift = d % 4 / 2 * 8;
        uint32_t bytes = 0;
        for (int b = 0; b < 4; b++) bytes |= uint32_t(row[first + b] >> shift & 0xFF) << (8 * b);
        return bytes;
      });
  }

  static I shift(I v, int bits) {
    return each<I>([&](int i) { return v.at[i] >> bits; });
  }
  static F lookup(const float* table, I nibble) {
    return each<F>([&](int i) { return table[nibble.at[i] & 15]; });
  }

  template <int W>
  static I field(I bytes, int f) {
    constexpr uint32_t mask = ((1u << W) - 1) * 0x01010101u;
    return each<I>([&](int i) { return bytes.at[i] >> (W * f) & mask; });
  }
  template <int W>
  static I dot(I sum, I field, int32_t x) {
    return each<I>([&](int i) {
      uint32_t total = sum.at[i];
      for (int b = 0; b < 32; b += 8) total += (field.at[i] >> b & 0xFF) * uint32_t(int8_t(uint32_t(x) >> b));
      return total;
    });
  }
  template <int W>
  static I placed(I sum, int) {
    return sum;
  }
};

}  // namespace

const Isa kPortable = isa<Portable>("portable");

}  // namespace ultralowbit
