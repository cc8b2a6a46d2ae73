// AVX2 with FMA and F16C: 32 rows at a time, by digits. Intel from Haswell on, AMD from Zen on.
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
  static constexpr bool kDigits = true;
  static constexpr int64_t kRows = 32;

  static F set1(float v) { return _mm256_set1_ps(v); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F zero() { return _mm256_setzero_ps(); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F if_reached(F x, F bound, F then, F otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
  }
  static bool any(F v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_NEQ_UQ)); }

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

  // Bytes of 32 words of 32 rows -> to[2 * word + byte], a byte a row. `sum` leaves rows 0-7 in the even bytes of its
  // first and third quarter, and so on: that order is made here, by which rows are loaded into which place.
  static void transpose(const uint16_t* words, int64_t stride, I to[64]) {
    static constexpr int rows[16] = {0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27};
    for (int part = 0; part < 4; part++, words += 8, to += 16) {
      I r[16];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        I of[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const uint16_t* from = words + rows[k + 4 * i] * stride;
          of[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(from)), load128(from + 4 * stride), 1);
        }
        rotate(of, r + 4 * k);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const I of[4] = {r[k], r[k + 4], r[k + 8], r[k + 12]};
        rotate(of, to + 4 * k);
      }
    }
  }
  // Vectors k, k + 4, k + 8 and k + 12 of 16 -> 4 k to 4 k + 3, in whose bytes' places vector and byte have rotated by two
  // bits: done to all, and twice, that exchanges the two. By fours, since no more stay in registers.
  static void rotate(const I (&of)[4], I* to) {
    const I a = _mm256_unpacklo_epi8(of[0], of[2]), b = _mm256_unpackhi_epi8(of[0], of[2]);
    const I c = _mm256_unpacklo_epi8(of[1], of[3]), d = _mm256_unpackhi_epi8(of[1], of[3]);
    to[0] = _mm256_unpacklo_epi8(a, c);
    to[1] = _mm256_unpackhi_epi8(a, c);
    to[2] = _mm256_unpacklo_epi8(b, d);
    to[3] = _mm256_unpackhi_epi8(b, d);
  }
  static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  // Digits of round(entry * inverse), made positive, of a table's 16 entries; a digit's bytes are 4 * 16 apart.
  template <int D>
  static void split(const float* entry, float inverse, uint8_t* to) {
    const F factor = set1(inverse);
    const I middle = _mm256_set1_epi32(1 << (D * kDigitBits - 1)), mask = _mm256_set1_epi32((1 << kDigitBits) - 1);
    I a = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(loadf(entry), factor)), middle);
    I b = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(loadf(entry + 8), factor)), middle);
    for (int d = 0; d < D; d++, to += kRun * 16) {
      const I both = _mm256_packus_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
      const I ordered = _mm256_permute4x64_epi64(both, 0xD8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
      a = _mm256_srli_epi32(a, kDigitBits);
      b = _mm256_srli_epi32(b, kDigitBits);
    }
  }

  // What a unit adds to 32 rows: the low or high nibbles of every second vector of w, looked up in `runs` runs of tables
  // [digit, word, 16]. Bytes of a run are added as bytes; 16-bit sums of them keep odd bytes, and all with a carry.
  template <int D>
  static void sum(const uint8_t* table, const I* w, bool high, int64_t runs, float alpha, float* to) {
    const I mask = _mm256_set1_epi8(15);
    I all[D], odd[D];
    for (int d = 0; d < D; d++) all[d] = odd[d] = _mm256_setzero_si256();
    for (int64_t run = 0; run < runs; run++, w += 2 * kRun) {
      I nibble[kRun];
#pragma GCC unroll 4
      for (int i = 0; i < kRun; i++)
        nibble[i] = _mm256_and_si256(high ? _mm256_srli_epi16(w[2 * i], 4) : w[2 * i], mask);
#pragma GCC unroll 4
      for (int d = 0; d < D; d++) {
        I bytes = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < kRun; i++, table += 16)
          bytes = _mm256_add_epi8(bytes, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table)), nibble[i]));
        all[d] = _mm256_add_epi16(all[d], bytes);
        odd[d] = _mm256_add_epi16(odd[d], _mm256_srli_epi16(bytes, 8));
      }
    }
    const F factor = set1(alpha);
    const I middle = _mm256_set1_epi32(int(runs) * kRun << (D * kDigitBits - 1));
    for (int side = 0; side < 2; side++) {
      I digit[D];
      for (int d = 0; d < D; d++)
        digit[d] = side ? odd[d] : _mm256_sub_epi16(all[d], _mm256_slli_epi16(odd[d], 8));
      const I weights = _mm256_set1_epi32(1 << (16 + kDigitBits) | 1);
      I low = _mm256_madd_epi16(_mm256_unpacklo_epi16(digit[0], digit[1]), weights);
      I upper = _mm256_madd_epi16(_mm256_unpackhi_epi16(digit[0], digit[1]), weights);
      if constexpr (D == 4) {
        const I low2 = _mm256_madd_epi16(_mm256_unpacklo_epi16(digit[2], digit[3]), weights);
        const I upper2 = _mm256_madd_epi16(_mm256_unpackhi_epi16(digit[2], digit[3]), weights);
        low = _mm256_add_epi32(low, _mm256_slli_epi32(low2, 2 * kDigitBits));
        upper = _mm256_add_epi32(upper, _mm256_slli_epi32(upper2, 2 * kDigitBits));
      }
      storef(to + 16 * side, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(low, middle)), factor));
      storef(to + 16 * side + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(upper, middle)), factor));
    }
  }
};

}  // namespace

const Isa kAvx2 = isa<Avx2>("avx2");

}  // namespace ultralowbit
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
