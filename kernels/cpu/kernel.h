// The kernels, written once over an instruction set V of V::N lanes; each lane is a row of the weight.
//
// exact   The words of V::N rows are transposed so that a lane holds a row's word. For each nibble of a word (four
//         columns of 1 bit, two of 2 bits, ...) there is a table of the 16 sums of activations that it can mean: one
//         lookup and one addition in fp32 multiply V::N rows by these columns. The tables are made once a call and
//         serve every row; only packed words stream from memory.
// int8    Activations are rounded to 8 bits with a scale for each unit of columns. Fields are masked in place and
//         multiplied as bytes; sums are exact integers.
//
// Where an instruction set looks up bytes many times faster than floats (V::kDigits), both modes are one: the sums of a
// table are rounded to fixed point, against the largest of their unit of columns, and cut into digits of 6 bits, whose
// tables are looked up for V::kRows rows at once and added as integers. Four digits are exact: 24 bits, the precision of
// fp32, and no rounding in the sums; two are what int8 runs, which is finer than activations of 8 bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "columns.h"
#include "native.h"
#include "rows.h"
#include "signs.h"

namespace ultralowbit {
namespace {

inline const uint16_t* halves_at(void* const* tensors, int64_t index) {
  return static_cast<const uint16_t*>(tensors[index]);
}

constexpr int64_t kLine = 64;  // bytes of a cache line

constexpr int kDigitBits = 6, kRun = 4;  // so many digits of 6 bits add up to a byte at most

// The tables of a pass, [unit, run of words, digit, word, 16], and what turns a unit's integer sum into a float.
template <int D>
struct alignas(64) DigitPass {
  uint8_t table[4][kLanes / kRun][D][kRun][16];
  float alpha[4];
};

template <class V>
struct Kernel : Rows<V> {
  using Rows<V>::hadamard;
  using Rows<V>::load;
  using Rows<V>::save;
  using Rows<V>::sum;
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int N = V::N;
  static constexpr int64_t kExactBytes = V::kDigits ? sizeof(DigitPass<4>) : kExactPass;
  static constexpr int64_t kInt8Bytes = V::kDigits ? sizeof(DigitPass<2>) : sizeof(Int8Pass);

  // ---- x: transform, sums, tables ----

  static void input(const Plan& plan, void* const* tensors, const void* x, int64_t dtype, float* out, float* scratch) {
    const int64_t n = plan.columns;
    float* first = plan.channel_order < 0 ? out : scratch;
    load(x, dtype, n, first);
    if (plan.hadamard) hadamard(first, n, plan.hadamard);
    if (plan.channel_order >= 0) {
      const uint16_t* words = halves_at(tensors, plan.channel_order);
      float *marked = out, *others = out + plan.first;
      for (int64_t k = 0; k < n; k++) *(code_at(words, n, 1, k) ? marked : others)++ = first[k];
    }
    if (plan.column_scale >= 0) {
      load(halves_at(tensors, plan.column_scale), 2, n, scratch);
      for (int64_t k = 0; k < n; k++) out[k] *= scratch[k];
    }
  }

  // Field of one column in a row's words.
  static int code_at(const uint16_t* words, int64_t columns, int width, int64_t column) {
    const int64_t span = kWordBits / width * kLanes, block = column / span, rest = columns - block * span;
    const int64_t lanes = rest >= span ? kLanes : ceil_div(rest, kWordBits / width), k = column - block * span;
    return words[block * kLanes + k % lanes] >> (width * (k / lanes)) & ((1 << width) - 1);
  }

