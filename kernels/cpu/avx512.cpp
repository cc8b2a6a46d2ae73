// AVX-512 with VNNI: 16 rows at a time. Intel from Cascade Lake on, AMD from Zen 4 on.
#include "native.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#include "kernel.h"

namespace ultralowbit {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int N = 16;
  static constexpr int64_t kRows = N;
  static constexpr bool kDigits = false;

  static F zero() { return _mm512_setzero_ps(); }
  static I zeroi() { return _mm512_setzero_si512(); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F if_reached(F x, F bound, F then, F otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), otherwise, then);
  }
  static bool any(F v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NEQ_UQ); }
  static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  static __mmask16 first(int64_t n) { return n >= N ? 0xFFFF : (1u << n) - 1; }
  static F halves_n(const uint16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_n(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void to_halves(F v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  template <bool Bytes>
  static void transpose(const uint16_t* words, int64_t stride, I to[16]) {
    I r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      r[i] = _mm512_loadu_si512(words + i * stride);
      if (Bytes)
        r[i] = _mm512_shuffle_epi8(
            r[i], _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // 128-bit lanes of rows 0-3, 4-7, 8-11, 12-15
      const I low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x44), low2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x44);
      const I high = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xEE), high2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xEE);
      to[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
      to[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xDD);
      to[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
      to[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xDD);
    }
  }

  static I shift(I v, int bits) { return _mm512_srli_epi32(v, bits); }
  static F lookup(const float* table, I nibble) { return _mm512_permutexvar_ps(nibble, _mm512_loadu_ps(table)); }

  template <int W>
  static I field(I bytes, int f) {
    return W == 8 ? bytes : _mm512_and_si512(bytes, _mm512_set1_epi8(char(((1 << W) - 1) << (W * f))));
  }
  template <int W>
  static I dot(I sum, I field, int32_t x) {
    return _mm512_dpbusd_epi32(sum, field, _mm512_set1_epi32(x));
  }
  template <int W>
  static I placed(I sum, int f) {
    return _mm512_srai_epi32(sum, W * f);
  }
};

}  // namespace

const Isa kAvx512 = isa<Avx512>("avx512");

}  // namespace ultralowbit
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
