// Holds a decoder for decode steps: its weights' addresses, and the memory that a step works in.
// Knows addresses and the thread pool; does not know tensors (who makes one keeps them alive), or what a step computes.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "decoder_step.h"
#include "memory.h"

namespace miss {

class DecoderRunner {
 public:
  // kind (0 plain, 1 W8A8, 2 weight only), panels, columns, k, scale, offset, bias, whether the bias is bf16, group, zeros
  using Matrix = std::tuple<int, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, bool, int, bool>;
  using Norm = std::tuple<uintptr_t, uintptr_t, float>;
  using Layer = std::tuple<Matrix, Matrix, Norm, Matrix, Matrix, Norm, Matrix, Matrix, Norm>;  // in their order
  // Address of layer 0's slot 0; strides in bytes between layers, slots, tokens.
  using Cache = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

  DecoderRunner(bool bf16, int64_t width, int64_t inner, int64_t heads, int64_t num_words, int64_t num_positions,
                uintptr_t words, uintptr_t positions, const Norm& norm, const std::vector<Layer>& layers,
                const Matrix& transform, const Norm& transform_norm, const Matrix& vocabulary);

  // One step; results as decoder_step.h says, totals (rows) being the log-sum-exp. Writes nothing and returns
  // 1 + 4 * row + which where a token (0), slot (1), position (2) or question (3) is out of its range, else 0.
  // Steps of several callers follow one another.
  int64_t step(int64_t rows, uintptr_t tokens, uintptr_t slots, uintptr_t positions, uintptr_t questions,
               const std::vector<Cache>& caches, int64_t num_slots, int64_t answer_length, int64_t num_questions,
               int64_t question_length, uintptr_t question_lengths, int count, uintptr_t states, uintptr_t values,
               uintptr_t indices, uintptr_t totals);

 private:
  int64_t misfit(const DecoderCall& call, int64_t num_slots, int64_t answer_length, int64_t num_questions) const;
  void make_room(int64_t rows, int64_t threads);
  void run(DecoderCall& call);

  DecoderModel model_ = {};
  std::vector<DecoderLayer> layers_;
  int64_t num_words_, num_positions_;
  std::mutex mutex_;
  Kept scratch_ = {};
  int64_t scratch_size_ = 0;
  std::vector<float> row_sums_;
};

}  // namespace miss
