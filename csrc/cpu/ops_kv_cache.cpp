// Writes to the slot cache as functions of PyTorch tensors: copies of rows, which need no kernel of their own.
#include <cstring>
#include <vector>

#include "convert.h"
#include "parallel.h"
#include "torch_abi.h"

namespace miss {

namespace {

constexpr int64_t GRAIN = 65536;  // bytes that are worth a thread

int64_t size_of(const Tensor& t) { return static_cast<int64_t>(t.element_size()); }

// Numbers of an index tensor, int32 or int64, any stride.
struct Indices {
  const char* data;
  int64_t stride, size;  // bytes, elements
  bool wide;

  explicit Indices(const Tensor& t) : data(bytes_of(t)), size(t.numel()), wide(t.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, "kv_cache: indices are int32 or int64");
    stride = t.stride(0) * (wide ? 8 : 4);
  }
  int64_t operator[](int64_t i) const {
    const char* at = data + i * stride;
    if (wide) return *reinterpret_cast<const int64_t*>(at);
    return *reinterpret_cast<const int32_t*>(at);
  }
  // The first that is not in 0 … limit - 1; -1 where all are.
  int64_t first_outside(int64_t limit) const {
    for (int64_t i = 0; i < size; ++i)
      if ((*this)[i] < 0 || (*this)[i] >= limit) return i;
    return -1;
  }
};

// The inner two dimensions lie as one run of numbers.
bool runs(const Tensor& t) {
  int64_t d = t.dim();
  return (t.size(d - 1) == 1 || t.stride(d - 1) == 1) && (t.size(d - 2) == 1 || t.stride(d - 2) == t.size(d - 1));
}

void copy_row(const Tensor& from, int64_t from_at, const Tensor& to, int64_t to_at, int64_t count) {
  const char* source = bytes_of(from) + from_at * size_of(from);
  char* target = bytes_to(to) + to_at * size_of(to);
  if (from.scalar_type() == to.scalar_type()) std::memcpy(target, source, static_cast<size_t>(count * size_of(to)));
  else if (from.scalar_type() == ScalarType::Float)
    convert_kernels().narrow(reinterpret_cast<const float*>(source), reinterpret_cast<bf16*>(target), count);
  else convert_kernels().widen(reinterpret_cast<const bf16*>(source), reinterpret_cast<float*>(target), count);
}

// Nothing is written where an index is out of range: then 1 + 2 * row (a slot) or 2 + 2 * row (a position), else 0.
int64_t kv_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& slots,
                  const Tensor& positions) {
  STD_TORCH_CHECK(runs(k_cache) && runs(v_cache) && runs(k) && runs(v), "kv_append: heads are not one run");
  Indices slot(slots), position(positions);
  if (int64_t bad = slot.first_outside(k_cache.size(0)); bad >= 0) return 1 + 2 * bad;
  if (int64_t bad = position.first_outside(k_cache.size(1)); bad >= 0) return 2 + 2 * bad;
  const int64_t count = k.size(1) * k.size(2);
  parallel(slot.size, GRAIN / (1 + count * size_of(k_cache)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      copy_row(k, r * k.stride(0), k_cache, slot[r] * k_cache.stride(0) + position[r] * k_cache.stride(1), count);
      copy_row(v, r * v.stride(0), v_cache, slot[r] * v_cache.stride(0) + position[r] * v_cache.stride(1), count);
    }
  });
  return 0;
}

struct Move {
  int64_t from, to;  // slots; ASIDE: one slot's room beside the cache
};
constexpr int64_t ASIDE = -1;

// The moves in an order in which no slot is written that is yet to be read; a cycle's first slot goes aside.
// False where a target comes twice.
bool plan(const Indices& source, const Indices& target, int64_t num_slots, std::vector<Move>& moves) {
  std::vector<int64_t> from(num_slots, ASIDE), readers(num_slots, 0), ready;
  for (int64_t i = 0; i < source.size; ++i) {
    if (from[target[i]] != ASIDE) return false;
    from[target[i]] = source[i];
  }
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    if (from[slot] == slot) from[slot] = ASIDE;  // nothing to do
    else if (from[slot] != ASIDE) ++readers[from[slot]];
  }
  for (int64_t slot = 0; slot < num_slots; ++slot)
    if (from[slot] != ASIDE && readers[slot] == 0) ready.push_back(slot);
  while (!ready.empty()) {
    int64_t to = ready.back(), origin = from[to];
    ready.pop_back();
    moves.push_back({origin, to});
    from[to] = ASIDE;
    if (--readers[origin] == 0 && from[origin] != ASIDE) ready.push_back(origin);
  }
  for (int64_t slot = 0; slot < num_slots; ++slot) {  // what is left are cycles
    if (from[slot] == ASIDE) continue;
    moves.push_back({slot, ASIDE});
    int64_t to = slot;
    while (from[to] != slot) {
      moves.push_back({from[to], to});
      int64_t next = from[to];
      from[to] = ASIDE;
      to = next;
    }
    moves.push_back({ASIDE, to});
    from[to] = ASIDE;
  }
  return true;
}

void move_slots(const Tensor& cache, const std::vector<Move>& moves) {
  const int64_t bytes = cache.size(2) * cache.size(3) * size_of(cache);
  const int64_t slot = cache.stride(0) * size_of(cache), position = cache.stride(1) * size_of(cache);
  char* data = bytes_to(cache);
  const int64_t work = static_cast<int64_t>(moves.size()) * bytes;
  parallel(cache.size(1), GRAIN / (1 + work) + 1, [&](int64_t begin, int64_t end) {  // each thread its positions
    char* aside = scratch_of<char>(7, (end - begin) * bytes);
    for (const Move& move : moves)
      for (int64_t p = begin; p < end; ++p) {
        char* beside = aside + (p - begin) * bytes;
        const char* from = move.from == ASIDE ? beside : data + move.from * slot + p * position;
        char* to = move.to == ASIDE ? beside : data + move.to * slot + p * position;
        std::memcpy(to, from, static_cast<size_t>(bytes));
      }
  });
}

// Nothing is written where an index is out of range: then 1 + 2 * row (a source) or 2 + 2 * row (a target), else 0;
// -1 where a target comes twice.
int64_t kv_reorder(const Tensor& k_cache, const Tensor& v_cache, const Tensor& sources, const Tensor& targets) {
  STD_TORCH_CHECK(runs(k_cache) && runs(v_cache), "kv_reorder: heads are not one run");
  Indices source(sources), target(targets);
  if (int64_t bad = source.first_outside(k_cache.size(0)); bad >= 0) return 1 + 2 * bad;
  if (int64_t bad = target.first_outside(k_cache.size(0)); bad >= 0) return 2 + 2 * bad;
  std::vector<Move> moves;
  if (!plan(source, target, k_cache.size(0), moves)) return -1;
  move_slots(k_cache, moves);
  move_slots(v_cache, moves);
  return 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(miss_cpu, m) {
  m.def(
      "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots, Tensor positions) -> int");
  m.def("kv_reorder(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor source, Tensor target) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(miss_cpu, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&kv_append));
  m.impl("kv_reorder", TORCH_BOX(&kv_reorder));
}

}  // namespace miss
