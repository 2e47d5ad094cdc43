// Programs that break one rule of Metal or of Cocoa each; the framework must end them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/metal_sim/objc.h"

extern "C" void objc_msgSend();
extern "C" sim::Object* MTLCreateSystemDefaultDevice();

namespace {

using sim::Object;
struct Size {
  uint64_t width, height, depth;
};

template <typename R = Object*, typename... Args>
R send(Object* o, const char* selector, Args... args) {
  using F = R (*)(Object*, sim::Sel, Args...);
  return reinterpret_cast<F>(&objc_msgSend)(o, sim::intern(selector), args...);
}

Object* make(const char* name);
Object* safe_options() {
  Object* options = make("MTLCompileOptions");
  send<void>(options, "setLanguageVersion:", uint64_t{3} << 16 | 1);
  send<void>(options, "setMathMode:", int64_t{0});
  return options;
}

struct Program {
  Object* pool = nullptr;
  Object* device = nullptr;
  Object* pipeline = nullptr;
  Object* queue = nullptr;
  Object* commands = nullptr;
  Object* encoder = nullptr;

  void encode() {
    Object* error = nullptr;
    Object* options = safe_options();
    auto* source =
        new sim::String("#include <metal_stdlib>\n[[host_name(\"svd_xor_vectors_f32_n16\")]]");
    Object* library =
        send(device, "newLibraryWithSource:options:error:", static_cast<Object*>(source), options,
             &error);
    auto* name = new sim::String("svd_xor_vectors_f32_n16");
    Object* function = send(library, "newFunctionWithName:", static_cast<Object*>(name));
    Object* wanted = make("MTLComputePipelineDescriptor");
    send<void>(wanted, "setComputeFunction:", function);
    pipeline =
        send(device, "newComputePipelineStateWithDescriptor:options:reflection:error:", wanted,
             uint64_t{0}, static_cast<void*>(nullptr), &error);
    queue = send(device, "newCommandQueue");
    commands = send(queue, "commandBuffer");
    encoder = send(commands, "computeCommandEncoder");
  }

  void dispatch(uint64_t threads, uint64_t groups = 1) {
    send<void>(encoder, "dispatchThreadgroups:threadsPerThreadgroup:", Size{groups, 1, 1},
               Size{threads, 1, 1});
  }
  void bind(Object* buffer, uint64_t index, uint64_t offset = 0) {
    send<void>(encoder, "setBuffer:offset:atIndex:", buffer, offset, index);
  }
  Object* buffer(uint64_t bytes) {
    return send(device, "newBufferWithLength:options:", bytes, uint64_t{0});
  }
  Object* around(void* memory, uint64_t bytes) {
    return send(device, "newBufferWithBytesNoCopy:length:options:deallocator:", memory, bytes,
                uint64_t{0}, static_cast<void*>(nullptr));
  }
};

}  // namespace

extern "C" void* objc_lookUpClass(const char* name);