  static void prepare(const Table& t, const Layout& layout, const float* x, bool int8, char* passes, int64_t step,
                      float* sums) {
    x += t.column;
    for (int64_t g = 0, start = 0; start < t.columns; g++, start += t.group)
      sums[g] = sum(x + start, t.columns - start < t.group ? t.columns - start : t.group);
    for (const Superblock& block : layout.blocks) {
      // the fields of the superblock, [field, lane], that no pass has to look for beyond its end
      float fields[16][kLanes] = {};
      const int count = kWordBits / t.width, lanes = block.lanes;
      for (int64_t f = 0; f < count; f++) {
        const int64_t start = block.column + f * lanes, rest = t.columns - start;
        if (rest > 0) std::memcpy(fields[f], x + start, (rest < lanes ? rest : lanes) * sizeof(float));
      }
      for (int64_t p = block.first_pass; p < block.first_pass + block.passes; p++) {
        float kept[16][kLanes];
        const float(*used)[kLanes] = fields;
        if (block.passes > 1) {
          for (int f = 0; f < count; f++) {
            const int64_t group = layout.passes[p].group[f * t.width / 4];
            for (int c = 0; c < kLanes; c++) {
              const int64_t column = block.column + f * lanes + c;
              kept[f][c] = group >= 0 && column / t.group == group ? fields[f][c] : 0;
            }
          }
          used = kept;
        }
        char* pass = passes + p * step;
        if constexpr (V::kDigits) {
          if (int8) digits(t, used, lanes, *reinterpret_cast<DigitPass<2>*>(pass));
          else digits(t, used, lanes, *reinterpret_cast<DigitPass<4>*>(pass));
        } else {
          if (int8) activations(t, used, lanes, *reinterpret_cast<Int8Pass*>(pass));
          else tables(t, used, lanes, reinterpret_cast<float*>(pass));
        }
      }
    }
  }

  // tables [dword, word of it, nibble, 16]: the sum over the nibble's fields of (mul * code + add) x
  static void tables(const Table& t, const float (*x)[kLanes], int lanes, float* to) {
    const int width = t.width, per_nibble = width < 4 ? 4 / width : 1;
    float meaning[2][4][16];  // of a low nibble's codes, of a high nibble's (only where a code has two), by field
    for (int i = 0; i < per_nibble; i++)
      for (int code = 0; code < 16; code++) {
        const int field = code >> (width < 4 ? width * i : 0) & (width < 4 ? (1 << width) - 1 : 15);
        meaning[0][i][code] = float(t.mul * field + t.add);
        meaning[1][i][code] = width == 8 ? float(16 * t.mul * field) : meaning[0][i][code];
      }
    for (int c = 0; c < (lanes + 1) / 2 * 2; c++)
      for (int q = 0; q < 4; q++, to += 16) {
        float entry[16] = {};
        for (int i = 0; i < per_nibble; i++) {
          const float value = c < lanes ? x[width == 8 ? q / 2 : q * per_nibble + i][c] : 0;
          const float* by_code = meaning[q & 1][i];
          for (int code = 0; code < 16; code++) entry[code] += by_code[code] * value;
        }
        std::memcpy(to, entry, sizeof entry);
      }
  }

  template <int D>
  static void digits(const Table& t, const float (*x)[kLanes], int lanes, DigitPass<D>& to) {
    alignas(64) float entries[kLanes][4][16];
    std::memset(entries + lanes / 2 * 2, 0, (kLanes - lanes / 2 * 2) * sizeof entries[0]);
    tables(t, x, lanes, entries[0][0]);
    for (int q = 0; q < 4; q++) {
      float most[16] = {}, finite[16] = {};  // by code; 0, or NaN where an entry is none
      for (int c = 0; c < lanes; c++)
        for (int code = 0; code < 16; code++) {
          most[code] = std::max(most[code], std::fabs(entries[c][q][code]));
          finite[code] += entries[c][q][code] * 0;
        }
      const float largest = std::max(0x1p-100f, *std::max_element(most, most + 16));
      constexpr float top = (1 << (D * kDigitBits - 1)) - 4;  // rounding may go beyond it by less
      to.alpha[q] = largest / top + std::accumulate(finite, finite + 16, 0.f);
      for (int c = 0; c < kLanes; c++)
        V::template split<D>(entries[c][q], top / largest, to.table[q][c / kRun][0][c % kRun]);
    }
  }

  static void activations(const Table& t, const float (*x)[kLanes], int lanes, Int8Pass& to) {
    const int width = t.width, per_unit = width < 4 ? 4 / width : 1, per_byte = 8 / width;
    int8_t rounded[16][kLanes] = {};
    for (int unit = 0; unit < 4; unit += width == 8 ? 2 : 1) {
      const int first = width == 8 ? unit / 2 : unit * per_unit;
      float largest = 0, finite = 0;  // 0, or NaN where a value is none
      for (int f = first; f < first + per_unit; f++)
        for (int c = 0; c < lanes; c++) {
          largest = std::fmax(largest, std::fabs(x[f][c]));
          finite += x[f][c] * 0;
        }
      const float scale = largest / 127 + finite, inverse = scale > 0 ? 1 / scale : 0;
      int total = 0;
      for (int f = first; f < first + per_unit; f++)
        for (int c = 0; c < lanes; c++) total += rounded[f][c] = int8_t(std::nearbyint(x[f][c] * inverse));
      to.alpha[unit] = scale * t.mul;
      to.beta[unit] = scale * t.add * total;
    }
    auto* bytes = reinterpret_cast<int8_t*>(to.x);
    for (int high = 0; high < 2; high++)
      for (int c = 0; c < kLanes; c += 4)
        for (int f = 0; f < per_byte; f++)
          for (int i = 0; i < 4; i++) *bytes++ = rounded[high * per_byte + f][c + i];
  }

