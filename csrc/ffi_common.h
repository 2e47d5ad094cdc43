// What every XLA FFI handler shares: buffer checks with the op's and argument's name in the error,
// and the loop that spreads work over XLA's own thread pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace jml {

namespace ffi = ::xla::ffi;

inline std::string shape_text(ffi::AnyBuffer::Dimensions dims) {
  std::string s = "[";
  for (size_t i = 0; i < dims.size(); ++i) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + "]";
}

const char* dtype_name(ffi::DataType t);

inline ffi::Error invalid(const std::string& op, const char* kind, const char* name,
                          const std::string& expected, const std::string& got) {
  return ffi::Error::InvalidArgument(op + ": " + kind + " " + name + ": expected " + expected +
                                     ", got " + got);
}

// `lead` + `tail` must be the buffer's shape.
inline ffi::Error check_buffer(const std::string& op, const char* kind, const char* name,
                               const ffi::AnyBuffer& b, ffi::DataType dtype,
                               ffi::AnyBuffer::Dimensions lead,
                               std::initializer_list<int64_t> tail) {
  auto dims = b.dimensions();
  bool ok = b.element_type() == dtype && dims.size() == lead.size() + tail.size();
  for (size_t i = 0; ok && i < lead.size(); ++i) ok = dims[i] == lead[i];
  size_t at = lead.size();
  for (int64_t d : tail) ok = ok && dims[at++] == d;
  if (ok) return ffi::Error::Success();
  std::string want = dtype_name(dtype);
  want += "[";
  for (size_t i = 0; i < lead.size(); ++i) want += (i ? ", " : "") + std::to_string(lead[i]);
  bool first = lead.size() == 0;
  for (int64_t d : tail) {
    want += (first ? "" : ", ") + std::to_string(d);
    first = false;
  }
  return invalid(op, kind, name, want + "]", dtype_name(b.element_type()) + shape_text(dims));
}

// The same of result `at`.
inline ffi::Error check_result(const std::string& op, const char* name, ffi::RemainingRets rets,
                               size_t at, ffi::DataType dtype, ffi::AnyBuffer::Dimensions lead,
                               std::initializer_list<int64_t> tail) {
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> r = rets.get<ffi::AnyBuffer>(at);
  if (r.has_error()) return r.error();
  return check_buffer(op, "result", name, **r, dtype, lead, tail);
}

// For the time of a handler. XLA hands plans and memory from thread to thread by means that
// ThreadSanitizer does not see: what one handler did before it returned, the next one finds done.
class HandedOver {
 public:
#if defined(__SANITIZE_THREAD__)
  HandedOver() { __tsan_acquire(tag()); }
  ~HandedOver() { __tsan_release(tag()); }

 private:
  static void* tag() {
    static char at;
    return &at;
  }
#else
  HandedOver() {}
  ~HandedOver() {}
#endif
};

// A 64-byte aligned block, nullptr when memory is short.
struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBlock = std::unique_ptr<void, AlignedFree>;
inline AlignedBlock allocate_aligned(int64_t bytes) {
  return AlignedBlock(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64)));
}

// Inputs may be subnormal and results may be too; XLA's threads flush them. The kernels scale
// first, so denormals cost nothing inside.
class ScopedDenormals {
 public:
#if defined(__x86_64__)
  ScopedDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~ScopedDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~(uint64_t(1) << 24)));
  }
  ~ScopedDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

#if defined(__linux__)
inline int current_cpu() { return sched_getcpu(); }
// A woken thread may be queued behind the one that woke it while another processor idles, and the
// scheduler takes milliseconds to notice, as long as a whole call. Step aside once; the thread's
// affinity is as before on return.
inline void leave_cpu(int cpu) {
  if (cpu < 0 || sched_getcpu() != cpu) return;
  cpu_set_t all, others;
  if (sched_getaffinity(0, sizeof(all), &all) != 0 || cpu >= CPU_SETSIZE) return;
  others = all;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(all), &all);
}
#else
inline int current_cpu() { return -1; }
inline void leave_cpu(int) {}
#endif

// Some 20 microseconds of waiting awake.
constexpr int kSpins = 1000;
inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// body(index) for every index in [0, count), on the calling thread and up to `workers - 1` threads
// of XLA's pool. The caller takes part and waits only for indices that a helper has begun, never
// for a helper to be scheduled, so a busy pool cannot deadlock it. body must not throw.
template <class Body>
void parallel_for(ffi::ThreadPool& pool, int64_t workers, int64_t count, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> left;
    std::mutex mutex;
    std::condition_variable done;
  };
  if (count <= 0) return;
  if (workers > count) workers = count;
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  auto state = std::make_shared<State>();
  state->left = count;
  const Body* shared_body = &body;  // alive while an index is unfinished
  auto work = [state, shared_body, count] {
    for (;;) {
      const int64_t i = state->next.fetch_add(1);
      if (i >= count) return;
      (*shared_body)(i);
      if (state->left.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->done.notify_all();
      }
    }
  };
  const int caller_cpu = current_cpu();
  for (int64_t w = 1; w < workers; ++w) {
    pool.Schedule([work, caller_cpu] {
      leave_cpu(caller_cpu);
      work();
    });
  }
  work();
  // Others end at about the same time: asleep, one would be woken too late.
  for (int i = 0; i < kSpins && state->left.load() != 0; ++i) pause_cpu();
  if (state->left.load() == 0) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->done.wait(lock, [&] { return state->left.load() == 0; });
}

}  // namespace jml
