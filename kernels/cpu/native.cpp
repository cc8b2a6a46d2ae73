// The entry points: chooses an instruction set, prepares the activations, and shares rows out to threads.
#include "native.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if !defined(__GNUC__)
#error "the CPU kernels need GCC or Clang"
#endif

namespace ultralowbit {

Layout::Layout(const Table& t) {
  const int64_t per_word = kWordBits / t.width, span = per_word * kLanes;
  const int64_t unit_fields = t.width < 4 ? 4 / t.width : 1;
  for (int64_t at = 0; at < t.columns; at += span) {
    const int64_t rest = std::min(span, t.columns - at), lanes = rest == span ? kLanes : ceil_div(rest, per_word);
    int64_t first[4], last[4], passes = 1;
    for (int64_t q = 0; q < 4; q++) {
      const int64_t field = t.width == 8 ? q / 2 : q * unit_fields;
      const int64_t start = std::min(rest, field * lanes), end = std::min(rest, (field + unit_fields) * lanes);
      first[q] = start < end ? (at + start) / t.group : 0;
      last[q] = start < end ? (at + end - 1) / t.group : -1;
      passes = std::max(passes, last[q] - first[q] + 1);
    }
    blocks.push_back({at, lanes, int64_t(this->passes.size()), passes});
    for (int64_t p = 0; p < passes; p++) {
      Pass pass;
      for (int64_t q = 0; q < 4; q++) pass.group[q] = first[q] + p <= last[q] ? first[q] + p : -1;
      this->passes.push_back(pass);
    }
  }
}

namespace {

const Isa* const kIsas[] = {  // best first
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeonDotprod, &kNeon,
#endif
    &kPortable};

bool runs_here(const Isa* isa) {
#if defined(__x86_64__)
  if (isa == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  if (isa == &kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#elif defined(__aarch64__) && defined(__linux__)
  if (isa == &kNeonDotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return true;  // every 64-bit ARM of Apple has dot products
}

// Runs job(i) for i in [0, count). Threads take the next i when they are free; what each i computes does not depend on
// who does. The threads are those of the OpenMP runtime that torch has loaded, so that the two do not compete for
// cores; where there is none, they are started here.
template <class Task>
void parallel(int64_t count, int64_t threads, const Task& task) {
  struct Shared {
    const Task& task;
    std::atomic<int64_t> next;
    int64_t count;
    static void run(void* data) {
      auto* shared = static_cast<Shared*>(data);
      for (int64_t i; (i = shared->next++) < shared->count;) shared->task(i);
    }
  } shared{task, {0}, count};
  threads = std::min(threads, count);
  if (threads <= 1) return Shared::run(&shared);
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
#if defined(__unix__) || defined(__APPLE__)
  static const auto openmp = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  static const Parallel openmp = nullptr;
#endif
  if (openmp) return openmp(Shared::run, &shared, unsigned(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; i++) others.emplace_back(Shared::run, &shared);
  } catch (const std::exception&) {  // no more of them can be started: those that there are do it all
  }
  Shared::run(&shared);
  for (std::thread& other : others) other.join();
}

// Memory that a thread keeps for its next call: fresh pages would cost more than a small product.
char* workspace(size_t bytes) {
  static thread_local std::vector<char> kept;
  if (kept.size() < bytes + 64) kept.resize(bytes + 64);
  return kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64;
}

struct Slices {  // aligned parts of a workspace, added up
  size_t total = 0;
  size_t add(size_t bytes) {
    const size_t at = total;
    total += (bytes + 63) / 64 * 64;
    return at;
  }
};

constexpr int64_t kRows = 128;  // of a chunk: their words stay in L2 while one superblock after the other passes
constexpr int64_t kTogether = 16;  // rows that a thread takes where each is on its own
constexpr int64_t kPacked = 32 << 20, kBlocks = 4;  // bytes for AMX tiles; blocks of 32 rows, which stay in L2
constexpr int64_t kTables = 4 << 20;  // bytes of tables at a time: more tokens take their turn

}  // namespace
}  // namespace ultralowbit

using namespace ultralowbit;

extern "C" {

// Hash of the files that this was compiled from.
const char* ultralowbit_sources() { return SOURCES; }

// Name of the i-th instruction set of this build that this CPU has, best first; null after the last.
const char* ultralowbit_isa(int64_t i) {
  for (const Isa* isa : kIsas)
    if (runs_here(isa) && i-- == 0) return isa->name;
  return nullptr;
}

static const Isa* isa_at(int64_t i) {
  for (const Isa* isa : kIsas)
    if (runs_here(isa) && i-- == 0) return isa;
  return nullptr;
}

// y [tokens, out] = x [tokens, columns] times the packed weight, both in dtype (0 fp32, 1 bf16, 2 fp16). 0, or 1 where
// memory is short.
int ultralowbit_product(int64_t isa_index, const Plan* plan, void* const* tensors, int64_t out, const void* x,
                        int64_t dtype, int64_t tokens, void* y, int64_t int8, int64_t threads) try {
  const Isa& isa = *isa_at(isa_index);
  const int64_t pass_bytes = isa.pass_bytes[int8 ? 1 : 0], element = dtype ? 2 : 4;
  std::vector<Layout> layouts;
  int64_t token_bytes = 0;
  for (int64_t i = 0; i < plan->tables; i++) {
    layouts.emplace_back(plan->table[i]);
    token_bytes += layouts[i].passes.size() * pass_bytes;
  }
  const int64_t slab = std::max<int64_t>(2, kTables / token_bytes / 2 * 2);  // tokens are multiplied in pairs
  for (; tokens > slab; tokens -= slab) {
    if (int status = ultralowbit_product(isa_index, plan, tensors, out, x, dtype, slab, y, int8, threads)) return status;
    x = static_cast<const char*>(x) + slab * plan->columns * element;
    y = static_cast<char*>(y) + slab * out * element;
  }
  Slices slices;
  std::vector<size_t> passes_at, sums_at;
  const size_t input_at = slices.add(tokens * 2 * plan->columns * sizeof(float));
  for (int64_t i = 0; i < plan->tables; i++) {
    passes_at.push_back(slices.add(layouts[i].passes.size() * tokens * pass_bytes));
    sums_at.push_back(slices.add(tokens * groups_of(plan->table[i]) * sizeof(float)));
  }
  char* memory = workspace(slices.total);
  std::vector<const char*> passes;
  std::vector<const float*> sums;
  for (int64_t i = 0; i < plan->tables; i++) {
    passes.push_back(memory + passes_at[i]);
    sums.push_back(reinterpret_cast<float*>(memory + sums_at[i]));
  }
  auto prepare = [&](int64_t token) {
    float* input = reinterpret_cast<float*>(memory + input_at) + token * 2 * plan->columns;
    const auto* from = static_cast<const char*>(x) + token * plan->columns * element;
    isa.input(*plan, tensors, from, dtype, input, input + plan->columns);
    for (int64_t i = 0; i < plan->tables; i++)
      isa.prepare(plan->table[i], layouts[i], input, int8, memory + passes_at[i] + token * pass_bytes,
                  tokens * pass_bytes,
                  reinterpret_cast<float*>(memory + sums_at[i]) + token * groups_of(plan->table[i]));
  };
  parallel(tokens, threads, prepare);
  const int64_t chunk = std::min(kRows, ceil_div(ceil_div(out, threads), 16) * 16);
  const Job job{plan, tensors, out, tokens, chunk * threads, bool(int8), layouts.data(), passes.data(), sums.data(), y,
                dtype};
  std::atomic<bool> failed{false};
  auto product = [&](int64_t i) {
    try {
      static thread_local std::vector<float> scratch;
      if (int64_t(scratch.size()) < tokens * chunk) scratch.resize(tokens * chunk);
      isa.product(job, i * chunk, std::min(chunk, out - i * chunk), scratch.data());
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  parallel(ceil_div(out, chunk), threads, product);
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}

// Rows [row, row + count) of the weight that the segments and the outliers store -> to [count, columns] in dtype.
int ultralowbit_decode(int64_t isa_index, const Plan* plan, void* const* tensors, int64_t out, int64_t row,
                       int64_t count, int64_t dtype, void* to, int64_t threads) try {
  const Isa& isa = *isa_at(isa_index);
  std::atomic<bool> failed{false};
  auto decode = [&](int64_t i) {
    try {
      static thread_local std::vector<float> scratch;
      if (int64_t(scratch.size()) < 2 * plan->columns) scratch.resize(2 * plan->columns);
      for (int64_t r = i * kTogether; r < std::min(count, (i + 1) * kTogether); r++)
        isa.decode(*plan, tensors, out, row + r, scratch.data(), dtype,
                   static_cast<char*>(to) + r * plan->columns * (dtype ? 2 : 4));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  parallel(ceil_div(count, kTogether), threads, decode);
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}

// Rounds a block of columns, see kernels/columns.py. 0, or 1 where memory is short.
int ultralowbit_round_block(int64_t isa_index, const float* weight, const float* R, const float* gram,
                            const float* tables, const int64_t* group, int64_t columns, int64_t out, int64_t groups,
                            int64_t levels, int64_t sweeps, float* rest, float* values, int64_t threads) try {
  const Isa& isa = *isa_at(isa_index);
  const BlockJob job{weight, R, gram, tables, group, columns, out, groups, levels, sweeps, rest, values};
  std::atomic<bool> failed{false};
  auto round = [&](int64_t i) {
    try {
      char* memory = workspace(isa.lanes * (4 * columns + groups * (2 * levels - 1)) * sizeof(float));
      isa.round(job, i * isa.lanes, std::min(isa.lanes, out - i * isa.lanes), reinterpret_cast<float*>(memory));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  parallel(ceil_div(out, isa.lanes), threads, round);
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}

// Whether this CPU multiplies bfloat16 numbers by AMX tiles.
int ultralowbit_amx() {
#if ULTRALOWBIT_AMX
  return amx_runs_here();
#else
  return 0;
#endif
}

// total [n, m] += x^T y of x [tokens, n] and y [tokens, m] rounded to bfloat16, summed in fp32; null y: x, and total is
// symmetric. 0, or 1 where memory is short.
int ultralowbit_add_products(const float* x, const float* y, int64_t tokens, int64_t n, int64_t m, float* total,
                             int64_t threads) try {
#if ULTRALOWBIT_AMX
  const int64_t left = 2 * ceil_div(n, 32), right = 2 * ceil_div(m, 32);  // tiles, which are multiplied in pairs
  const int64_t most = std::min<int64_t>(2048, std::max<int64_t>(128, kPacked / (2 * (n + m)) / 32 * 32));
  for (int64_t from = 0; from < tokens; from += most) {
    const int64_t count = std::min(most, tokens - from), steps = ceil_div(count, 32), panel = steps * 256;
    auto* memory = reinterpret_cast<uint32_t*>(workspace((left + right) * panel * sizeof(uint32_t)));
    uint32_t* const packed = memory + left * panel;
    parallel(left, threads, [&](int64_t i) {
      pack_pairs(x + from * n, count, n, i, memory + i * panel, y ? nullptr : packed + i * panel);
    });
    if (y) parallel(right, threads, [&](int64_t i) { pack_pairs(y + from * m, count, m, i, nullptr, packed + i * panel); });
    const PairsJob job{memory, packed, steps, n, m, !y, total};
    parallel(ceil_div(left, 2 * kBlocks), threads, [&](int64_t i) {
      add_rows_of_products(job, i * kBlocks, std::min(left / 2, (i + 1) * kBlocks));
    });
  }
#endif
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// x [rows, columns] -> y times the block matrix of `InputTransform`.
void ultralowbit_hadamard(int64_t isa_index, const float* x, int64_t rows, int64_t columns, int64_t block, float* y,
                          int64_t threads) {
  const Isa& isa = *isa_at(isa_index);
  parallel(ceil_div(rows, kTogether), threads, [&](int64_t i) {
    for (int64_t row = i * kTogether; row < std::min(rows, (i + 1) * kTogether); row++) {
      std::memcpy(y + row * columns, x + row * columns, columns * sizeof(float));
      isa.hadamard(y + row * columns, columns, block);
    }
  });
}

// The weight, or with `gradient` the gradients, of sign planes. 0, or 1 where memory is short.
int ultralowbit_signs(int64_t isa_index, const SignsJob* job, int64_t gradient, int64_t threads) {
  const Isa& isa = *isa_at(isa_index);
  std::atomic<bool> failed{false};
  auto rows = [&](int64_t i) {
    try {
      auto* scratch = reinterpret_cast<float*>(workspace(3 * job->columns * sizeof(float)));
      for (int64_t row = i * kTogether; row < std::min(job->rows, (i + 1) * kTogether); row++)
        (gradient ? isa.signs_gradient : isa.signs)(*job, row, scratch);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  parallel(ceil_div(job->rows, kTogether), threads, rows);
  return failed;
}
}