  // ---- the product ----

  // 32 words of N rows, a dword a lane; Bytes: dwords of four words' low bytes, then of their high bytes.
  template <bool Bytes>
  static void transposed(const uint16_t* words, int64_t stride, int64_t rows, int64_t lanes, I to[16]) {
    if (rows >= N && lanes == kLanes) return V::template transpose<Bytes>(words, stride, to);
    alignas(64) uint16_t copy[N][kLanes] = {};
    for (int64_t r = 0; r < rows && r < N; r++) std::memcpy(copy[r], words + r * stride, lanes * sizeof(uint16_t));
    V::template transpose<Bytes>(copy[0], kLanes, to);
  }

  // y[token] += scale[group] * unit, units of one group summed first
  template <int T>
  static void apply(const F (&units)[T][4], const Pass& pass, const uint16_t* scale, int64_t out, int64_t rows,
                    float* y, int64_t step) {
    F sum[T];
    for (int t = 0; t < T; t++) sum[t] = V::loadf(y + t * step);
    for (int q = 0; q < 4; q++) {
      const int64_t group = pass.group[q];
      if (group < 0) continue;
      F total[T];
      for (int t = 0; t < T; t++) total[t] = units[t][q];
      for (; q < 3 && pass.group[q + 1] == group; q++)
        for (int t = 0; t < T; t++) total[t] = V::add(total[t], units[t][q + 1]);
      const F factor = V::halves_n(scale + group * out, rows);
      for (int t = 0; t < T; t++) sum[t] = V::fma(factor, total[t], sum[t]);
    }
    for (int t = 0; t < T; t++) V::storef(y + t * step, sum[t]);
  }

  template <int T>
  __attribute__((noinline)) static void exact_pass(const char* table, int64_t dwords, const I (&w)[16], F (&units)[T][4]) {
    for (auto& token : units)
      for (F& unit : token) unit = V::zero();
    const auto* entry = reinterpret_cast<const float*>(table);
    for (int64_t d = 0; d < dwords; d++, entry += 8 * 16) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        const I nibble = V::shift(w[d], 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          const float* here = entry + j * 16 + t * (kExactPass / sizeof(float));
          units[t][j % 4] = V::add(units[t][j % 4], V::lookup(here, nibble));
        }
      }
    }
  }

  template <int W, int T>
  __attribute__((noinline)) static void int8_pass(const char* passes, int64_t lanes, const I (&w)[16], F (&units)[T][4]) {
    constexpr int fields = 8 / W, per_unit = W < 4 ? 4 / W : 1;
    const auto* pass = reinterpret_cast<const Int8Pass*>(passes);
#pragma GCC unroll 2
    for (int high = 0; high < 2; high++) {
      I total[T][fields];
      for (auto& token : total)
        for (I& field : token) field = V::zeroi();
      for (int64_t e = 0; e < ceil_div(lanes, 8) * 2; e++) {
        const I bytes = w[e / 2 * 4 + high * 2 + e % 2];
#pragma GCC unroll 8
        for (int f = 0; f < fields; f++) {
          const I field = V::template field<W>(bytes, f);
#pragma GCC unroll 4
          for (int t = 0; t < T; t++)
            total[t][f] = V::template dot<W>(total[t][f], field, pass[t].x[(high * 8 + e) * fields + f]);
        }
      }
      for (int t = 0; t < T; t++)
        for (int n = 0; n < 2; n++) {
          if (W == 8 && n) {  // a byte is two units of the same columns: the first has it all
            units[t][2 * high + n] = V::zero();
            continue;
          }
          I sum = V::template placed<W>(total[t][n * per_unit], n * per_unit);
          for (int i = 1; i < per_unit; i++)
            sum = V::addi(sum, V::template placed<W>(total[t][n * per_unit + i], n * per_unit + i));
          const int q = 2 * high + n;
          units[t][q] = V::fma(V::to_float(sum), V::set1(pass[t].alpha[q]), V::set1(pass[t].beta[q]));
        }
    }
  }

