// Threads that go through one program of many short phases together, in one parallel region.
// Knows who takes part and when a phase is over; does not know what is done in one.
//
// A region of PyTorch's pool takes 6 to 10 us to open, and a decode step has a hundred phases of 5 to 50 us. Nobody waits
// for a thread that may never come: whoever is first begins alone, the others are let in at the end of a phase, when they
// are there. So there is no deadlock on a pool that gives fewer threads than it was asked for, or runs the parts of a
// region one after the other; results must not depend on how the work is shared out.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

namespace miss {

struct Team {
  alignas(64) int64_t joined = 0;   // threads that have come
  alignas(64) int64_t arrived = 0;  // members that are through with the phase
  alignas(64) int64_t word = 1;     // the phase, times 2 ** 32, and how many members it has
  alignas(64) int64_t expected = 1;
};

namespace {  // a copy an instruction set

constexpr int64_t OVER = int64_t{1} << 30;  // the phase after the last one
constexpr int PATIENCE = 20000;             // turns of waiting, about 0.5 ms, before the processor is offered to others

inline void wait_a_little(int& turns) {
  if (++turns < PATIENCE) __builtin_ia32_pause();
  else sched_yield();
}

// One thread's part in a team. Every member makes the same calls in the same order.
class Member {
 public:
  explicit Member(Team& team) : team_(team) {
    id_ = __atomic_fetch_add(&team.joined, 1, __ATOMIC_ACQ_REL);
    if (id_ == 0) return;
    for (int turns = 0;; wait_a_little(turns)) {
      const int64_t word = __atomic_load_n(&team.word, __ATOMIC_ACQUIRE);
      start_ = word >> 32;
      size_ = word & 0xffffffff;
      if (start_ == OVER || size_ > id_) return;
    }
  }

  int64_t id() const { return id_; }
  int64_t size() const { return size_; }
  bool too_late() const { return start_ == OVER; }
  bool takes_part() const { return phase_ >= start_; }

  // body(begin, end) over this member's part of [0, count).
  template <class Body>
  void share(int64_t count, const Body& body) const {
    if (!takes_part()) return;
    const int64_t begin = id_ * count / size_, end = (id_ + 1) * count / size_;
    if (begin < end) body(begin, end);
  }

  // What the next phase will read of memory, fetched while this one is waited for.
  void expect(const char* data, int64_t bytes) {
    ahead_ = data;
    ahead_end_ = data + bytes;
  }

  // The end of a phase; whoever comes last runs `after` alone before the next one begins.
  template <class After>
  void arrive(const After& after, bool last = false) {
    if (!takes_part()) {
      ++phase_;
      return;
    }
    ++phase_;
    if (__atomic_add_fetch(&team_.arrived, 1, __ATOMIC_ACQ_REL) == size_) {
      after();
      if (phase_ == 1) await_others();
      __atomic_store_n(&team_.arrived, 0, __ATOMIC_RELAXED);
      size_ = __atomic_load_n(&team_.joined, __ATOMIC_ACQUIRE);
      __atomic_store_n(&team_.word, (last ? OVER : phase_) << 32 | size_, __ATOMIC_RELEASE);
      return;
    }
    for (int turns = 0;; wait_a_little(turns)) {
      const int64_t word = __atomic_load_n(&team_.word, __ATOMIC_ACQUIRE);
      if (word >> 32 >= phase_) {
        size_ = word & 0xffffffff;
        return;
      }
      for (int line = 0; line < 4 && ahead_ < ahead_end_; ++line, ahead_ += 64) __builtin_prefetch(ahead_, 0, 2);
    }
  }
  void arrive() {
    arrive([] {});
  }

 private:
  // Those that were woken a moment ago are worth some microseconds, once a program.
  void await_others() const {
    for (int turns = 0; turns < 200 && __atomic_load_n(&team_.joined, __ATOMIC_ACQUIRE) < team_.expected; ++turns)
      __builtin_ia32_pause();
  }

  Team& team_;
  int64_t id_, size_ = 1, start_ = 0, phase_ = 0;
  const char *ahead_ = nullptr, *ahead_end_ = nullptr;
};

}  // namespace
}  // namespace miss
