// Sums of products of bfloat16 numbers by AMX tiles: Intel from Sapphire Rapids on, where Linux lets a process use them.
#include "native.h"
#if ULTRALOWBIT_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")
#endif

namespace ultralowbit {
namespace {

constexpr int64_t kTile = 16 * 16;  // pairs of numbers in a tile: 16 columns of x by 16 pairs of tokens, or transposed

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Rows 2 p and 2 p + 1 of x for 16 columns as pairs [p], the first in the low half; rows and columns beyond are 0.
inline __m512i pair(const float* x, int64_t stride, int64_t rows, __mmask16 columns) {
  const __m512 none = _mm512_setzero_ps();
  const __m512 low = rows > 0 ? _mm512_maskz_loadu_ps(columns, x) : none;
  const __m512 high = rows > 1 ? _mm512_maskz_loadu_ps(columns, x + stride) : none;
  const __m512i first = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(low)));
  const __m512i second = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(high)));
  return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

// A 2 x 2 block of tiles of x^T y is added to total: a and b are the packed panels of two tiles each.
void block(const uint32_t* a, int64_t a_next, const uint32_t* b, int64_t b_next, int64_t steps, float* to) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k++) {
    _tile_loadd(4, a + k * kTile, 64);
    _tile_loadd(5, a + a_next + k * kTile, 64);
    _tile_loadd(6, b + k * kTile, 64);
    _tile_loadd(7, b + b_next + k * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, 128);
  _tile_stored(1, to + 16, 128);
  _tile_stored(2, to + 16 * 32, 128);
  _tile_stored(3, to + 16 * 32 + 16, 128);
}

}  // namespace

bool amx_runs_here() {
  static const bool runs = [] {
    unsigned a, b, c, d, a1, b1, c1, d1;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) return false;
    const bool amx = d >> 22 & 1 && d >> 24 & 1, avx512_bf16 = a1 >> 5 & 1;
    constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return amx && avx512_bf16 && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  }();
  return runs;
}

void pack_pairs(const float* x, int64_t tokens, int64_t columns, int64_t tile, uint32_t* left, uint32_t* right) {
  alignas(64) uint32_t pairs[kTile];
  const int64_t width = std::min<int64_t>(16, columns - 16 * tile);
  const __mmask16 mask = width >= 16 ? 0xFFFF : (1u << std::max<int64_t>(0, width)) - 1;
  const __m512i rows = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  for (int64_t k = 0; k < ceil_div(tokens, 32); k++) {
    for (int64_t p = 0; p < 16; p++) {
      const int64_t token = 32 * k + 2 * p;
      const __m512i row = pair(x + token * columns + 16 * tile, columns, tokens - token, mask);
      _mm512_store_si512(pairs + 16 * p, row);
      if (right) _mm512_store_si512(right + k * kTile + 16 * p, row);
    }
    for (int64_t i = 0; left && i < 16; i++)
      _mm512_store_si512(left + k * kTile + 16 * i, _mm512_i32gather_epi32(rows, pairs + i, 4));
  }
}

void add_rows_of_products(const PairsJob& job, int64_t first, int64_t last) {
  alignas(64) float sums[32 * 32];
  const Config config;
  _tile_loadconfig(&config);
  const int64_t panel = job.steps * kTile;
  for (int64_t j = job.symmetric ? first : 0; j < ceil_div(job.m, 32); j++) {
    const int64_t columns = std::min<int64_t>(32, job.m - 32 * j);
    for (int64_t i = first; i < (job.symmetric ? std::min(last, j + 1) : last); i++) {
      float* const total = job.total + 32 * i * job.m + 32 * j;
      block(job.x + 2 * i * panel, panel, job.y + 2 * j * panel, panel, job.steps, sums);
      const int64_t rows = std::min<int64_t>(32, job.n - 32 * i);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) total[r * job.m + c] += sums[32 * r + c];
      if (!job.symmetric || i == j) continue;
      float* const mirrored = job.total + 32 * j * job.m + 32 * i;
      for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) mirrored[c * job.m + r] = total[r * job.m + c];
    }
  }
  _tile_release();
}

}  // namespace ultralowbit
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
