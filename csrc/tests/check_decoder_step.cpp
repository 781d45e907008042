// A decode step by one thread and by a team of three against the plain sums, over weights of every kind.
#include <math.h>
#include <pthread.h>

#include <memory>
#include <vector>

#include "cpu/decoder_step.h"
#include "cpu/linear.h"
#include "cpu/weight_only.h"
#include "pack.h"

using check::blocks;
using check::Buffer;
using check::number;
using check::randomise;
using Numbers = std::vector<double>;
using Kind = miss::DecoderMatrix::Kind;

namespace {

constexpr int64_t LAYERS = 2, SLOTS = 4, LENGTH = 5, QUESTIONS = 3, STATES = 7, WORDS = 391;
enum Scheme { PLAIN, W8A8, INT8, INT4 };

// A random weight (columns, k) of a scheme, as panels and as plain numbers. `size` keeps activations near 1.
template <class T>
struct Weight {
  Buffer<T> bias;
  std::unique_ptr<Buffer<T>> floats;
  std::unique_ptr<Buffer<int8_t>> codes;
  std::unique_ptr<Buffer<char>> nibbles;
  Buffer<float> scale;
  Buffer<int32_t> offset;
  Numbers dense;
  miss::DecoderMatrix matrix = {};

  Weight(int64_t columns, int64_t k, Scheme scheme)
      : bias(columns), scale(columns), offset(columns), dense(static_cast<size_t>(columns * k)) {
    const float size = 1.5f / sqrtf(static_cast<float>(k));
    randomise(bias);
    matrix.columns = columns;
    matrix.k = k;
    matrix.bias = bias.chars();
    matrix.bias_type = check::type_of<T>();
    if (scheme == PLAIN) plain(columns, k, size);
    else if (scheme == INT4) int4(columns, k, size);
    else int8(columns, k, size, scheme);
  }

  void plain(int64_t columns, int64_t k, float size) {
    Buffer<T> weight(columns * k);
    for (int64_t i = 0; i < weight.count(); ++i) {
      miss::convert(check::uniform() * size, weight[i]);
      dense[static_cast<size_t>(i)] = number(weight[i]);
    }
    floats = std::make_unique<Buffer<T>>(check::panel_count<T>(columns, k));
    check::pack(weight, columns, k, false, *floats, nullptr);
    matrix.kind = Kind::plain;
    matrix.panels = floats->chars();
  }

  void int8(int64_t columns, int64_t k, float size, Scheme scheme) {
    Buffer<int8_t> weight(columns * k);
    randomise(weight);
    for (int64_t c = 0; c < columns; ++c) scale[c] = size / 127 * (1 + 0.5f * check::uniform());
    for (int64_t i = 0; i < weight.count(); ++i) dense[static_cast<size_t>(i)] = weight[i] * double{scale[i / k]};
    codes = std::make_unique<Buffer<int8_t>>(check::panel_count<int8_t>(columns, k));
    check::pack(weight, columns, k, false, *codes, offset.data());
    matrix.kind = scheme == W8A8 ? Kind::w8a8 : Kind::weight_only;
    matrix.panels = codes->chars();
    matrix.column_scale = scale.data();
    matrix.offset = offset.data();
  }

  void int4(int64_t columns, int64_t k, float size) {  // one scale: the nearest power of two
    const int64_t groups = blocks(k, 128), wide = groups * 128;
    const int power = static_cast<int>(lrintf(log2f(size / 8)));
    Buffer<uint8_t> four(columns * wide), zero(columns * groups);
    Buffer<uint16_t> scales(columns * groups);
    for (int64_t i = 0; i < scales.count(); ++i) {
      zero[i] = static_cast<uint8_t>(6 + check::random_bits() % 4);
      scales[i] = static_cast<uint16_t>((15 + power) << 10);
    }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < wide; ++i) {
        const uint8_t z = zero[c * groups + i / 128];
        four[c * wide + i] = i < k ? static_cast<uint8_t>(check::random_bits() >> 28) : z;
        if (i < k) dense[static_cast<size_t>(c * k + i)] = ldexp(four[c * wide + i] - z, power);
      }
    nibbles = std::make_unique<Buffer<char>>(blocks(columns, 64) * groups * miss::int4_group_bytes(128, true));
    miss::weight_only_kernels().pack({four.data(), scales.data(), zero.data(), columns, groups, 128, nibbles->data()});
    matrix.kind = Kind::weight_only;
    matrix.panels = nibbles->data();
    matrix.group = 128;
    matrix.zeros = true;
  }

  Numbers times(const Numbers& x, bool gelu = false) {
    Numbers y(static_cast<size_t>(matrix.columns));
    for (int64_t c = 0; c < matrix.columns; ++c) {
      double sum = number(bias[c]);
      for (int64_t i = 0; i < matrix.k; ++i) sum += x[static_cast<size_t>(i)] * dense[static_cast<size_t>(c * matrix.k + i)];
      y[static_cast<size_t>(c)] = gelu ? 0.5 * sum * erfc(-sum / sqrt(2.0)) : sum;
    }
    return y;
  }
};

