// The simulator: runs kernels compiled as C++ (kernels/msl_sim.h) and judges them.
//
// Every thread of a threadgroup is a fiber; 32 of them form a simdgroup. One fiber runs until it
// meets others (a simd function, a barrier) or ends. Order therefore never hides a race: what two
// threads may do at the same time is decided by epochs, which barriers advance, not by what the
// schedule happened to do. Each word of memory remembers who wrote and read it, when and where.
#include "device.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "sim/runtime.h"

// void jml_sim_switch(void** save, void* load): keeps what the ABI says a call keeps.
extern "C" void jml_sim_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl jml_sim_switch
.hidden jml_sim_switch
.type jml_sim_switch,@function
jml_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size jml_sim_switch,.-jml_sim_switch
)");
#elif defined(__aarch64__)
#if defined(__APPLE__)
#define JML_SYMBOL "_jml_sim_switch"
#define JML_HIDDEN ".private_extern _jml_sim_switch\n"
#else
#define JML_SYMBOL "jml_sim_switch"
#define JML_HIDDEN ".hidden jml_sim_switch\n"
#endif
asm(".text\n.p2align 4\n.globl " JML_SYMBOL "\n" JML_HIDDEN JML_SYMBOL R"(:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "device_sim.cc: no context switch for this processor"
#endif

namespace jml {
namespace sim {

// One access to a word. Epochs count the barriers passed that order this word's memory.
struct Access {
  uint32_t thread = 0;
  uint32_t group = 0;
  uint32_t group_epoch = 0;
  uint32_t simd_epoch = 0;
  int32_t line = 0;  // 0: none
};

// Of readers, enough are kept to meet every later writer: the last one, the last of another thread
// in its simdgroup, and the last of another simdgroup.
struct Word {
  Access write;
  Access read[3];
};

struct Allocation {
  std::byte* data = nullptr;
  int64_t bytes = 0;
  bool threadgroup = false;
  int64_t grain = 4;  // bytes a Word stands for
  std::string name;
  int index = 0;
  std::vector<Word> words;
  uint8_t* written = nullptr;  // by byte, since the call began; null: all of it, by the caller
};

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint32_t kLanes = 32;

enum class State { ready, simd, group, done };

struct Fiber {
  void* stack = nullptr;
  void* sp = nullptr;
  State state = State::ready;
  Meet what = Meet::shuffle_;
  int line = 0;
  int turn = 0;  // which of the two sets of slots its next meeting uses
};

struct Simdgroup {
  uint64_t slots[2][kLanes] = {};
  uint32_t arrived = 0;
  uint32_t epoch[2] = {0, 0};  // device, threadgroup
};

struct Finding {
  std::string kind;
  std::string text;
  int line = 0;
  int other_line = 0;
};

struct Registry {
  std::mutex mutex;
  std::vector<const KernelRegistration*> kernels;
  std::vector<const ConstantRegistration*> constants;
};

Registry& registry() {
  static Registry r;
  return r;
}

struct Launch {
  const KernelRegistration* kernel = nullptr;
  Size3 grid, group;
  SimOptions options;
  std::map<int, Bound> buffers;
  std::map<int, Bound> scratch;
  int params_index = -1;
  const void* params = nullptr;
  std::vector<std::unique_ptr<Allocation>> allocations;
  std::vector<std::vector<std::byte>> scratch_memory;

  std::vector<Fiber> fibers;
  std::vector<Simdgroup> simdgroups;
  std::vector<uint32_t> lane_order;  // of all threads, simdgroup by simdgroup
  std::vector<uint32_t> place;       // inverse of lane_order
  uint32_t current = 0;
  uint32_t arrived = 0;
  uint32_t epoch[2] = {0, 0};
  uint32_t group_number = 0;
  Size3 group_position;
  void* scheduler = nullptr;
  bool aborted = false;

  std::vector<Finding> findings;
  std::set<std::tuple<std::string, int, int>> seen;
  int64_t suppressed = 0;
};

Launch* g = nullptr;  // the running launch; one at a time, under launch_mutex()

std::mutex& launch_mutex() {
  static std::mutex m;
  return m;
}

uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void shuffle(std::vector<uint32_t>& v, size_t begin, size_t end, uint64_t& state) {
  for (size_t i = end - begin; i > 1; --i) {
    std::swap(v[begin + i - 1], v[begin + next_random(state) % i]);
  }
}

std::string thread_name(uint32_t thread) {
  return "lane " + std::to_string(thread % kLanes) + " of simdgroup " +
         std::to_string(thread / kLanes);
}

void note(const std::string& kind, int line, int other_line, const std::string& text) {
  if (!g->seen.insert({kind, line, other_line}).second) return;
  if (static_cast<int64_t>(g->findings.size()) >= g->options.max_findings) {
    ++g->suppressed;
    return;
  }
  std::string where = std::string(g->kernel->file) + ":" + std::to_string(line) + ": " +
                      g->kernel->name + ", threadgroup " + std::to_string(g->group_number) + ": ";
  g->findings.push_back({kind, where + text, line, other_line});
}

// Lets another fiber run: one of this simdgroup if any can, so that simd functions stay cheap.
void switch_to(uint32_t thread) {
  Fiber& from = g->fibers[g->current];
  g->current = thread;
  Fiber& to = g->fibers[thread];
  if (&from != &to) jml_sim_switch(&from.sp, to.sp);
}

void leave() {
  Fiber& from = g->fibers[g->current];
  jml_sim_switch(&from.sp, g->scheduler);
}

std::string lane_list(const std::vector<uint32_t>& lanes) {
  std::string text;
  for (size_t i = 0; i < lanes.size();) {
    size_t j = i;
    while (j + 1 < lanes.size() && lanes[j + 1] == lanes[j] + 1) ++j;
    text += (text.empty() ? "" : ",") + std::to_string(lanes[i]);
    if (j > i) text += "-" + std::to_string(lanes[j]);
    i = j + 1;
  }
  return text;
}

const char* meet_name(const Fiber& f) {
  if (f.state == State::done) return "the end of the kernel";
  if (f.state == State::group) return "threadgroup_barrier";
  switch (f.what) {
    case Meet::shuffle_:
      return "simd_shuffle";
    case Meet::vote_:
      return "simd vote";
    case Meet::reduce_:
      return "simd reduction";
    case Meet::matrix_:
      return "simdgroup matrix function";
    default:
      return "simdgroup_barrier";
  }
}

// Nothing can run, or lanes met at different places: say who stands where, and give up the launch.
void diverged(bool barrier) {
  std::map<std::tuple<std::string, int>, std::vector<uint32_t>> places;
  std::vector<int> lines;
  for (uint32_t i = 0; i < g->fibers.size(); ++i) {
    const Fiber& f = g->fibers[i];
    int line = f.state == State::done ? 0 : f.line;
    if (f.state == State::ready) continue;
    places[{meet_name(f), line}].push_back(i);
    if (line) lines.push_back(line);
  }
  std::string text;
  for (const auto& [place, threads] : places) {
    text += (text.empty() ? "threads " : "; threads ") + lane_list(threads) + " at " +
            std::get<0>(place);
    if (std::get<1>(place)) text += " line " + std::to_string(std::get<1>(place));
  }
  std::sort(lines.begin(), lines.end());
  int low = lines.empty() ? g->kernel->line : lines.front();
  int high = lines.empty() ? 0 : lines.back();
  note(barrier ? "divergent_barrier" : "divergent_simd", low, high == low ? 0 : high, text);
  g->aborted = true;
  leave();
}

void yield() {
  const uint32_t threads = static_cast<uint32_t>(g->fibers.size());
  const uint32_t here = g->place[g->current];
  for (uint32_t i = 1; i <= threads; ++i) {
    uint32_t thread = g->lane_order[(here + i) % threads];
    if (g->fibers[thread].state == State::ready) {
      switch_to(thread);
      return;
    }
  }
  bool all_done = true, barrier = false;
  for (const Fiber& f : g->fibers) {
    all_done = all_done && f.state == State::done;
    barrier = barrier || f.state == State::group ||
              (f.state == State::simd && f.what == Meet::simdgroup_barrier_);
  }
  if (all_done) leave();
  diverged(barrier);
}

void fiber_main() {
  g->kernel->entry();
  g->fibers[g->current].state = State::done;
  yield();
  std::abort();  // a fiber that ended is never run again
}

void prepare(Fiber& f) {
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<std::byte*>(f.stack) + kStackBytes);
#if defined(__x86_64__)
  // ret pops fiber_main's address and leaves rsp as after a call: 8 below a multiple of 16.
  top[-2] = reinterpret_cast<uintptr_t>(&fiber_main);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  f.sp = top - 8;
#else
  for (int i = 1; i <= 20; ++i) top[-i] = 0;
  top[-20 + 11] = reinterpret_cast<uintptr_t>(&fiber_main);  // x30
  f.sp = top - 20;
#endif
  f.state = State::ready;
  f.turn = 0;
}

bool ordered(const Access& before, const Access& now) {
  if (before.group != now.group) return false;
  if (before.thread == now.thread || before.group_epoch != now.group_epoch) return true;
  return before.thread / kLanes == now.thread / kLanes && before.simd_epoch != now.simd_epoch;
}

std::string place_of(const Allocation& a, int64_t offset) {
  return std::string(a.threadgroup ? "threadgroup" : "device") + " argument " + a.name + ", byte " +
         std::to_string(offset) + " of " + std::to_string(a.bytes);
}

void race(const Allocation& a, int64_t offset, const Access& before, bool before_wrote,
          const Access& now, bool now_writes) {
  bool groups = before.group != now.group;
  std::string text = thread_name(now.thread) + (now_writes ? " writes" : " reads") + ", " +
                     thread_name(before.thread);
  if (groups) text += " of threadgroup " + std::to_string(before.group);
  text += before_wrote ? " wrote" : " read";
  text +=
      " at line " + std::to_string(before.line) + " with nothing between: " + place_of(a, offset);
  note(groups ? "race_threadgroups" : "race_lanes", now.line, before.line, text);
}

bool check(Allocation* a, const void* p, size_t bytes, int line, bool writes) {
  if (g == nullptr) return true;
  uint32_t thread = g->current;
  if (a == nullptr) {
    note("null_pointer", line, 0,
         thread_name(thread) + (writes ? " writes" : " reads") + " through a null pointer");
    return false;
  }
  int64_t offset =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(a->data));
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > a->bytes) {
    note("out_of_bounds", line, 0,
         thread_name(thread) + (writes ? " writes " : " reads ") + std::to_string(bytes) +
             " bytes: " + place_of(*a, offset));
    return false;
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    note("misaligned", line, 0,
         thread_name(thread) + (writes ? " writes " : " reads ") + std::to_string(bytes) +
             " bytes: " + place_of(*a, offset));
    return false;
  }
  const int space = a->threadgroup ? 1 : 0;
  Access now{thread, g->group_number, g->epoch[space], g->simdgroups[thread / kLanes].epoch[space],
             line};
  auto never_written = [&] {
    note("uninitialised", line, 0,
         thread_name(thread) + " reads what nothing wrote: " + place_of(*a, offset));
  };
  if (a->written != nullptr) {
    uint8_t* here = a->written + offset;
    if (writes) {
      std::fill(here, here + bytes, uint8_t{1});
    } else if (std::find(here, here + bytes, uint8_t{0}) != here + bytes) {
      never_written();
    }
  }
  int64_t first = offset / a->grain, last = (offset + static_cast<int64_t>(bytes) - 1) / a->grain;
  for (int64_t i = first; i <= last; ++i) {
    Word& w = a->words[static_cast<size_t>(i)];
    if (w.write.line != 0 && !ordered(w.write, now)) race(*a, offset, w.write, true, now, writes);
    if (writes) {
      for (const Access& r : w.read) {
        if (r.line != 0 && !ordered(r, now)) race(*a, offset, r, false, now, true);
      }
      w.write = now;
      continue;
    }
    if (a->threadgroup && w.write.line == 0) never_written();
    Access& r = w.read[0];
    if (r.line != 0 && (r.thread != thread || r.group != now.group)) {
      bool other = r.thread / kLanes != thread / kLanes || r.group != now.group;
      w.read[other ? 2 : 1] = r;
    }
    r = now;
  }
  return true;
}

}  // namespace

