// What the checks of csrc/tests/ share: memory that tells of every byte out of bounds, random numbers, comparisons.
//
// Each check runs twice. On the heap, in blocks of exactly the size, where the address sanitizer sees reads and writes
// before and behind; and with its last byte just before a page that may not be touched: masked loads and stores are
// instructions that the sanitizer does not look into.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/types.h"

namespace check {

enum class Place { heap, guarded };
extern Place place;  // where memory comes from now

void* take(size_t bytes);  // uninitialised, aligned no more than its size and place allow
void give_back(void* memory, size_t bytes, Place from);

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), from_(place), data_(static_cast<T*>(take(bytes()))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { give_back(data_, bytes(), from_); }
  T* data() { return data_; }
  char* chars() { return reinterpret_cast<char*>(data_); }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  int64_t count_;
  Place from_;
  T* data_;
};

uint32_t random_bits();
inline float number(float x) { return x; }
inline float number(miss::bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
inline float uniform() { return static_cast<float>(random_bits()) * 4.6566129e-10f - 1.0f; }  // -1 … 1

template <class T>
void randomise(Buffer<T>& buffer) {
  for (int64_t i = 0; i < buffer.count(); ++i) miss::convert(uniform(), buffer[i]);
}
inline void randomise(Buffer<uint8_t>& buffer) {
  for (int64_t i = 0; i < buffer.count(); ++i) buffer[i] = static_cast<uint8_t>(random_bits() >> 24);
}
inline void randomise(Buffer<int8_t>& buffer) {
  for (int64_t i = 0; i < buffer.count(); ++i) buffer[i] = static_cast<int8_t>(random_bits() >> 24);
}

template <class T>
constexpr miss::Type type_of() {
  if (sizeof(T) == 4) return miss::Type::f32;
  return sizeof(T) == 2 ? miss::Type::bf16 : static_cast<T>(-1) < static_cast<T>(0) ? miss::Type::s8 : miss::Type::u8;
}
template <>
constexpr miss::Type type_of<miss::bf16>() {
  return miss::Type::bf16;
}

// Counts and prints where |got - wanted| is over `tolerance`, or either is NaN.
void near(double got, double wanted, double tolerance, const char* what);
void expect(bool holds, const char* what);

struct Check {
  Check(const char* name, void (*run)());
};

}  // namespace check

// A check and its name:   MISS_CHECK(linear) { … }
#define MISS_CHECK(name)                                          \
  static void check_##name();                                     \
  static const check::Check registered_##name(#name, check_##name); \
  static void check_##name()