struct Gain {
  Buffer<float> weight, bias;
  explicit Gain(int64_t width) : weight(width), bias(width) {
    randomise(weight);
    randomise(bias);
    for (int64_t i = 0; i < width; ++i) weight[i] = 1 + 0.3f * weight[i];
  }
  miss::DecoderNorm norm() { return {weight.data(), bias.data(), 1e-6f}; }
  Numbers of(const Numbers& x) {
    double mean = 0, square = 0;
    for (double v : x) mean += v / static_cast<double>(x.size());
    for (double v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size());
    Numbers y;
    for (double v : x) {
      const auto i = static_cast<int64_t>(y.size());
      y.push_back((v - mean) / sqrt(square + 1e-6) * weight[i] + bias[i]);
    }
    return y;
  }
};

Numbers sum(const Numbers& a, const Numbers& b) {
  Numbers y = a;
  for (size_t i = 0; i < y.size(); ++i) y[i] += b[i];
  return y;
}

template <class T>
Numbers read(T* from, int64_t count) {
  Numbers y;
  for (int64_t i = 0; i < count; ++i) y.push_back(number(from[i]));
  return y;
}

// q over `keys` tokens of `width` numbers, `stride` apart.
template <class T>
Numbers attend(const Numbers& q, T* k, T* v, int64_t keys, int64_t stride, int64_t head) {
  Numbers out(q.size(), 0.0);
  for (size_t first = 0; first < q.size(); first += static_cast<size_t>(head)) {
    Numbers p;
    double total = 0;
    for (int64_t n = 0; n < keys; ++n) {
      double dot = 0;
      for (size_t i = first; i < first + static_cast<size_t>(head); ++i)
        dot += q[i] * number(k[n * stride + static_cast<int64_t>(i)]);
      p.push_back(exp(dot / sqrt(static_cast<double>(head))));
      total += p.back();
    }
    for (int64_t n = 0; n < keys; ++n)
      for (size_t i = first; i < first + static_cast<size_t>(head); ++i)
        out[i] += p[static_cast<size_t>(n)] / total * number(v[n * stride + static_cast<int64_t>(i)]);
  }
  return out;
}

struct Part {
  const miss::DecoderModel* model;
  const miss::DecoderCall* call;
  miss::Team* team;
};
void* take_part(void* part) {
  const Part& p = *static_cast<Part*>(part);
  miss::decoder_kernels().reserve(*p.model, *p.call);
  miss::decoder_kernels().run(*p.model, *p.call, *p.team);
  return nullptr;
}

template <class T>
struct Layer {
  Weight<T> qkv, self_output, query, cross_output, input, output;
  Gain self_norm, cross_norm, mlp_norm;
  Layer(int64_t width, int64_t inner, Scheme s)
      : qkv(3 * width, width, s), self_output(width, width, s), query(width, width, s), cross_output(width, width, s),
        input(inner, width, s), output(width, inner, s), self_norm(width), cross_norm(width), mlp_norm(width) {}
  miss::DecoderLayer parts() {
    return {qkv.matrix,   self_output.matrix, query.matrix,     cross_output.matrix, input.matrix,
            output.matrix, self_norm.norm(),  cross_norm.norm(), mlp_norm.norm()};
  }
};