KernelRegistration::KernelRegistration(int checked_, const char* name_, const char* file_,
                                       int line_, void (*entry_)(), const Arg* args_,
                                       int arg_count_, int max_threads_)
    : checked(checked_),
      name(name_),
      file(file_),
      line(line_),
      entry(entry_),
      args(args_),
      arg_count(arg_count_),
      max_threads(max_threads_) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().kernels.push_back(this);
}

KernelRegistration::~KernelRegistration() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto& all = registry().kernels;
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

ConstantRegistration::ConstantRegistration(int checked_, const char* name_, int index_, void* data_,
                                           size_t bytes_)
    : checked(checked_), name(name_), index(index_), data(data_), bytes(bytes_) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().constants.push_back(this);
}

ConstantRegistration::~ConstantRegistration() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto& all = registry().constants;
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

Bound bound_buffer(int index) { return g->buffers[index]; }
Bound bound_threadgroup(int index) { return g->scratch[index]; }
const void* bound_params(int) { return g->params; }

uint32_t id(Id which, int dimension) {
  auto of = [dimension](const Size3& s) {
    return dimension == 0 ? s.x : (dimension == 1 ? s.y : s.z);
  };
  const uint32_t thread = g->current;
  switch (which) {
    case Id::threadgroup_position_in_grid_:
      return of(g->group_position);
    case Id::threadgroups_per_grid_:
      return of(g->grid);
    case Id::threads_per_threadgroup_:
      return of(g->group);
    case Id::simdgroups_per_threadgroup_:
      return static_cast<uint32_t>(g->simdgroups.size());
    case Id::threads_per_simdgroup_:
      return kLanes;
    case Id::simdgroup_index_in_threadgroup_:
      return thread / kLanes;
    case Id::thread_index_in_simdgroup_:
      return thread % kLanes;
    case Id::thread_index_in_threadgroup_:
      return thread;
    case Id::thread_position_in_threadgroup_:
      return dimension == 0 ? thread : 0;
    case Id::thread_position_in_grid_:
      return dimension == 0 ? g->group_position.x * g->group.x + thread : of(g->group_position);
  }
  return 0;
}

