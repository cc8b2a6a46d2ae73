// NEON, which every 64-bit ARM has: 4 rows at a time. Compiled again by neon_dotprod.cpp, with products of bytes.
#include "native.h"
#if defined(__aarch64__)
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(DOTPROD) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#elif defined(DOTPROD)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "kernel.h"

namespace ultralowbit {
namespace {

struct Neon {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int N = 4;
  static constexpr int64_t kRows = N;
  static constexpr bool kDigits = false;

  static F zero() { return vdupq_n_f32(0); }
  static I zeroi() { return vdupq_n_s32(0); }
  static F set1(float v) { return vdupq_n_f32(v); }
  static F loadf(const float* p) { return vld1q_f32(p); }
  static void storef(float* p, F v) { vst1q_f32(p, v); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F if_reached(F x, F bound, F then, F otherwise) { return vbslq_f32(vcgeq_f32(x, bound), then, otherwise); }
  static bool any(F v) { return vminvq_u32(vceqq_f32(v, zero())) == 0; }
  static I addi(I a, I b) { return vaddq_s32(a, b); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }

  static F halves_n(const uint16_t* p, int64_t n) {
    uint16_t part[N] = {};
    std::memcpy(part, p, (n < N ? n : N) * sizeof(uint16_t));
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(part)));
  }
  static void store_n(float* p, F v, int64_t n) {
    float part[N];
    storef(part, v);
    std::memcpy(p, part, (n < N ? n : N) * sizeof(float));
  }
  static void to_halves(F v, uint16_t* p) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  template <bool Bytes>
  static void transpose(const uint16_t* words, int64_t stride, I to[16]) {
    for (int part = 0; part < 4; part++, to += 4) {
      I r[4];
      for (int i = 0; i < 4; i++) {
        const uint16x8_t row = vld1q_u16(words + i * stride + part * 8);
        r[i] = vreinterpretq_s32_u16(row);
        if (Bytes) {
          const uint8x16_t bytes = vreinterpretq_u8_u16(row);
          r[i] = vreinterpretq_s32_u8(vuzp1q_u8(bytes, bytes));
          r[i] = vreinterpretq_s32_u64(
              vzip1q_u64(vreinterpretq_u64_s32(r[i]), vreinterpretq_u64_u8(vuzp2q_u8(bytes, bytes))));
        }
      }
      const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1])), b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
      const int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3])), d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
      to[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
      to[1] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
      to[2] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
      to[3] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
    }
  }

  static I shift(I v, int bits) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-bits))); }
  static F lookup(const float* table, I nibble) {  // byte indices 4 * nibble + 0..3
    const uint32x4_t index = vandq_u32(vreinterpretq_u32_s32(nibble), vdupq_n_u32(15));
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404));
    const uint8x16x4_t entries = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
    return vreinterpretq_f32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_u32(bytes)));
  }

  // Bytes are signed here: codes of 8 bits are multiplied as two of 4.
  template <int W>
  static I field(I bytes, int f) {
    return W == 8 ? bytes : vandq_s32(shift(bytes, W * f), vreinterpretq_s32_u8(vdupq_n_u8((1 << W) - 1)));
  }
  static I dot4(I sum, I field, int8x16_t x) {
    const int8x16_t bytes = vreinterpretq_s8_s32(field);
#if defined(DOTPROD)
    return vdotq_s32(sum, bytes, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(bytes), vget_low_s8(x)), high = vmull_high_s8(bytes, x);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
  }
  template <int W>
  static I dot(I sum, I field, int32_t x) {
    const int8x16_t activations = vreinterpretq_s8_s32(vdupq_n_s32(x));
    if (W < 8) return dot4(sum, field, activations);
    const I low = Neon::field<4>(field, 0), high = Neon::field<4>(field, 1);
    return vaddq_s32(dot4(sum, low, activations), vshlq_n_s32(dot4(zeroi(), high, activations), 4));
  }
  template <int W>
  static I placed(I sum, int) {
    return sum;
  }
};

}  // namespace

#if defined(DOTPROD)
const Isa kNeonDotprod = isa<Neon>("neon-dotprod");
#else
const Isa kNeon = isa<Neon>("neon");
#endif

}  // namespace ultralowbit
#if defined(DOTPROD) && defined(__clang__)
#pragma clang attribute pop
#endif
#endif