// `rows` rows: row r stands at position r / SLOTS of slot r % SLOTS and reads question r % SLOTS / 2; one call.
template <class T>
void step(int64_t rows, int64_t width, int64_t head, Scheme scheme, double tolerance) {
  const int64_t inner = 2 * width + 4, own = LAYERS * SLOTS * LENGTH * width, seen = LAYERS * QUESTIONS * STATES * width;
  const Scheme last = scheme == W8A8 ? W8A8 : PLAIN;
  Buffer<T> words(WORDS * width), places(LENGTH * width), k(own), v(own), cross_k(seen), cross_v(seen);
  for (Buffer<T>* one : {&words, &places, &k, &v, &cross_k, &cross_v}) randomise(*one);
  Gain norm(width), transform_norm(width);
  Weight<T> transform(width, width, scheme), vocabulary(WORDS, width, last);
  Buffer<float> head_bias(WORDS);
  for (int64_t i = 0; i < WORDS; ++i) head_bias[i] = number(vocabulary.bias[i]);
  vocabulary.matrix.bias = head_bias.chars();
  vocabulary.matrix.bias_type = miss::Type::f32;
  std::vector<std::unique_ptr<Layer<T>>> layers;
  std::vector<miss::DecoderLayer> parts;
  for (int64_t i = 0; i < LAYERS; ++i) {
    layers.push_back(std::make_unique<Layer<T>>(width, inner, scheme));
    parts.push_back(layers.back()->parts());
  }
  const miss::DecoderModel model = {check::type_of<T>(), width, inner, width / head, head, words.chars(), places.chars(),
                                    norm.norm(), parts.data(), LAYERS, transform.matrix, transform_norm.norm(),
                                    vocabulary.matrix};
  Buffer<int64_t> tokens(rows), indices(rows * 2);
  Buffer<int32_t> slots(rows), positions(rows), questions(rows), lengths(QUESTIONS);
  for (int64_t r = 0; r < rows; ++r) {
    tokens[r] = r * 37 % WORDS;
    slots[r] = static_cast<int32_t>(r % SLOTS);
    positions[r] = static_cast<int32_t>(r / SLOTS);
    questions[r] = slots[r] / 2;
  }
  for (int64_t q = 0; q < QUESTIONS; ++q) lengths[q] = static_cast<int32_t>(STATES - 3 * q);
  Buffer<T> states(rows * width);
  Buffer<float> values(rows * 2), shift(rows), total(rows);
  Buffer<char> scratch(miss::decoder_kernels().scratch_bytes(model, rows, 3));
  const int64_t token = width * static_cast<int64_t>(sizeof(T));
  miss::DecoderCall call = {};
  call.rows = rows;
  call.tokens = tokens.data();
  call.slots = slots.data(), call.positions = positions.data(), call.questions = questions.data();
  call.self = {k.chars(), v.chars(), SLOTS * LENGTH * token, LENGTH * token, token, SLOTS * LENGTH * token, LENGTH * token, token};
  call.cross = {cross_k.chars(), cross_v.chars(), QUESTIONS * STATES * token, STATES * token, token,
                QUESTIONS * STATES * token, STATES * token, token};
  call.question_lengths = lengths.data();
  call.question_length = call.most_keys = STATES;
  call.states = states.chars();
  call.count = 2;
  call.values = values.data(), call.indices = indices.data(), call.shift = shift.data(), call.total = total.data();
  call.scratch = scratch.data();
  call.threads = 3;
  miss::Team alone;
  Part part = {&model, &call, &alone};
  take_part(&part);
  const Numbers first = read(states.data(), rows * width), best = read(values.data(), rows * 2);
  for (int64_t i = 0; i < LAYERS; ++i)  // written again by three threads
    for (int64_t r = 0; r < rows; ++r) k[((i * SLOTS + slots[r]) * LENGTH + positions[r]) * width] = T{};
  miss::Team team;
  Part shared = {&model, &call, &team};
  pthread_t threads[3];
  for (pthread_t& one : threads) pthread_create(&one, nullptr, take_part, &shared);
  for (pthread_t one : threads) pthread_join(one, nullptr);
  check::expect(first == read(states.data(), rows * width), "decoder step: states of three threads");
  check::expect(best == read(values.data(), rows * 2), "decoder step: logits of three threads");

  // Row by row over the caches that the step has filled.
  for (int64_t r = 0; r < rows; ++r) {
    Numbers x = norm.of(sum(read(words.data() + tokens[r] * width, width), read(places.data() + positions[r] * width, width)));
    for (int64_t i = 0; i < LAYERS; ++i) {
      Layer<T>& l = *layers[static_cast<size_t>(i)];
      Numbers qkv = l.qkv.times(x);
      const int64_t slot = (i * SLOTS + slots[r]) * LENGTH * width, source = (i * QUESTIONS + questions[r]) * STATES * width;
      for (int64_t c = 0; c < width; ++c) {
        const double wanted = qkv[static_cast<size_t>(width + c)];
        check::near(number(k[slot + positions[r] * width + c]), wanted, tolerance * (1 + fabs(wanted)), "decoder step: keys");
      }
      qkv.resize(static_cast<size_t>(width));
      x = l.self_norm.of(sum(x, l.self_output.times(attend(qkv, k.data() + slot, v.data() + slot, positions[r] + 1, width, head))));
      const Numbers read = attend(l.query.times(x), cross_k.data() + source, cross_v.data() + source, lengths[questions[r]], width, head);
      x = l.cross_norm.of(sum(x, l.cross_output.times(read)));
      x = l.mlp_norm.of(sum(x, l.output.times(l.input.times(x, true))));
    }
    const Numbers state = transform_norm.of(transform.times(x, true)), logits = vocabulary.times(state);
    for (int64_t c = 0; c < width; ++c)
      check::near(number(states[r * width + c]), state[static_cast<size_t>(c)], tolerance * 4, "decoder step: states");
    for (int i = 0; i < 2; ++i)
      check::near(values[r * 2 + i], logits[static_cast<size_t>(indices[r * 2 + i])], tolerance * 8, "decoder step: logits");
  }
}

}  // namespace

MISS_CHECK(decoder_step) {
  for (int64_t rows : {0, 1, 3, 9, 17})
    for (Scheme scheme : {PLAIN, W8A8, INT8, INT4}) {
      const double coarse = scheme == W8A8 ? 0.1 : 0;
      step<float>(rows, 64, 32, scheme, 1e-4 + coarse);
      if (rows < 17) step<miss::bf16>(rows, 128, 64, scheme, 5e-2 + coarse);
    }
}