bool check_read(Allocation* a, const void* p, size_t bytes, int line) {
  return check(a, p, bytes, line, false);
}
bool check_write(Allocation* a, const void* p, size_t bytes, int line) {
  return check(a, p, bytes, line, true);
}

const uint64_t* meet(Meet what, uint64_t value, int line) {
  const uint32_t thread = g->current, first = thread / kLanes * kLanes;
  Fiber& f = g->fibers[thread];
  Simdgroup& s = g->simdgroups[thread / kLanes];
  const int turn = f.turn;
  f.turn ^= 1;
  s.slots[turn][thread % kLanes] = value;
  f.state = State::simd;
  f.what = what;
  f.line = line;
  if (++s.arrived == kLanes) {
    for (uint32_t i = 0; i < kLanes; ++i) {
      const Fiber& other = g->fibers[first + i];
      if (other.what != what || other.line != line) diverged(what == Meet::simdgroup_barrier_);
    }
    s.arrived = 0;
    for (uint32_t i = 0; i < kLanes; ++i) g->fibers[first + i].state = State::ready;
  } else {
    yield();
  }
  return s.slots[turn];
}

void note_lane(uint32_t lane, int line) {
  if (lane >= kLanes) {
    note("shuffle_lane", line, 0,
         thread_name(g->current) + " asks for lane " + std::to_string(lane) + " of 32");
  }
}

