// Reads one product from stdin and writes its result to stdout: how the kernels run in an emulator of another CPU.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "native.h"

using namespace ultralowbit;

extern "C" int ultralowbit_product(int64_t, const Plan*, void* const*, int64_t, const void*, int64_t, int64_t, void*,
                                   int64_t, int64_t);
extern "C" const char* ultralowbit_isa(int64_t);

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> found(count);
  if (std::fread(found.data(), sizeof(T), count, stdin) != size_t(count)) std::exit(2);
  return found;
}

int main() {
  const auto head = read<int64_t>(7);  // instruction set, tensors, out, dtype, tokens, int8, bytes of x
  Plan plan = read<Plan>(1)[0];
  const auto tables = read<Table>(plan.tables);
  const auto streams = read<Stream>(plan.streams);
  const auto offsets = read<Offset>(plan.offsets);
  plan.table = tables.data();
  plan.stream = streams.data();
  plan.offset = offsets.data();
  std::vector<std::vector<char>> tensors;
  std::vector<void*> pointers;
  for (int64_t i = 0; i < head[1]; i++) tensors.push_back(read<char>(read<int64_t>(1)[0]));
  for (auto& tensor : tensors) pointers.push_back(tensor.data());
  const auto x = read<char>(head[6]);
  std::vector<char> y(head[4] * head[2] * (head[3] ? 2 : 4));
  if (ultralowbit_product(head[0], &plan, pointers.data(), head[2], x.data(), head[3], head[4], y.data(), head[5], 2))
    return 3;
  std::fprintf(stderr, "%s", ultralowbit_isa(head[0]));
  std::fwrite(y.data(), 1, y.size(), stdout);
}
