// Limits of GPUs, as published. Nothing here was measured by us, and nothing was run on Apple GPUs.
//
// Apple, families 7 (M1), 8 (M2), 9 (M3, M4) and 10 (M5). Metal Feature Set Tables:
//   threads a threadgroup 1024; threadgroup memory 32 KB; entries of the buffer argument table 31;
//   bytes of setBytes 4096. The same in all four families.
// SIMD width: not in those tables; pipelines report threadExecutionWidth 32 on every Apple GPU.
// Work of a submission: macOS stops a GPU program after some seconds; how many is not published.
// Two
//   tenths of a core's peak of 0.3 TFLOP/s, for a tenth of a second: far off, and 100 submissions a
//   second cost nothing.
// Cores: Apple's technical specifications, the largest configuration of each chip.
// Shuffles: not published by Apple; 256 bytes = 64 lanes a clock and core in
//   github.com/philipturner/metal-benchmarks (M1), taken for the later families too.
// Registers a thread: not published; a pipeline may therefore allow fewer threads than 1024.
//
// NVIDIA, compute capability 8.0 (A100) and 9.0 (H200). CUDA C++ Programming Guide:
//   threads a block 1024, warp 32, shared memory a block 163 KB and 227 KB (beyond 48 KB by
//   opting in), bytes of kernel parameters 32764 (CUDA 12.1), warp shuffles 32 lanes a clock and
//   multiprocessor, 255 registers a thread. A number of buffers is not limited apart from the
//   parameters' bytes. 64-bit floating point in all of them; Metal has no such type.
// "nvidia" is what every GPU of compute capability 7.5 and later has without opting in.
// Multiprocessors: NVIDIA's A100 and H200 data sheets (108, 132).
#include "csrc/caps.h"

#include "csrc/json.h"

namespace jml {
namespace {

Caps apple(const char* name, int family, int64_t cores) {
  Caps c;
  c.name = name;
  c.device = "metal";
  c.family = "apple" + std::to_string(family);
  c.simd_width = 32;
  c.max_threads_per_threadgroup = 1024;
  c.max_threadgroup_bytes = 32768;
  c.max_buffers = 31;
  c.max_params_bytes = 4096;
  c.cores = cores;
  c.shuffle_lanes = 64;
  c.max_submission_work = 6e9 * double(cores);
  return c;
}

// 0 multiprocessors: not known.
Caps nvidia(const char* name, const char* family, int64_t cores, int64_t shared_bytes) {
  Caps c;
  c.name = name;
  c.device = "cuda";
  c.family = family;
  c.simd_width = 32;
  c.max_threads_per_threadgroup = 1024;
  c.max_threadgroup_bytes = shared_bytes;
  c.max_params_bytes = 32764;
  c.max_buffers = c.max_params_bytes / int64_t(sizeof(void*));
  c.async = true;
  c.float64 = true;
  c.cores = cores;
  c.shuffle_lanes = 32;
  c.registers = 255;
  return c;
}

}  // namespace

const std::vector<Caps>& all_caps() {
  static const std::vector<Caps> rows = {
      apple("apple-m1", 7, 8),
      apple("apple-m1-pro", 7, 16),
      apple("apple-m1-max", 7, 32),
      apple("apple-m1-ultra", 7, 64),
      apple("apple-m2", 8, 10),
      apple("apple-m2-pro", 8, 19),
      apple("apple-m2-max", 8, 38),
      apple("apple-m2-ultra", 8, 76),
      apple("apple-m3", 9, 10),
      apple("apple-m3-pro", 9, 18),
      apple("apple-m3-max", 9, 40),
      apple("apple-m3-ultra", 9, 80),
      apple("apple-m4", 9, 10),
      apple("apple-m4-pro", 9, 20),
      apple("apple-m4-max", 9, 40),
      apple("apple-m5", 10, 10),
      nvidia("nvidia", "sm_75 and later", 0, 48 * 1024),
      nvidia("nvidia-a100", "sm_80", 108, 163 * 1024),
      nvidia("nvidia-h200", "sm_90", 132, 227 * 1024),
  };
  return rows;
}

const Caps* find_caps(const std::string& name) {
  for (const Caps& c : all_caps()) {
    if (c.name == name) return &c;
  }
  return nullptr;
}

const Caps& caps_of_cuda_gpu(const std::string& product) {
  auto has = [&](const char* word) { return product.find(word) != std::string::npos; };
  return *find_caps(has("H200") ? "nvidia-h200" : has("A100") ? "nvidia-a100" : "nvidia");
}

std::string caps_names() {
  std::string text;
  for (const Caps& c : all_caps()) text += (text.empty() ? "" : ", ") + c.name;
  return text;
}

std::string caps_json() {
  std::string text;
  for (const Caps& c : all_caps()) {
    JsonWriter w;
    w.field("name", c.name)
        .field("device", c.device)
        .field("family", c.family)
        .field("simd_width", c.simd_width)
        .field("max_threads_per_threadgroup", c.max_threads_per_threadgroup)
        .field("max_threadgroup_bytes", c.max_threadgroup_bytes)
        .field("max_buffers", c.max_buffers)
        .field("max_params_bytes", c.max_params_bytes)
        .field("float64", c.float64)
        .field("cores", c.cores)
        .field("shuffle_lanes", c.shuffle_lanes)
        .field("registers", c.registers)
        .field("max_submission_work", int64_t(c.max_submission_work));
    text += (text.empty() ? "" : ", ") + w.text();
  }
  return "[" + text + "]";
}

}  // namespace jml