void simdgroup_barrier(int flags, int line) {
  Simdgroup& s = g->simdgroups[g->current / kLanes];
  const bool last = s.arrived + 1 == kLanes;
  meet(Meet::simdgroup_barrier_, 0, line);
  if (last) {
    for (int space = 0; space < 2; ++space) {
      if (flags & (1 << space)) ++s.epoch[space];
    }
  }
}

void threadgroup_barrier(int flags, int line) {
  Fiber& f = g->fibers[g->current];
  f.state = State::group;
  f.line = line;
  if (++g->arrived < g->fibers.size()) {
    yield();
    return;
  }
  for (const Fiber& other : g->fibers) {
    if (other.line != line) diverged(true);
  }
  g->arrived = 0;
  for (int space = 0; space < 2; ++space) {
    if (flags & (1 << space)) ++g->epoch[space];
  }
  for (Fiber& other : g->fibers) other.state = State::ready;
}

void array_out_of_bounds(int line, long long index) {
  note("array_out_of_bounds", line, 0,
       thread_name(g->current) + " uses index " + std::to_string(index) +
           " outside of an array in registers");
  g->aborted = true;
  leave();
  std::abort();
}

namespace {

// Apple GPUs and our CUDA build treat denormals apart from x86: flush, so that a kernel that
// depends on them fails here.
class FlushDenormals {
 public:
  FlushDenormals() {
#if defined(__x86_64__)
    before_ = _mm_getcsr();
    _mm_setcsr(static_cast<unsigned>(before_) | 0x8040u);
#else
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1u << 24)));
#endif
  }
  ~FlushDenormals() {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(before_));
