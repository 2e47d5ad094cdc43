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

struct Program {
  Object* pool = nullptr;
  Object* device = nullptr;
  Object* pipeline = nullptr;
  Object* queue = nullptr;
  Object* commands = nullptr;
  Object* encoder = nullptr;

  void encode() {
    Object* error = nullptr;
    Object* options = make("MTLCompileOptions");
    send<void>(options, "setLanguageVersion:", uint64_t{3} << 16 | 1);
    send<void>(options, "setMathMode:", int64_t{0});
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
    send<void>(encoder, "setComputePipelineState:", pipeline);
  }

  void dispatch(uint64_t threads) {
    send<void>(encoder, "dispatchThreadgroups:threadsPerThreadgroup:", Size{1, 1, 1},
               Size{threads, 1, 1});
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
  if (misuse == "no_end") send<void>(p.pool, "release");
  if (misuse == "open_commit") send<void>(p.commands, "commit");
  if (misuse == "threads") p.dispatch(2048);
  if (misuse == "memory") {
    send<void>(p.encoder, "setThreadgroupMemoryLength:atIndex:", uint64_t{32768 + 16}, uint64_t{0});
    p.dispatch(64);
  }
  if (misuse == "offset" || misuse == "freed_in_flight") {
    Object* b = send(p.device, "newBufferWithLength:options:", uint64_t{16384}, uint64_t{0});
    send<void>(p.encoder, "setBuffer:offset:atIndex:", b, uint64_t(misuse == "offset" ? 16384 : 0),
               uint64_t{0});
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
  if (misuse == "two_commits") send<void>(p.commands, "commit");
  send<void>(p.commands, "waitUntilCompleted");
}