  // What this core will need for its next rows, a part for each call: superblocks jump from row to row, and scales from
  // group to group, which the hardware does not foresee, while the words of whole rows lie one after the other.
  struct Prefetch {
    const char *words, *words_end, *scale;
    int64_t groups, stride, bytes, at, lines;  // of scale: groups, bytes from one to the next and of one; lines a call
    void operator()() {
      int64_t n = lines;
      for (; n > 0 && words < words_end; n--, words += kLine) __builtin_prefetch(words);
      for (; n > 0 && groups > 0; n--) {
        __builtin_prefetch(scale + at);
        if ((at += kLine) >= bytes) groups--, at = 0, scale += stride;
      }
    }
  };

  template <bool Int8, int T>
  static void tokens(const Job& job, const Stream& s, const Superblock& block, int64_t table_token, int64_t first,
                     int64_t count, float* y, int64_t step, Prefetch& prefetch) {
    const Table& t = job.plan->table[s.table];
    const Layout& layout = job.layouts[s.table];
    const auto* words = static_cast<const uint16_t*>(job.tensors[s.words]) +
                        (s.plane * job.out + first) * s.stride + s.skip + block.column / (kWordBits / t.width);
    const uint16_t* scale = halves_at(job.tensors, s.scale) + s.plane * groups_of(t) * job.out + first;
    constexpr int64_t size = Int8 ? kInt8Bytes : kExactBytes;
    const char* passes = job.passes[s.table] + (block.first_pass * job.tokens + table_token) * size;
    if constexpr (V::kDigits) {
      constexpr int D = Int8 ? 2 : 4;
      const int64_t runs = ceil_div(block.lanes, kRun);
      for (int64_t row = 0; row < count; row += V::kRows) {
        const int64_t rest = count - row;
        I w[2 * kLanes];
        if (rest >= V::kRows && block.lanes == kLanes) {
          V::transpose(words + row * s.stride, s.stride, w);
        } else {
          alignas(64) uint16_t copy[V::kRows][kLanes] = {};
          for (int64_t r = 0; r < rest && r < V::kRows; r++)
            std::memcpy(copy[r], words + (row + r) * s.stride, block.lanes * sizeof(uint16_t));
          V::transpose(copy[0], kLanes, w);
        }
        for (int64_t p = 0; p < block.passes; p++)
          for (int t = 0; t < T; t++) {
            const auto& pass = *reinterpret_cast<const DigitPass<D>*>(passes + (p * job.tokens + t) * size);
            float units[4][V::kRows];
            for (int q = 0; q < 4; q++) {
              prefetch();
              V::template sum<D>(pass.table[q][0][0][0], w + q / 2, q % 2, runs, pass.alpha[q], units[q]);
            }
            for (int64_t r = 0; r < V::kRows && r < rest; r += N) {
              F part[1][4];
              for (int q = 0; q < 4; q++) part[0][q] = V::loadf(units[q] + r);
              apply<1>(part, layout.passes[block.first_pass + p], scale + row + r, job.out, rest - r,
                       y + t * step + row + r, step);
            }
          }
      }
      return;
    } else for (int64_t row = 0; row < count; row += V::kRows) {
      prefetch();
      I w[16];
      transposed<Int8>(words + row * s.stride, s.stride, count - row, block.lanes, w);
      for (int64_t p = 0; p < block.passes; p++) {
        F units[T][4];
        const char* pass = passes + p * job.tokens * size;
        if constexpr (!Int8) exact_pass<T>(pass, (block.lanes + 1) / 2, w, units);
        else if (t.width == 1) int8_pass<1, T>(pass, block.lanes, w, units);
        else if (t.width == 2) int8_pass<2, T>(pass, block.lanes, w, units);
        else if (t.width == 4) int8_pass<4, T>(pass, block.lanes, w, units);
        else int8_pass<8, T>(pass, block.lanes, w, units);
        apply<T>(units, layout.passes[block.first_pass + p], scale + row, job.out, count - row, y + row, step);
      }
    }
  }