#else
    asm volatile("msr fpcr, %0" : : "r"(before_));
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  uint64_t before_ = 0;
};

class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  ~Stacks() {
    if (ok()) munmap(memory_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  bool ok() const { return memory_ != MAP_FAILED; }
  void* at(size_t i) const { return static_cast<std::byte*>(memory_) + i * kStackBytes; }

 private:
  size_t bytes_;
  void* memory_;
};

std::string limit(const KernelRegistration& k, const std::string& what, int64_t got,
                  const char* relation, int64_t allowed, const std::string& device) {
  return std::string(k.name) + ": " + what + " " + std::to_string(got) + " " + relation + " " +
         std::to_string(allowed) + " of " + device;
}

// What the host asked for, against the limits and the signature.
Status validate(const KernelRegistration& k, const Caps& caps, Size3 grid, Size3 group,
                const std::vector<Buffer>& buffers, const Params& params) {
  const int64_t threads = int64_t{group.x} * group.y * group.z;
  if (group.y != 1 || group.z != 1) return std::string(k.name) + ": threadgroups are one row";
  if (threads < 1 || threads > caps.max_threads_per_threadgroup)
    return limit(k, "threads per threadgroup:", threads, "exceed the",
                 caps.max_threads_per_threadgroup, caps.name);
  if (k.max_threads != 0 && threads > k.max_threads)
    return limit(k, "threads per threadgroup:", threads, "exceed the", k.max_threads,
                 "its max_total_threads_per_threadgroup");
  if (threads % caps.simd_width != 0)
    return limit(k, "threads per threadgroup:", threads, "are no multiple of the simdgroup's",
                 caps.simd_width, caps.name);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return std::string(k.name) + ": empty grid";
  int64_t scratch = 0;
  for (int64_t b : params.threadgroup_bytes) scratch += (b + 15) / 16 * 16;
  if (scratch > caps.max_threadgroup_bytes)
    return limit(k, "threadgroup bytes:", scratch, "exceed the", caps.max_threadgroup_bytes,
                 caps.name);
  if (params.bytes > caps.max_params_bytes)
    return limit(k, "params bytes:", params.bytes, "exceed the", caps.max_params_bytes, caps.name);
  std::map<int, const Buffer*> bound;
  for (const Buffer& b : buffers) bound[b.index] = &b;
  int64_t count = 0;
  for (int i = 0; i < k.arg_count; ++i) {
    const Arg& a = k.args[i];
    std::string what = std::string(k.name) + ": argument " + a.name;
    if (a.kind == ArgKind::threadgroup_) {
      if (a.index >= static_cast<int>(params.threadgroup_bytes.size()))
        return what + ": no size for threadgroup memory " + std::to_string(a.index);
      continue;
    }
    ++count;
    if (a.kind == ArgKind::params_) {
      if (params.index != a.index || params.data == nullptr)
        return what + ": params must be bound at " + std::to_string(a.index);
      if (params.bytes != static_cast<int64_t>(a.element_bytes))
        return limit(k, std::string(a.name) + ": bytes", params.bytes, "instead of",
                     static_cast<int64_t>(a.element_bytes), "the kernel's struct");
    } else if (bound.count(a.index) == 0) {
      return what + ": no buffer bound at " + std::to_string(a.index);
    }
  }
  if (count > caps.max_buffers)
    return limit(k, "buffers:", count, "exceed the", caps.max_buffers, caps.name);
  return std::nullopt;
}

Allocation* add_allocation(Launch& l, void* data, int64_t bytes, const Arg& arg, bool threadgroup) {
  for (auto& a : l.allocations) {
    if (!threadgroup && !a->threadgroup && a->data == data) {
      // One piece of memory bound twice: one history.
      a->bytes = std::max(a->bytes, bytes);
      a->grain = std::min(a->grain, static_cast<int64_t>(arg.element_bytes));
      a->name += std::string("/") + arg.name;
      return a.get();
    }
  }
  auto a = std::make_unique<Allocation>();
  a->data = static_cast<std::byte*>(data);
  a->bytes = bytes;
  a->threadgroup = threadgroup;
  a->grain = std::clamp<int64_t>(static_cast<int64_t>(arg.element_bytes), 1, 4);
  a->name = arg.name;
  a->index = arg.index;
  l.allocations.push_back(std::move(a));
  return l.allocations.back().get();
}

// A new threadgroup finds its scratch undefined; NaN with a payload, in case a check is off.
void reset_scratch(Launch& l) {
  for (auto& a : l.allocations) {
    if (!a->threadgroup) continue;
    const uint32_t poison = 0x7fc0deadu;
    for (int64_t i = 0; i + 4 <= a->bytes; i += 4) std::memcpy(a->data + i, &poison, 4);
    std::fill(a->words.begin(), a->words.end(), Word());
  }
}

struct Outcome {
  std::vector<Finding> findings;
  int64_t suppressed = 0;
};

void set_constants(const std::vector<ConstantValue>& values, bool checked) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  for (const ConstantValue& v : values) {
    for (const ConstantRegistration* c : registry().constants) {
      if (c->index == v.index && (c->checked != 0) == checked)
        std::memcpy(c->data, &v.bits, c->bytes);
    }
  }
}

