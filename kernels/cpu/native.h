// What the files here share: the description of a product, and the functions that each instruction set offers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ultralowbit {

// How codes of `width` bits lie in words is told in ultralowbit/format.py: a superblock is 32 words.
constexpr int64_t kLanes = 32, kWordBits = 16;

extern "C" {  // mirrored by the ctypes structures of __init__.py; indices count the stored tensors, -1 is none

// Columns that codes multiply: a code means mul * code + add before its group's scale.
struct Table {
  int64_t column, columns, width, group, mul, add;
};

// Words [out, stride], of which a row's codes start at `skip`; they share a table, scale [groups, out] fp16 starts at
// scale[plane]. `joined`: the next stream holds more bits of the same codes, scaled together.
struct Stream {
  int64_t table, words, plane, skip, stride, scale, joined;
};

// A term that a group's columns share: fp16 [groups, out], or, where width > 0, (middle - zero) * scale.
struct Offset {
  int64_t values, scale, table, width, middle;
};

// Single weights of a row in the place of the others: `count` by index in each block, or at most `count` in all, where
// mask words have bits.
struct Outliers {
  int64_t index, mask, values, scale, zero, count, block;
};

struct Plan {
  int64_t columns, hadamard, channel_order, first, column_scale;
  int64_t tables, streams, offsets, outlier_parts;
  const Table* table;
  const Stream* stream;
  const Offset* offset;
  const Outliers* outliers;
};
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t words_of(int64_t columns) {  // of 1 bit each
  return columns / (kWordBits * kLanes) * kLanes + ceil_div(columns % (kWordBits * kLanes), kWordBits);
}
static inline int64_t groups_of(const Table& t) { return ceil_div(t.columns, t.group); }

// A superblock's words, seen as four nibbles each, are four *units* of columns. A pass multiplies of every unit the
// columns that lie in one scale group (-1: none), so that scales are applied once a unit; where groups are no smaller
// than units and aligned to them, one pass does.
struct Pass {
  int64_t group[4];
};

struct Superblock {
  int64_t column, lanes, first_pass, passes;  // its first column in the table; words
};

struct Layout {
  std::vector<Superblock> blocks;
  std::vector<Pass> passes;
  explicit Layout(const Table& t);
};

// A pass of one token: exact, 16 floats for each nibble of 32 words; int8, four columns' activations for each field of
// four words' low and then high bytes, and what turns a unit's integer sum into a float.
constexpr int64_t kExactPass = 32 * 4 * 16 * sizeof(float);
struct alignas(64) Int8Pass {
  int32_t x[2 * 8 * 8];
  float alpha[4], beta[4];
};

struct Job {
  const Plan* plan;
  void* const* tensors;
  int64_t out, tokens, ahead;      // rows to where a thread's next words may be
  bool int8;
  const Layout* layouts;
  const char* const* passes;       // of each table: [passes, tokens], of the instruction set's bytes
  const float* const* sums;        // of each table: [tokens, groups] sums of x
  void* y;                         // [tokens, out]
  int64_t dtype;                   // of x and y: 0 fp32, 1 bf16, 2 fp16
};

// A block of columns to round: weight, rest and values [columns, out]; R, gram = R R^T [columns, columns]; tables
// [groups, levels, out], levels rising; group [columns] of each column. Writes values, and rest anew.
struct BlockJob {
  const float *weight, *R, *gram, *tables;
  const int64_t* group;
  int64_t columns, out, groups, levels, sweeps;
  float *rest, *values;
};

extern "C" {  // mirrored in __init__.py
// Serial signs of latent weights [rows, columns], see kernels/signs.py; dtypes: 0 fp32, 1 bf16, 2 fp16. All else is fp32:
// centre (or null), offset (or null) and slope [rows, groups], scale and stored [rows, planes, groups]. `weight`
// [rows, columns] is what is written, or the gradient of that, from which latent_gradient [rows, columns] is made, and
// sums [rows, planes (+ 1 with an offset), groups], the gradients of stored and offset.
struct SignsJob {
  const void* latent;
  const float *centre, *scale, *stored, *offset, *slope;
  void *weight, *latent_gradient;
  float* sums;
  int64_t rows, columns, group, groups, planes, hadamard, latent_dtype, dtype;
};
}

// AMX tiles, beside whatever instruction set the rest runs with: x^T y of bfloat16 numbers, in pairs of tokens (amx.cpp).
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define ULTRALOWBIT_AMX 1
// Panels x [n / 16, steps] and y [m / 16, steps] of tiles; total [n, m]. symmetric: blocks left of the diagonal
// are those right of it, transposed.
struct PairsJob {
  const uint32_t *x, *y;
  int64_t steps, n, m;
  bool symmetric;
  float* total;
};
bool amx_runs_here();
// Columns [16 tile, 16 tile + 16) of x [tokens, columns] -> its tiles, as the left and the right side of a product have
// them, where those are not null.
void pack_pairs(const float* x, int64_t tokens, int64_t columns, int64_t tile, uint32_t* left, uint32_t* right);
// Rows [32 first, 32 last) of total.
void add_rows_of_products(const PairsJob&, int64_t first, int64_t last);
#endif

struct Isa {
  const char* name;
  int64_t pass_bytes[2];  // of one token: exact, int8
  // row of x -> fp32, transformed; `scratch` holds as many columns
  void (*input)(const Plan&, void* const* tensors, const void* x, int64_t dtype, float* out, float* scratch);
  // the passes of one token, `step` bytes apart, and its group sums
  void (*prepare)(const Table&, const Layout&, const float* x, bool int8, char* passes, int64_t step, float* sums);
  // rows [first, first + count) of y; first is a multiple of 16; `scratch` holds tokens * (count rounded up to 16)
  void (*product)(const Job&, int64_t first, int64_t count, float* scratch);
  // rows of the weight itself, without the transform of its inputs -> [count, columns] in dtype
  void (*decode)(const Plan&, void* const* tensors, int64_t out, int64_t row, float* scratch, int64_t dtype, void* to);
  int64_t lanes;
  // rows [first, first + count) of a block, count <= lanes; `scratch` holds lanes * (4 columns + groups (2 levels - 1))
  void (*round)(const BlockJob&, int64_t first, int64_t count, float* scratch);
  // one row [columns] times the block matrix, in place
  void (*hadamard)(float* row, int64_t columns, int64_t block);
  // one row; `scratch` holds 2 * columns
  void (*signs)(const SignsJob&, int64_t row, float* scratch);
  void (*signs_gradient)(const SignsJob&, int64_t row, float* scratch);
};

extern const Isa kPortable, kAvx2, kAvx512, kNeon, kNeonDotprod;

}  // namespace ultralowbit
