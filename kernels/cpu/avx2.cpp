// AVX2 with FMA and F16C: 8 rows at a time. Intel from Haswell on, AMD from Zen on.
#include "native.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernel.h"

namespace ultralowbit {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int N = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static I zeroi() { return _mm256_setzero_si256(); }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static I addi(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }

  static F halves_n(const uint16_t* p, int64_t n) {
    uint16_t part[N] = {};
    if (n < N) p = static_cast<const uint16_t*>(std::memcpy(part, p, n * sizeof(uint16_t)));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_n(float* p, F v, int64_t n) {
    float part[N];
    storef(part, v);
    std::memcpy(p, part, (n < N ? n : N) * sizeof(float));
  }
  static void to_halves(F v, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  template <bool Bytes>
  static void transpose(const uint16_t* words, int64_t stride, I to[16]) {
    for (int half = 0; half < 2; half++, to += 8) {
      I r[8], t[8];
      for (int i = 0; i < 8; i++) {
        r[i] = _mm256_loadu_si256(reinterpret_cast<const I*>(words + i * stride + half * 16));
        if (Bytes)
          r[i] = _mm256_shuffle_epi8(
              r[i], _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
      }
      for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      for (int j = 0; j < 4; j++) {
        to[j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
        to[4 + j] = _mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
      }
    }
  }

  static I shift(I v, int bits) { return _mm256_srli_epi32(v, bits); }
  static F lookup(const float* table, I nibble) {  // the lane's bit 3 chooses the half of the table
    const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), nibble);
    const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), nibble);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibble, 28)));
  }

  // Fields stay small enough that a 16-bit sum of two products cannot saturate: 128 * 127 * 2, 15 * 127 * 2.
  template <int W>
  static I field(I bytes, int f) {
    if (W == 8) return bytes;
    const I mask = _mm256_set1_epi8(char(W == 1 ? 1 << f : (1 << W) - 1));
    return _mm256_and_si256(W == 1 ? bytes : _mm256_srli_epi32(bytes, W * f), mask);
  }
  static I pairs(I unsigned_bytes, I x, int weight) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, x), _mm256_set1_epi16(short(weight)));
  }
  template <int W>
  static I dot(I sum, I field, int32_t x) {
    const I activations = _mm256_set1_epi32(x);
    if (W < 8) return addi(sum, pairs(field, activations, 1));
    const I mask = _mm256_set1_epi8(15), high = _mm256_and_si256(_mm256_srli_epi32(field, 4), mask);
    return addi(sum, addi(pairs(_mm256_and_si256(field, mask), activations, 1), pairs(high, activations, 16)));
  }
  template <int W>
  static I placed(I sum, int f) {
    return W == 1 ? _mm256_srai_epi32(sum, f) : sum;
  }
};

}  // namespace

const Isa kAvx2 = isa<Avx2>("avx2");

}  // namespace ultralowbit
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