Outcome run(const KernelRegistration& kernel, const std::vector<ConstantValue>& constants,
            Size3 grid, Size3 group, const std::vector<Buffer>& buffers, const Params& params,
            const SimOptions& options, const std::map<int, uint8_t*>& written = {}) {
  std::lock_guard<std::mutex> lock(launch_mutex());
  set_constants(constants, options.checked);
  Launch l;
  l.kernel = &kernel;
  l.grid = grid;
  l.group = group;
  l.options = options;
  l.params = params.data;
  l.params_index = params.index;
  const uint32_t threads = group.x;
  for (int i = 0; i < kernel.arg_count; ++i) {
    const Arg& a = kernel.args[i];
    if (a.kind == ArgKind::buffer_) {
      for (const Buffer& b : buffers) {
        if (b.index != a.index) continue;
        Allocation* allocation = add_allocation(l, b.data, b.bytes, a, false);
        const auto found = written.find(b.index);
        if (found != written.end()) allocation->written = found->second;
        l.buffers[a.index] = {b.data, allocation};
      }
    } else if (a.kind == ArgKind::threadgroup_) {
      int64_t bytes = params.threadgroup_bytes[static_cast<size_t>(a.index)];
      l.scratch_memory.emplace_back(static_cast<size_t>(bytes) + 16);
      auto address = reinterpret_cast<uintptr_t>(l.scratch_memory.back().data());
      void* data = reinterpret_cast<void*>((address + 15) / 16 * 16);
      l.scratch[a.index] = {data, add_allocation(l, data, bytes, a, true)};
    }
  }
  if (options.checked) {
    for (auto& a : l.allocations) {
      a->words.resize(static_cast<size_t>((a->bytes + a->grain - 1) / a->grain));
    }
  }
  Stacks stacks(threads);
  Outcome outcome;
  if (!stacks.ok()) {
    outcome.findings.push_back(
        {"resources", "no memory for " + std::to_string(threads) + " stacks", kernel.line, 0});
    return outcome;
  }
  l.fibers.resize(threads);
  for (uint32_t i = 0; i < threads; ++i) l.fibers[i].stack = stacks.at(i);
  l.lane_order.resize(threads);
  l.place.resize(threads);
  const uint32_t groups = grid.x * grid.y * grid.z;
  std::vector<uint32_t> group_order(groups);
  std::iota(group_order.begin(), group_order.end(), 0u);
  uint64_t random = options.seed;
  if (options.shuffle) shuffle(group_order, 0, groups, random);

  FlushDenormals flush;
  g = &l;
  for (uint32_t number : group_order) {
    l.group_number = number;
    l.group_position = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    std::iota(l.lane_order.begin(), l.lane_order.end(), 0u);
    if (options.shuffle) {
      std::vector<uint32_t> simd(threads / kLanes);
      std::iota(simd.begin(), simd.end(), 0u);
      shuffle(simd, 0, simd.size(), random);
      for (uint32_t s = 0; s < simd.size(); ++s) {
        for (uint32_t i = 0; i < kLanes; ++i) l.lane_order[s * kLanes + i] = simd[s] * kLanes + i;
        shuffle(l.lane_order, s * kLanes, (s + 1) * kLanes, random);
      }
    }
    for (uint32_t i = 0; i < threads; ++i) l.place[l.lane_order[i]] = i;
    l.simdgroups.assign(threads / kLanes, Simdgroup());
    l.epoch[0] = l.epoch[1] = 0;
    l.arrived = 0;
    if (options.checked) reset_scratch(l);
    for (Fiber& f : l.fibers) prepare(f);
    l.current = l.lane_order[0];
    jml_sim_switch(&l.scheduler, l.fibers[l.current].sp);
    if (l.aborted) break;
  }
  g = nullptr;
  outcome.findings = std::move(l.findings);
  outcome.suppressed = l.suppressed;
  return outcome;
}