  template <bool Int8>
  static void streams(const Job& job, int64_t first, int64_t count, float* y, int64_t step) {
    for (int64_t i = 0; i < job.plan->streams; i++) {
      const Stream& s = job.plan->stream[i];
      const auto& blocks = job.layouts[s.table].blocks;
      const int64_t next = first + job.ahead, rows = next < job.out ? std::min(count, job.out - next) : 0;
      const char* words = static_cast<const char*>(job.tensors[s.words]) + (s.plane * job.out + next) * s.stride * 2;
      const int64_t groups = groups_of(job.plan->table[s.table]);
      const auto* scale = static_cast<const char*>(job.tensors[s.scale]) + (s.plane * groups * job.out + next) * 2;
      const int64_t calls = blocks.size() * ceil_div(count, V::kRows) * ceil_div(job.tokens, 2) * (V::kDigits ? 4 : 1);
      const int64_t lines = ceil_div(rows * s.stride * 2, kLine) + groups * ceil_div(rows * 2, kLine);
      Prefetch prefetch{words, words + rows * s.stride * 2, scale, rows ? groups : 0, job.out * 2, rows * 2, 0,
                        ceil_div(lines, calls)};
      for (const Superblock& block : blocks) {
        int64_t token = 0;
        for (; token + 2 <= job.tokens; token += 2)
          tokens<Int8, 2>(job, s, block, token, first, count, y + token * step, step, prefetch);
        for (; token < job.tokens; token++)
          tokens<Int8, 1>(job, s, block, token, first, count, y + token * step, step, prefetch);
      }
    }
  }

  // A group's offsets of `n` rows: fp16, or (middle - zero) * scale.
  static void offsets(void* const* tensors, const Offset& o, int64_t out, int64_t group, int64_t row, int64_t n,
                      float* to) {
    const int64_t values = o.width ? o.scale : o.values;
    load(halves_at(tensors, values) + group * out + row, 2, n, to);
    if (!o.width) return;
    const int per_byte = 8 / o.width, shift = o.width * (group % per_byte), mask = (1 << o.width) - 1;
    const auto* bytes = static_cast<const uint8_t*>(tensors[o.values]) + group / per_byte * out + row;
    const int middle = o.middle;
    for (int64_t r = 0; r < n; r++) to[r] *= float(middle - (bytes[r] >> shift & mask));
  }

  static void product(const Job& job, int64_t first, int64_t count, float* y) {
    const int64_t step = ceil_div(count, 16) * 16;
    std::memset(y, 0, job.tokens * step * sizeof(float));
    if (job.int8)
      streams<true>(job, first, count, y, step);
    else
      streams<false>(job, first, count, y, step);
    float values[256];
    for (int64_t i = 0; i < job.plan->offsets; i++) {
      const Offset& o = job.plan->offset[i];
      const int64_t groups = groups_of(job.plan->table[o.table]);
      for (int64_t g = 0; g < groups; g++)
        for (int64_t row = 0; row < count; row += 256) {
          const int64_t n = count - row < 256 ? count - row : 256;
          offsets(job.tensors, o, job.out, g, first + row, n, values);
          for (int64_t t = 0; t < job.tokens; t++) {
            const float sum = job.sums[o.table][t * groups + g];
            for (int64_t r = 0; r < n; r++) y[t * step + row + r] += values[r] * sum;
          }
        }
    }
    for (int64_t t = 0; t < job.tokens; t++)
      save(y + t * step, job.dtype, count, job.y, t * job.out + first);
  }

  // ---- the weight itself ----

  static float half_at(const uint16_t* from) {
    float value[N];
    V::storef(value, V::halves_n(from, 1));
    return value[0];
  }

  static void codes(const Table& t, const uint16_t* words, bool more, float* to) {
    const int64_t per_word = kWordBits / t.width, span = per_word * kLanes;
    const int mask = (1 << t.width) - 1, mul = t.mul, add = t.add;
    for (int64_t at = 0; at < t.columns; at += span, words += kLanes) {
      const int64_t rest = t.columns - at, lanes = rest >= span ? kLanes : ceil_div(rest, per_word);
      for (int64_t f = 0; f * lanes < rest && f < per_word; f++) {
        const int shift = t.width * f;
        float* here = to + at + f * lanes;
        auto meaning = [=](int64_t c) { return float(mul * (words[c] >> shift & mask) + add); };
        if (lanes == kLanes && !more) {  // a constant count unrolls
          for (int64_t c = 0; c < kLanes; c++) here[c] = meaning(c);
        } else {
          const int64_t n = std::min(lanes, rest - f * lanes);
          for (int64_t c = 0; c < n; c++) here[c] = more ? here[c] + meaning(c) : meaning(c);
        }
      }
    }
  }

