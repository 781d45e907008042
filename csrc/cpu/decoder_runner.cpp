#include "decoder_runner.h"

#include <cmath>
#include <new>

#include "parallel.h"

namespace miss {

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

DecoderMatrix matrix_of(const DecoderRunner::Matrix& from) {
  DecoderMatrix m = {};
  m.kind = static_cast<DecoderMatrix::Kind>(std::get<0>(from));
  m.panels = at<const char>(std::get<1>(from));
  m.columns = std::get<2>(from);
  m.k = std::get<3>(from);
  m.column_scale = at<const float>(std::get<4>(from));
  m.offset = at<const int32_t>(std::get<5>(from));
  m.bias = at<const char>(std::get<6>(from));
  m.bias_type = std::get<7>(from) ? Type::bf16 : Type::f32;
  m.group = std::get<8>(from);
  m.zeros = std::get<9>(from);
  return m;
}

DecoderNorm norm_of(const DecoderRunner::Norm& from) {
  return {at<const float>(std::get<0>(from)), at<const float>(std::get<1>(from)), std::get<2>(from)};
}

DecoderCache cache_of(const DecoderRunner::Cache& k, const DecoderRunner::Cache& v) {
  return {at<char>(std::get<0>(k)), at<char>(std::get<0>(v)), std::get<1>(k), std::get<2>(k),
          std::get<3>(k),           std::get<1>(v),           std::get<2>(v), std::get<3>(v)};
}

}  // namespace

DecoderRunner::DecoderRunner(bool bf16, int64_t width, int64_t inner, int64_t heads, int64_t num_words,
                             int64_t num_positions, uintptr_t words, uintptr_t positions, const Norm& norm,
                             const std::vector<Layer>& layers, const Matrix& transform, const Norm& transform_norm,
                             const Matrix& vocabulary)
    : num_words_(num_words), num_positions_(num_positions) {
  for (const Layer& from : layers) {
    DecoderLayer l = {};
    l.qkv = matrix_of(std::get<0>(from));
    l.self_output = matrix_of(std::get<1>(from));
    l.self_norm = norm_of(std::get<2>(from));
    l.query = matrix_of(std::get<3>(from));
    l.cross_output = matrix_of(std::get<4>(from));
    l.cross_norm = norm_of(std::get<5>(from));
    l.input = matrix_of(std::get<6>(from));
    l.output = matrix_of(std::get<7>(from));
    l.mlp_norm = norm_of(std::get<8>(from));
    layers_.push_back(l);
  }
  model_.type = bf16 ? Type::bf16 : Type::f32;
  model_.width = width;
  model_.inner = inner;
  model_.heads = heads;
  model_.head_width = width / heads;
  model_.words = at<const char>(words);
  model_.positions = at<const char>(positions);
  model_.norm = norm_of(norm);
  model_.layers = layers_.data();
  model_.num_layers = static_cast<int64_t>(layers_.size());
  model_.transform = matrix_of(transform);
  model_.transform_norm = norm_of(transform_norm);
  model_.vocabulary = matrix_of(vocabulary);
}

int64_t DecoderRunner::misfit(const DecoderCall& call, int64_t num_slots, int64_t answer_length,
                              int64_t num_questions) const {
  const int64_t positions = answer_length < num_positions_ ? answer_length : num_positions_;
  for (int64_t r = 0; r < call.rows; ++r) {
    if (call.tokens[r] < 0 || call.tokens[r] >= num_words_) return 1 + 4 * r;
    if (call.slots[r] < 0 || call.slots[r] >= num_slots) return 2 + 4 * r;
    if (call.positions[r] < 0 || call.positions[r] >= positions) return 3 + 4 * r;
    if (call.questions[r] < 0 || call.questions[r] >= num_questions) return 4 + 4 * r;
  }
  return 0;
}

void DecoderRunner::make_room(int64_t rows, int64_t threads) {
  const int64_t bytes = decoder_kernels().scratch_bytes(model_, rows, threads);
  if (bytes > scratch_size_) {
    scratch_ = {};
    scratch_ = keep(static_cast<size_t>(bytes));
    scratch_size_ = bytes;
  }
  if (static_cast<int64_t>(row_sums_.size()) < rows) row_sums_.resize(static_cast<size_t>(rows));
}

int64_t DecoderRunner::step(int64_t rows, uintptr_t tokens, uintptr_t slots, uintptr_t positions, uintptr_t questions,
                            const std::vector<Cache>& caches, int64_t num_slots, int64_t answer_length,
                            int64_t num_questions, int64_t question_length, uintptr_t question_lengths, int count,
                            uintptr_t states, uintptr_t values, uintptr_t indices, uintptr_t totals) {
  DecoderCall call = {};
  call.rows = rows;
  call.tokens = at<const int64_t>(tokens);
  call.slots = at<const int32_t>(slots);
  call.positions = at<const int32_t>(positions);
  call.questions = at<const int32_t>(questions);
  call.self = cache_of(caches[0], caches[1]);
  call.cross = cache_of(caches[2], caches[3]);
  call.question_lengths = at<const int32_t>(question_lengths);
  call.question_length = question_length;
  call.most_keys = answer_length > question_length ? answer_length : question_length;
  call.states = at<char>(states);
  call.count = count;
  call.values = at<float>(values);
  call.indices = at<int64_t>(indices);
  call.shift = at<float>(totals);
  if (const int64_t bad = misfit(call, num_slots, answer_length, num_questions)) return bad;
  if (rows == 0) return 0;
  const std::lock_guard<std::mutex> lock(mutex_);
  run(call);
  for (int64_t r = 0; r < rows && count > 0; ++r)
    call.shift[r] = static_cast<float>(call.shift[r] + std::log(static_cast<double>(call.total[r])));
  return 0;
}

void DecoderRunner::run(DecoderCall& call) {
  const DecoderKernels& kernels = decoder_kernels();
  call.threads = num_threads();
  make_room(call.rows, call.threads);
  call.scratch = static_cast<char*>(scratch_.data);
  call.total = row_sums_.data();
  Team team;
  team.expected = call.threads;
  bool ran = false;
  auto take_part = [&](int64_t, int64_t) {
    try {
      kernels.reserve(model_, call);
    } catch (const std::bad_alloc&) {
      return;  // the others do it all
    }
    kernels.run(model_, call, team);
    __atomic_store_n(&ran, true, __ATOMIC_RELAXED);
  };
  if (call.threads == 1) take_part(0, 1);
  else parallel(call.threads, 1, take_part);
  if (!ran) throw std::bad_alloc();
}

}  // namespace miss