const KernelRegistration* find_kernel(const std::string& name, bool checked) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const auto& all = registry().kernels;
  // The library loaded last wins, so that a test can put another kernel in place.
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    if (name == (*it)->name && ((*it)->checked != 0) == checked) return *it;
  }
  return nullptr;
}

class SimKernel : public Kernel {
 public:
  SimKernel(const KernelRegistration* r, std::vector<ConstantValue> c)
      : registration(r), constants(std::move(c)) {}
  const KernelRegistration* registration;
  std::vector<ConstantValue> constants;
};

class SimDevice : public Device {
 public:
  SimDevice(Caps caps, SimOptions options) : caps_(std::move(caps)), options_(options) {}

  const Caps& caps() const override { return caps_; }

  Result<const Kernel*> compile(const std::string& source,
                                const std::vector<ConstantValue>& constants) override {
    const KernelRegistration* r = find_kernel(source, options_.checked);
    if (r == nullptr) return {nullptr, "sim: no kernel named " + source + " in this library"};
    kernels_.push_back(std::make_unique<SimKernel>(r, constants));
    return {kernels_.back().get(), std::nullopt};
  }

  Result<Buffer> scratch(int64_t bytes) override {
    if (bytes < 0) return {{}, "sim: scratch of " + std::to_string(bytes) + " bytes"};
    scratch_.emplace_back(new std::byte[static_cast<size_t>(bytes) + 1]);
    return {{0, scratch_.back().get(), bytes}, std::nullopt};
  }

  Status launch(const Kernel& kernel, Size3 grid, Size3 group, const std::vector<Buffer>& buffers,
                const Params& params, void*) override {
    const auto& k = static_cast<const SimKernel&>(kernel);
    Status bad = validate(*k.registration, caps_, grid, group, buffers, params);
    if (bad) return bad;
    std::map<int, uint8_t*> written;
    for (const Buffer& b : buffers) {
      if (options_.checked && (b.fresh || is_scratch(b.whole))) {
        std::vector<uint8_t>& whole = written_[b.whole];
        whole.resize(static_cast<size_t>(b.whole_bytes));
        written[b.index] =
            whole.data() + (static_cast<std::byte*>(b.data) - static_cast<std::byte*>(b.whole));
      }
    }
    Outcome o = run(*k.registration, k.constants, grid, group, buffers, params, options_, written);
    findings_.insert(findings_.end(), o.findings.begin(), o.findings.end());
    suppressed_ += o.suppressed;
    return std::nullopt;
  }

  Status synchronize() override {
    written_.clear();
    if (findings_.empty()) return std::nullopt;
    std::string text =
        "sim: " + std::to_string(findings_.size() + static_cast<size_t>(suppressed_)) + " findings";
    for (const Finding& f : findings_) text += "\n" + f.text + " [" + f.kind + "]";
    findings_.clear();
    suppressed_ = 0;
    return text;
  }

 private:
  bool is_scratch(const void* p) const {
    return std::any_of(scratch_.begin(), scratch_.end(),
                       [p](const auto& block) { return block.get() == p; });
  }