  // As `Format.decode` rounds: codes exactly, then a product with the scale, then sums of planes in their order.
  static void decode(const Plan& plan, void* const* tensors, int64_t out, int64_t row, float* scratch, int64_t dtype,
                     void* to) {
    float *weight = scratch, *part = scratch + plan.columns;
    bool more = false;
    for (int64_t i = 0; i < plan.streams; i++) {
      const Stream& s = plan.stream[i];
      const Table& t = plan.table[s.table];
      float* segment = weight + t.column;
      codes(t, halves_at(tensors, s.words) + (s.plane * out + row) * s.stride + s.skip, more, part);
      if ((more = s.joined)) continue;
      const Offset* zero = nullptr;
      const Offset* shared = nullptr;
      for (int64_t j = 0; j < plan.offsets; j++) {
        const Offset& o = plan.offset[j];
        if (plan.table[o.table].column == t.column) (o.width ? zero : shared) = &o;
      }
      const uint16_t* scale = halves_at(tensors, s.scale) + s.plane * groups_of(t) * out + row;
      const bool last = i + 1 == plan.streams || plan.table[plan.stream[i + 1].table].column != t.column;
      for (int64_t g = 0, start = 0; start < t.columns; g++, start += t.group) {
        const int64_t end = t.columns - start < t.group ? t.columns : start + t.group;
        float factor = half_at(scale + g * out), shift = 0;
        if (zero) {
          const int per_byte = 8 / zero->width;
          const uint8_t byte = static_cast<const uint8_t*>(tensors[zero->values])[g / per_byte * out + row];
          shift = float(zero->middle - (byte >> (zero->width * (g % per_byte)) & ((1 << zero->width) - 1)));
        }
        if (s.plane == 0)
          for (int64_t k = start; k < end; k++) segment[k] = (part[k] + shift) * factor;
        else
          for (int64_t k = start; k < end; k++) segment[k] += part[k] * factor;
        if (shared && last) {
          const float offset = half_at(halves_at(tensors, shared->values) + g * out + row);
          for (int64_t k = start; k < end; k++) segment[k] += offset;
        }
      }
    }
    for (int64_t i = 0; i < plan.outlier_parts; i++) replace(plan.outliers[i], tensors, plan.columns, out, row, weight);
    save(weight, dtype, plan.columns, to, 0);
  }

  static void replace(const Outliers& o, void* const* tensors, int64_t columns, int64_t out, int64_t row, float* weight) {
    const float scale = half_at(halves_at(tensors, o.scale) + row);
    const float zero = static_cast<const uint8_t*>(tensors[o.zero])[row];
    const auto* value = static_cast<const uint8_t*>(tensors[o.values]) + row;
    if (o.mask >= 0) {
      const uint8_t* end = value + o.count * out;
      const uint16_t* words = halves_at(tensors, o.mask) + row * words_of(columns);
      const int64_t span = kWordBits * kLanes;
      for (int64_t at = 0; at < columns; at += span, words += kLanes) {
        const int64_t rest = columns - at, lanes = rest >= span ? kLanes : ceil_div(rest, kWordBits);
        for (int64_t f = 0; f < kWordBits; f++)
          for (int64_t c = 0; c < lanes; c++)
            if (words[c] >> f & 1 && value < end) {
              weight[at + f * lanes + c] = (*value - zero) * scale;
              value += out;
            }
      }
      return;
    }
    const auto* index = static_cast<const uint8_t*>(tensors[o.index]) + row;
    for (int64_t start = 0; start < columns; start += o.block) {
      const int64_t size = columns - start < o.block ? columns - start : o.block;
      for (int64_t e = 0; e < ceil_div(o.count * size, o.block); e++, index += out, value += out)
        if (*index < size) weight[start + *index] = (*value - zero) * scale;  // a damaged file has others
    }
  }
};

template <class V>
constexpr Isa isa(const char* name) {
  using K = Kernel<V>;
  return {name, {K::kExactBytes, K::kInt8Bytes}, K::input, K::prepare, K::product, K::decode,
          V::N, Columns<V>::round, Rows<V>::hadamard, Signs<V>::weight, Signs<V>::gradient};
}

}  // namespace
}  // namespace ultralowbit