namespace {

Object* make(const char* name) {
  return send(send(static_cast<Object*>(objc_lookUpClass(name)), "alloc"), "init");
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void jml_metal_sim_misuse(const char* which) {
  const std::string misuse = which;
  Program p;
  if (misuse != "no_pool") p.pool = make("NSAutoreleasePool");
  p.device = MTLCreateSystemDefaultDevice();
  if (misuse == "unknown") send<void>(p.device, "frobnicate");
  if (misuse == "nil") send<void>(nullptr, "name");
  if (misuse == "no_pool") send<void>(p.device, "name");
  if (misuse == "released" || misuse == "twice") {
    send<void>(p.device, "release");
    send<void>(p.device, misuse == "twice" ? "release" : "name");
  }
  if (misuse == "pool_order") {
    Object* inner = make("NSAutoreleasePool");
    send<void>(p.pool, "release");
    send<void>(inner, "release");
  }
  if (misuse == "empty_buffer") p.buffer(0);
  static char memory[3 << 14];
  char* pages = memory + (16384 - reinterpret_cast<uintptr_t>(memory) % 16384);
  if (misuse == "part_of_a_page") p.around(pages, 100);
  if (misuse == "ignored_error") {
    send(p.device, "newLibraryWithSource:options:error:",
         static_cast<Object*>(new sim::String("kernel void f")), safe_options(),
         static_cast<void*>(nullptr));
  }
  if (misuse == "untracked") {
    send(p.device, "newBufferWithLength:options:", uint64_t{64}, uint64_t{256});
  }
  if (misuse == "fast_math") {
    Object* error = nullptr;
    Object* options = make("MTLCompileOptions");
    send<void>(options, "setLanguageVersion:", uint64_t{3} << 16 | 1);
    send(p.device, "newLibraryWithSource:options:error:",
         static_cast<Object*>(new sim::String("#include <metal_stdlib>")), options, &error);
  }
  p.encode();
  if (misuse == "no_pipeline") p.dispatch(64);
  send<void>(p.encoder, "setComputePipelineState:", p.pipeline);
  if (misuse == "left_by_another") {
    // Bound for one kernel, read by the next.
    for (uint64_t i = 0; i < 7; ++i) p.bind(p.buffer(16384), i);
    send<void>(p.encoder, "setComputePipelineState:", p.pipeline);
    p.dispatch(64);
  }
  if (misuse == "two_encoders") send(p.commands, "computeCommandEncoder");
  if (misuse == "high_index") p.bind(p.buffer(64), 31);
  if (misuse == "null_buffer") p.bind(nullptr, 0);
  if (misuse == "wrong_class") p.bind(p.device, 0);
  if (misuse == "gone_argument") {
    Object* b = p.buffer(64);
    send<void>(b, "release");
    p.bind(b, 0);
  }
  if (misuse == "big_bytes") {
    send<void>(p.encoder, "setBytes:length:atIndex:", static_cast<const void*>(memory),
               uint64_t{4100}, uint64_t{7});
  }
  if (misuse == "odd_memory") {
    send<void>(p.encoder, "setThreadgroupMemoryLength:atIndex:", uint64_t{24}, uint64_t{0});
  }
  if (misuse == "empty_grid") p.dispatch(64, 0);
  if (misuse == "odd_threads") p.dispatch(40);
  if (misuse == "untracked_hazard") {
    p.bind(p.around(pages, 16384), 0);  // read
    p.bind(p.around(pages, 16384), 1);  // written
    p.dispatch(64);
  }
  if (misuse == "touched_in_flight") {
    Object* b = p.buffer(64);
    p.bind(b, 0);
    p.dispatch(64);
    send(b, "contents");
  }
  if (misuse == "no_end") send<void>(p.pool, "release");
  if (misuse == "open_commit") send<void>(p.commands, "commit");
  if (misuse == "threads") p.dispatch(2048);
  if (misuse == "memory") {
    send<void>(p.encoder, "setThreadgroupMemoryLength:atIndex:", uint64_t{32768 + 16}, uint64_t{0});
    p.dispatch(64);
  }
  if (misuse == "offset" || misuse == "freed_in_flight") {
    Object* b = p.buffer(16384);
    p.bind(b, 0, misuse == "offset" ? 16384 : 0);
    p.dispatch(64);
    // Once for ours, once for the command buffer's.
    send<void>(b, "release");
    send<void>(b, "release");
  }
  if (misuse == "unbound") p.dispatch(64);
  send<void>(p.encoder, "endEncoding");
  if (misuse == "early_wait") send<void>(p.commands, "waitUntilCompleted");
  if (misuse == "after_end") p.dispatch(64);
  send<void>(p.commands, "commit");
  if (misuse == "late_encoder") send(p.commands, "computeCommandEncoder");
  if (misuse == "two_commits") send<void>(p.commands, "commit");
  send<void>(p.commands, "waitUntilCompleted");
}