  Caps caps_;
  SimOptions options_;
  std::vector<std::unique_ptr<SimKernel>> kernels_;
  std::vector<std::unique_ptr<std::byte[]>> scratch_;
  // Of what a call finds undefined, its results and scratch memory: which bytes it has written.
  std::map<void*, std::vector<uint8_t>> written_;
  std::vector<Finding> findings_;
  int64_t suppressed_ = 0;
};

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + "\"";
}

char* copied(const std::string& s) {
  char* p = static_cast<char*>(std::malloc(s.size() + 1));
  if (p != nullptr) std::memcpy(p, s.c_str(), s.size() + 1);
  return p;
}

}  // namespace
}  // namespace sim

std::unique_ptr<Device> make_sim_device(Caps caps, SimOptions options) {
  return std::make_unique<sim::SimDevice>(std::move(caps), options);
}

}  // namespace jml

// For tests: one launch, told in plain C.
extern "C" {

struct JmlSimBuffer {
  int32_t index;
  int32_t undefined;  // 1: nothing of it counts as written
  void* data;
  int64_t bytes;
};

struct JmlSimOptions {
  int32_t checked;
  int32_t shuffle;
  uint64_t seed;
  int64_t max_threads;
  int64_t max_threadgroup_bytes;
  int64_t max_buffers;
};

// JSON {"error": text or null, "findings": [{"kind", "line", "other_line", "text"}]}; free() it
// with jml_sim_free. constants: pairs of index and bits.
__attribute__((visibility("default"))) char* jml_sim_launch(
    const char* kernel, const uint32_t* grid, uint32_t threads, const JmlSimBuffer* buffers,
    int32_t buffer_count, int32_t params_index, const void* params, int64_t params_bytes,
    const int64_t* threadgroup_bytes, int32_t threadgroup_count, const int64_t* constants,
    int32_t constant_count, const JmlSimOptions* options) {
  namespace sim = jml::sim;
  jml::Caps caps;
  caps.name = "the simulated device";
  caps.max_threads_per_threadgroup = options->max_threads;
  caps.max_threadgroup_bytes = options->max_threadgroup_bytes;
  caps.max_buffers = options->max_buffers;
  const bool checked = options->checked != 0;
  const sim::KernelRegistration* r = sim::find_kernel(kernel, checked);
  std::string error;
  sim::Outcome outcome;
  std::vector<jml::Buffer> bound;
  std::vector<std::vector<uint8_t>> undefined;
  std::map<int, uint8_t*> written;
  for (int i = 0; i < buffer_count; ++i) {
    bound.push_back({buffers[i].index, buffers[i].data, buffers[i].bytes});
    if (buffers[i].undefined == 0) continue;
    undefined.emplace_back(static_cast<size_t>(buffers[i].bytes));
    written[buffers[i].index] = undefined.back().data();
  }
  jml::Params p{params_index,
                params,
                params_bytes,
                {threadgroup_bytes, threadgroup_bytes + threadgroup_count}};
  std::vector<jml::ConstantValue> values;
  for (int i = 0; i < constant_count; ++i)
    values.push_back({static_cast<int>(constants[2 * i]), constants[2 * i + 1]});
  jml::Size3 size{grid[0], grid[1], grid[2]};
  if (r == nullptr) {
    error = std::string("sim: no kernel named ") + kernel + " in this library";
  } else if (jml::Status bad = sim::validate(*r, caps, size, {threads, 1, 1}, bound, p)) {
    error = *bad;
  } else {
    outcome = sim::run(*r, values, size, {threads, 1, 1}, bound, p,
                       {checked, options->shuffle != 0, options->seed, 16}, written);
  }
  std::string json = "{\"error\": " + (error.empty() ? "null" : sim::quoted(error)) +
                     ", \"suppressed\": " + std::to_string(outcome.suppressed) +
                     ", \"findings\": [";
  for (size_t i = 0; i < outcome.findings.size(); ++i) {
    const sim::Finding& f = outcome.findings[i];
    json += std::string(i ? ", " : "") + "{\"kind\": " + sim::quoted(f.kind) +
            ", \"line\": " + std::to_string(f.line) +
            ", \"other_line\": " + std::to_string(f.other_line) +
            ", \"text\": " + sim::quoted(f.text) + "}";
  }
  return sim::copied(json + "]}");
}

__attribute__((visibility("default"))) void jml_sim_free(char* p) { std::free(p); }

}  // extern "C"
