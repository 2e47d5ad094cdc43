// What a kernel compiled for the simulator calls while it runs. Included by kernels/msl_sim.h and
// by csrc/device_sim.cc. Free of <cmath> and the like, whose names would mix with MSL's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jml::sim {

enum class ArgKind : int { buffer_, params_, threadgroup_ };

// One argument of a kernel's signature that the host binds.
struct Arg {
  const char* name;
  ArgKind kind;
  int index;
  bool read_only;
  size_t element_bytes;
};

// Adds a kernel while the library that holds it is loaded.
struct KernelRegistration {
  KernelRegistration(int checked, const char* name, const char* file, int line, void (*entry)(),
                     const Arg* args, int arg_count, int max_threads);
  ~KernelRegistration();
  KernelRegistration(const KernelRegistration&) = delete;
  KernelRegistration& operator=(const KernelRegistration&) = delete;
  int checked;
  const char* name;
  const char* file;
  int line;
  void (*entry)();
  const Arg* args;
  int arg_count;
  int max_threads;  // max_total_threads_per_threadgroup, or 0
};

// A function constant of a kernel file.
struct ConstantRegistration {
  ConstantRegistration(int checked, const char* name, int index, void* data, size_t bytes);
  ~ConstantRegistration();
  ConstantRegistration(const ConstantRegistration&) = delete;
  ConstantRegistration& operator=(const ConstantRegistration&) = delete;
  int checked;
  const char* name;
  int index;
  void* data;
  size_t bytes;
};

struct Allocation;

struct Bound {
  void* data = nullptr;
  Allocation* allocation = nullptr;
};

// Arguments of the running launch.
Bound bound_buffer(int index);
Bound bound_threadgroup(int index);
const void* bound_params(int index);

enum class Id : int {
  threadgroup_position_in_grid_,
  threadgroups_per_grid_,
  threads_per_threadgroup_,
  simdgroups_per_threadgroup_,
  threads_per_simdgroup_,
  simdgroup_index_in_threadgroup_,
  thread_index_in_simdgroup_,
  thread_index_in_threadgroup_,
  thread_position_in_threadgroup_,
  thread_position_in_grid_,
};
uint32_t id(Id which, int dimension);

// False if the access must not be made; the finding is noted.
bool check_read(Allocation* allocation, const void* p, size_t bytes, int line);
bool check_write(Allocation* allocation, const void* p, size_t bytes, int line);

enum class Meet : int { shuffle_, vote_, reduce_, matrix_, simdgroup_barrier_ };

// Waits until all lanes of the simdgroup came here; returns what each lane brought.
const uint64_t* meet(Meet what, uint64_t value, int line);
void note_lane(uint32_t lane, int line);  // a shuffle's source lane must exist
// flags: 1 device memory, 2 threadgroup memory.
void simdgroup_barrier(int flags, int line);
void threadgroup_barrier(int flags, int line);

// An index outside of an array in registers; does not return.
[[noreturn]] void array_out_of_bounds(int line, long long index);

}  // namespace jml::sim
