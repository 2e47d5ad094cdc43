// The Metal classes that csrc/device_metal.cc uses, by selector. The GPU behind them is the
// checking simulator, on a thread of its own from commit on. Rules are those of Apple's
// documentation and of its API validation; breaking one ends the process. What may go wrong on a
// sound program is an injected fault and comes back as Metal reports it.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "csrc/caps.h"
#include "csrc/device.h"
#include "csrc/device_metal.h"
#include "csrc/metal_text.h"
#include "tests/metal_sim/objc.h"

namespace sim {
namespace {

struct Size {
  uint64_t width, height, depth;
};

// What the "GPU" did and was told.
struct Count {
  std::atomic<int64_t> value{0};
  void operator+=(int64_t more) { value.fetch_add(more, std::memory_order_relaxed); }
  void operator++() { *this += 1; }
  operator int64_t() const { return value.load(std::memory_order_relaxed); }
};
struct Totals {
  Count committed, dispatches, archive_hits, library_files, waits;
  std::atomic<bool> stub{false}, fast{false};
};
Totals& totals() {
  static Totals t;
  return t;
}

void set_error(Object** out, Error* error) {
  if (out == nullptr) fail("an error that nobody looks at: " + error->description);
  *out = autorelease(error);
}

#define JML_TYPE(function, name)        \
  Type& function() {                    \
    static auto* type = new Type(name); \
    return *type;                       \
  }
JML_TYPE(device_type, "MTLDevice")
JML_TYPE(queue_type, "MTLCommandQueue")
JML_TYPE(commands_type, "MTLCommandBuffer")
JML_TYPE(encoder_type, "MTLComputeCommandEncoder")
JML_TYPE(buffer_type, "MTLBuffer")
JML_TYPE(library_type, "MTLLibrary")
JML_TYPE(function_type, "MTLFunction")
JML_TYPE(pipeline_type, "MTLComputePipelineState")
JML_TYPE(options_type, "MTLCompileOptions")
JML_TYPE(options14_type, "MTLCompileOptions of macOS 14")
JML_TYPE(values_type, "MTLFunctionConstantValues")
JML_TYPE(wanted_type, "MTLComputePipelineDescriptor")
JML_TYPE(archive_type, "MTLBinaryArchive")
JML_TYPE(at_type, "MTLBinaryArchiveDescriptor")
#undef JML_TYPE

struct Device : Object {
  Device() : Object(device_type()) {}
};

// What the GPU has or will get, until it is done with it.
struct InFlight {
  std::mutex mutex;
  std::multiset<struct Buffer*> read, written;
};
InFlight& in_flight() {
  static auto* f = new InFlight;
  return *f;
}

struct Buffer : Object {
  Buffer(void* memory, uint64_t bytes, bool own)
      : Object(buffer_type()), data(memory), length(bytes), owned(own) {}
  ~Buffer() override {
    if (busy()) fail(text() + " goes while the GPU uses it");
    if (owned) std::free(data);
  }
  bool busy() {
    QuietHold<std::mutex> hold(in_flight().mutex);
    return in_flight().read.count(this) + in_flight().written.count(this) != 0;
  }
  bool overlaps(const Buffer& other) const {
    auto *a = static_cast<char*>(data), *b = static_cast<char*>(other.data);
    return a < b + other.length && b < a + length;
  }
  void* data;
  uint64_t length;
  bool owned;
};

// Metal orders what dispatches do to one buffer; of two around the same memory it knows nothing.
void begin_use(Buffer* b, bool writes) {
  InFlight& f = in_flight();
  QuietHold<std::mutex> hold(f.mutex);
  auto clash = [&](const std::multiset<Buffer*>& others) {
    for (Buffer* other : others) {
      if (other != b && other->overlaps(*b))
        fail(b->text() + " and " + other->text() +
             " share memory that one of them writes: a hazard that Metal does not track");
    }
  };
  clash(f.written);
  if (writes) clash(f.read);
  (writes ? f.written : f.read).insert(b);
}
void end_use(Buffer* b, bool writes) {
  {
    InFlight& f = in_flight();
    QuietHold<std::mutex> hold(f.mutex);
    auto& uses = writes ? f.written : f.read;
    uses.erase(uses.find(b));
  }
  release(b);
}

// The row of the table that csrc/device_metal.cc compiles from, null for a kernel that is not ours.
const jml::MetalKernelText* kernel_row(const std::string& name) {
  for (const jml::MetalKernelText* k = jml::metal_kernels; k->kernel != nullptr; ++k) {
    if (name == k->kernel) return k;
  }
  return nullptr;
}
// What is wrong with the function constants of a kernel, or "".
std::string check_constants(const std::string& name,
                            const std::map<int, std::pair<std::string, int64_t>>& given) {
  const jml::MetalKernelText* row = kernel_row(name);
  if (row == nullptr) return "";
  for (const jml::MetalConstantText* c = jml::metal_constants; c->file != nullptr; ++c) {
    if (std::strcmp(c->file, row->file) != 0) continue;
    auto it = given.find(c->index);
    if (it == given.end())
      return "function constant " + std::to_string(c->index) + " of " + name + " has no value";
    if (it->second.first != c->type)
      fail("setConstantValue: " + it->second.first + " for the " + c->type + " at " +
           std::to_string(c->index));
  }
  return "";
}

struct Options : Object {
  explicit Options(Type& type) : Object(type) {}
  uint64_t version = 0;
  bool safe = false;
};
struct Values : Object {
  Values() : Object(values_type()) {}
  std::map<int, std::pair<std::string, int64_t>> values;  // type and bits
};
struct Library : Object {
  Library() : Object(library_type()) {}
  std::vector<std::string> functions;
  bool any = false;  // from a file
};
struct Function : Object {
  Function() : Object(function_type()) {}
  std::string name;
  std::map<int, std::pair<std::string, int64_t>> constants;
};
struct Archive : Object {
  Archive() : Object(archive_type()) {}
  std::vector<std::string> functions;
};
struct ArchiveAt : Object {
  ArchiveAt() : Object(at_type()) {}
  ~ArchiveAt() override {
    if (url != nullptr) release(url);
  }
  Url* url = nullptr;
};
struct Wanted : Object {
  Wanted() : Object(wanted_type()) {}
  ~Wanted() override {
    if (function != nullptr) release(function);
    if (archives != nullptr) release(archives);
  }
  Function* function = nullptr;
  Array* archives = nullptr;
};
struct Pipeline : Object {
  Pipeline() : Object(pipeline_type()) {}
  std::string function;
  std::vector<jml::ConstantValue> constants;
  uint64_t width = 32, most = 1024;
};

struct Dispatch {
  Pipeline* pipeline;
  Size grid, group;
  struct Bound {
    Buffer* buffer;
    uint64_t offset;
    bool writes;
  };
  std::map<uint64_t, Bound> buffers;
  std::map<uint64_t, std::string> bytes;
  std::map<uint64_t, uint64_t> threadgroup;
};

enum Status : uint64_t { kNew = 0, kCommitted = 2, kCompleted = 4, kError = 5 };

struct Queue;
struct Commands : Object {
  explicit Commands(Queue* q);
  ~Commands() override;
  Queue* queue;
  bool encoding = false;
  std::vector<Dispatch> dispatches;
  std::mutex mutex;
  std::condition_variable done;
  std::atomic<Status> status{kNew};
  Error* error = nullptr;
};

// The GPU's side of a queue, which its thread may be the last to see.
struct Work {
  void run();
  std::string run(const Dispatch& d);
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Commands*> waiting;
  bool ending = false;
  std::unique_ptr<jml::Device> gpu;
  std::map<std::string, const jml::Kernel*> kernels;
};

struct Queue : Object {
  Queue() : Object(queue_type()), worker([work = work] { work->run(); }) {}
  ~Queue() override {
    {
      std::lock_guard<std::mutex> hold(work->mutex);
      work->ending = true;
    }
    work->wake.notify_all();
    // The last reference may be the worker's own, of a command buffer that it just finished.
    if (worker.get_id() == std::this_thread::get_id())
      worker.detach();
    else
      worker.join();
  }
  std::shared_ptr<Work> work = std::make_shared<Work>();
  std::thread worker;
};

struct Encoder : Object {
  explicit Encoder(Commands* c) : Object(encoder_type()), commands(retain(c)) {}
  ~Encoder() override {
    if (!ended) fail(text() + " goes without endEncoding");
    release(commands);
  }
  Commands* commands;
  bool ended = false;
  Dispatch now{};
  std::map<uint64_t, uint64_t> memory;  // of every pipeline so far: it stays set
};

Commands::Commands(Queue* q) : Object(commands_type()), queue(retain(q)) {}
Commands::~Commands() {
  for (Dispatch& d : dispatches) {
    release(d.pipeline);
    for (auto& [index, b] : d.buffers) {
      if (status == kNew) end_use(b.buffer, b.writes);
    }
  }
  if (error != nullptr) release(error);
  release(queue);
}

// ---- MTLDevice ----

Object* name(Object*, Sel) {
  const char* own = std::getenv("JML_METAL_SIM_GPU");
  return autorelease(new String(own != nullptr ? own : "Apple M1 Pro"));
}
bool supports(Object*, Sel, int64_t family) {
  const char* own = std::getenv("JML_METAL_SIM_FAMILY");
  return family >= 1001 && family <= 1000 + (own != nullptr ? std::atoi(own) : 7);
}
bool unified(Object*, Sel) { return true; }
uint64_t threadgroup_memory(Object*, Sel) { return 32768; }
uint64_t working_set(Object*, Sel) { return uint64_t{16} << 30; }

Object* new_queue(Object*, Sel) { return fault("queue") ? nullptr : new Queue; }

void check_options(uint64_t options) {
  if (options != 0) fail("resource options: expected shared storage with tracked hazards (0)");
}

Object* new_buffer(Object*, Sel, uint64_t length, uint64_t options) {
  check_options(options);
  if (length == 0) fail("newBufferWithLength: of 0 bytes");
  if (fault("buffer")) return nullptr;
  void* data = std::aligned_alloc(4096, (length + 4095) / 4096 * 4096);
  if (data == nullptr) return nullptr;
  std::memset(data, 0xff, length);  // NaN, so that what was never written is seen
  return new Buffer(data, length, true);
}

Object* new_buffer_around(Object*, Sel, void* data, uint64_t length, uint64_t options,
                          void* deallocator) {
  check_options(options);
  if (deallocator != nullptr) fail("newBufferWithBytesNoCopy: deallocators are not simulated");
  const auto page = uint64_t(jml_metal_sim_sysconf(_SC_PAGESIZE));
  if (reinterpret_cast<uintptr_t>(data) % page != 0 || length % page != 0 || length == 0)
    fail("newBufferWithBytesNoCopy: expected whole pages, got " + std::to_string(length) +
         " bytes");
  if (fault("no_copy")) return nullptr;
  return new Buffer(data, length, false);
}

// The names of the kernels in a text, or what is wrong with it.
std::string read_source(const std::string& source, std::vector<std::string>* names) {
  if (source.find("#include <metal_stdlib>") == std::string::npos)
    return "program_source:1:1: error: unknown type name 'kernel'";
  int64_t depth = 0;
  for (char c : source) depth += c == '{' ? 1 : c == '}' ? -1 : 0;
  if (depth != 0) return "program_source:1:1: error: expected '}'";
  const std::string host = "host_name(\"";
  for (size_t at = source.find(host); at != std::string::npos; at = source.find(host, at + 1)) {
    const size_t start = at + host.size();
    names->push_back(source.substr(start, source.find('"', start) - start));
  }
  const std::string kernel = "[[kernel";
  for (size_t at = source.find(kernel); at != std::string::npos; at = source.find(kernel, at + 1)) {
    const size_t before = source.find_last_not_of(" \n\t", at - 1);
    if (source[before] == '>' || source[before] == ']') continue;  // of a template
    const size_t word = source.find("void ", at);
    const size_t end = source.find('(', word);
    if (end != std::string::npos) names->push_back(source.substr(word + 5, end - word - 5));
  }
  return "";
}

Object* new_library(Object*, Sel, String* source, Options* options, Object** error) {
  if (options == nullptr || options->version < ((3u << 16) | 1u))
    fail("newLibraryWithSource: bfloat needs language version 3.1");
  if (!options->safe) fail("newLibraryWithSource: expected the safe math mode");
  auto made = std::make_unique<Library>();
  std::string wrong = read_source(source->value, &made->functions);
  if (fault("compile")) wrong = "program_source:12:3: error: use of undeclared identifier 'quux'";
  if (!wrong.empty()) {
    release(made.release());
    set_error(error, new Error("MTLLibraryErrorDomain", 3, wrong));
    return nullptr;
  }
  return made.release();
}

Object* new_library_file(Object*, Sel, Url* url, Object** error) {
  expect(url, "NSURL", "newLibraryWithURL:");
  std::ifstream in(url->path);
  std::string first;
  if (!std::getline(in, first) || first != "simulated metallib") {
    set_error(error, new Error("MTLLibraryErrorDomain", 1, "Invalid library file"));
    return nullptr;
  }
  ++totals().library_files;
  auto* made = new Library;
  made->any = true;
  return made;
}

Object* new_archive(Object*, Sel, ArchiveAt* at, Object** error) {
  expect(at, "MTLBinaryArchiveDescriptor", "newBinaryArchiveWithDescriptor:");
  auto made = std::make_unique<Archive>();
  if (at->url != nullptr) {
    std::ifstream in(at->url->path);
    std::string line;
    if (!std::getline(in, line) || line != "simulated archive") {
      release(made.release());
      set_error(error, new Error("MTLBinaryArchiveDomain", 1, "Invalid archive file"));
      return nullptr;
    }
    while (std::getline(in, line)) made->functions.push_back(line);
  } else if (fault("archive")) {
    release(made.release());
    set_error(error, new Error("MTLBinaryArchiveDomain", 4, "Internal error"));
    return nullptr;
  }
  return made.release();
}

Object* new_pipeline(Object*, Sel, Wanted* wanted, uint64_t, void*, Object** error) {
  expect(wanted, "MTLComputePipelineDescriptor", "newComputePipelineStateWithDescriptor:");
  if (wanted->function == nullptr) fail("a pipeline of no function");
  const std::string missing = check_constants(wanted->function->name, wanted->function->constants);
  if (!missing.empty()) {
    set_error(error, new Error("AGXMetal", 3, missing));
    return nullptr;
  }
  if (fault("pipeline")) {
    set_error(error, new Error("AGXMetal", 2, "Compiler encountered an internal error"));
    return nullptr;
  }
  if (wanted->archives != nullptr) {
    for (Object* a : wanted->archives->items) {
      for (const std::string& f : static_cast<Archive*>(a)->functions)
        totals().archive_hits += f == wanted->function->name;
    }
  }
  auto* made = new Pipeline;
  made->function = wanted->function->name;
  for (const auto& [index, value] : wanted->function->constants)
    made->constants.push_back({index, value.second});
  if (fault("width")) made->width = 16;
  if (fault("registers")) made->most = 32;
  return made;
}

// ---- libraries, functions, pipelines ----

Object* make_options() { return new Options(fault("macos14") ? options14_type() : options_type()); }
void set_version(Options* o, Sel, uint64_t version) { o->version = version; }
void set_math(Options* o, Sel, int64_t mode) { o->safe = mode == 0; }
void set_fast(Options* o, Sel, bool fast) { o->safe = !fast; }

void set_value(Values* v, Sel, const void* value, uint64_t data_type, uint64_t index) {
  struct Type {
    uint64_t number;
    const char* name;
    size_t bytes;
  };
  constexpr Type kTypes[] = {{3, "float", 4},  {16, "half", 2},   {29, "int", 4}, {33, "uint", 4},
                             {37, "short", 2}, {41, "ushort", 2}, {53, "bool", 1}};
  for (const Type& type : kTypes) {
    if (type.number != data_type) continue;
    int64_t bits = 0;
    std::memcpy(&bits, value, type.bytes);
    v->values[int(index)] = {type.name, bits};
    return;
  }
  fail("setConstantValue: of data type " + std::to_string(data_type));
}

Object* function_of(Library* library, const std::string& name) {
  if (fault("function")) return nullptr;
  bool known = library->any;
  for (const std::string& f : library->functions) known = known || f == name;
  if (!known) return nullptr;
  auto* f = new Function;
  f->name = name;
  return f;
}
Object* new_function(Library* l, Sel, String* name) {
  expect(name, "NSString", "newFunctionWithName:");
  return function_of(l, name->value);
}
Object* new_function_with(Library* l, Sel, String* name, Values* values, Object** error) {
  expect(name, "NSString", "newFunctionWithName:");
  expect(values, "MTLFunctionConstantValues", "newFunctionWithName:constantValues:");
  auto* f = static_cast<Function*>(function_of(l, name->value));
  if (f != nullptr)
    f->constants = values->values;
  else
    set_error(error, new Error("MTLLibraryErrorDomain", 5, "Function not found"));
  return f;
}

void set_function(Wanted* w, Sel, Function* f) {
  expect(f, "MTLFunction", "setComputeFunction:");
  w->function = retain(f);
}
void set_archives(Wanted* w, Sel, Array* a) {
  expect(a, "NSArray", "setBinaryArchives:");
  w->archives = retain(a);
}
void set_multiple(Wanted*, Sel, bool) {}
void set_url(ArchiveAt* at, Sel, Url* url) {
  expect(url, "NSURL", "setUrl:");
  at->url = retain(url);
}
uint64_t width(Pipeline* p, Sel) { return p->width; }
uint64_t most(Pipeline* p, Sel) { return p->most; }

bool add_pipeline(Archive* a, Sel, Wanted* wanted, Object**) {
  a->functions.push_back(wanted->function->name);
  return true;
}
bool serialize(Archive* a, Sel, Url* url, Object** error) {
  expect(url, "NSURL", "serializeToURL:");
  std::ofstream out(url->path);
  out << "simulated archive\n";
  for (const std::string& f : a->functions) out << f << "\n";
  out.close();
  if (out) return true;
  set_error(error, new Error("MTLBinaryArchiveDomain", 1, "cannot write"));
  return false;
}

// ---- commands ----

Object* command_buffer(Queue* q, Sel) {
  return fault("command_buffer") ? nullptr : autorelease(new Commands(q));
}
Object* compute_encoder(Commands* c, Sel) {
  if (c->encoding) fail(c->text() + ": a second encoder before the first has ended");
  if (c->status != kNew) fail(c->text() + ": an encoder after commit");
  if (fault("encoder")) return nullptr;
  c->encoding = true;
  return autorelease(new Encoder(c));
}

void check_open(Encoder* e, const char* what) {
  if (e->ended) fail(e->text() + ": " + what + " after endEncoding");
}
void set_pipeline(Encoder* e, Sel, Pipeline* p) {
  check_open(e, "setComputePipelineState:");
  expect(p, "MTLComputePipelineState", "setComputePipelineState:");
  // With Apple, what was bound stays bound. Kernels must not count on what others left there.
  e->now = Dispatch{};
  e->now.pipeline = p;
}
void set_buffer(Encoder* e, Sel, Buffer* b, uint64_t offset, uint64_t index) {
  check_open(e, "setBuffer:offset:atIndex:");
  if (index > 30) fail(e->text() + ": buffer index " + std::to_string(index) + " above 30");
  if (b == nullptr) fail(e->text() + ": null bound at " + std::to_string(index));
  expect(b, "MTLBuffer", "setBuffer:offset:atIndex:");
  if (offset >= b->length)
    fail(e->text() + ": offset " + std::to_string(offset) + " is outside of " + b->text());
  e->now.bytes.erase(index);
  e->now.buffers[index] = {b, offset, false};
}
void set_bytes(Encoder* e, Sel, const void* bytes, uint64_t length, uint64_t index) {
  check_open(e, "setBytes:length:atIndex:");
  if (length == 0 || length > 4096)
    fail(e->text() + ": setBytes: of " + std::to_string(length) + " bytes");
  e->now.buffers.erase(index);
  e->now.bytes[index] = std::string(static_cast<const char*>(bytes), length);
}
void set_threadgroup(Encoder* e, Sel, uint64_t length, uint64_t index) {
  check_open(e, "setThreadgroupMemoryLength:atIndex:");
  if (length == 0 || length % 16 != 0)
    fail(e->text() + ": threadgroup memory of " + std::to_string(length) +
         " bytes: expected a multiple of 16");
  e->now.threadgroup[index] = length;
  e->memory[index] = length;
}
void dispatch(Encoder* e, Sel, Size grid, Size group) {
  check_open(e, "dispatchThreadgroups:threadsPerThreadgroup:");
  if (e->now.pipeline == nullptr) fail(e->text() + ": a dispatch without a pipeline");
  expect(e->now.pipeline, "MTLComputePipelineState", "the pipeline of a dispatch");
  const uint64_t threads = group.width * group.height * group.depth;
  if (threads == 0 || threads > e->now.pipeline->most)
    fail(e->text() + ": " + std::to_string(threads) + " threads exceed the pipeline's " +
         std::to_string(e->now.pipeline->most));
  if (threads % e->now.pipeline->width != 0)
    fail(e->text() + ": " + std::to_string(threads) + " threads are no whole simdgroups");
  if (grid.width * grid.height * grid.depth == 0) fail(e->text() + ": an empty grid");
  uint64_t memory = 0;
  for (auto& [index, bytes] : e->memory) memory += bytes;
  if (memory > 32768)
    fail(e->text() + ": " + std::to_string(memory) + " bytes of threadgroup memory exceed 32768");
  Dispatch d = e->now;
  d.grid = grid;
  d.group = group;
  retain(d.pipeline);
  const jml::MetalKernelText* row = kernel_row(d.pipeline->function);
  const uint32_t written = row == nullptr ? ~0u : row->written;
  for (auto& [index, b] : d.buffers) {
    retain(b.buffer);
    b.writes = (written >> index & 1) != 0;
    begin_use(b.buffer, b.writes);
  }
  e->commands->dispatches.push_back(std::move(d));
}
void end_encoding(Encoder* e, Sel) {
  check_open(e, "endEncoding");
  e->ended = true;
  e->commands->encoding = false;
}

void finish(Commands* c, Error* error) {
  for (Dispatch& d : c->dispatches) {
    for (auto& [index, b] : d.buffers) end_use(b.buffer, b.writes);
  }
  {
    std::lock_guard<std::mutex> hold(c->mutex);
    c->error = error;
    c->status = error == nullptr ? kCompleted : kError;
  }
  c->done.notify_all();
}

Error* injected() {
  const std::string domain = "MTLCommandBufferErrorDomain";
  if (fault("timeout")) return new Error(domain, 2, "Caused GPU Timeout Error (00000002)");
  if (fault("page_fault")) return new Error(domain, 3, "Caused GPU Address Fault Error (0000000b)");
  if (fault("out_of_memory")) return new Error(domain, 8, "Insufficient Memory (00000008)");
  if (fault("removed")) return new Error(domain, 11, "Device was removed (0000000a)");
  return nullptr;
}

void commit(Commands* c, Sel) {
  if (c->encoding) fail(c->text() + ": commit before endEncoding");
  if (c->status != kNew) fail(c->text() + ": committed twice");
  c->status = kCommitted;
  ++totals().committed;
  totals().dispatches += int64_t(c->dispatches.size());
  if (totals().stub) return finish(c, nullptr);
  retain(c);
  orders(c);
  {
    QuietHold<std::mutex> hold(c->queue->work->mutex);
    c->queue->work->waiting.push_back(c);
  }
  c->queue->work->wake.notify_all();
}
void wait_completed(Commands* c, Sel) {
  std::unique_lock<std::mutex> hold(c->mutex);
  if (c->status == kNew) fail(c->text() + ": waitUntilCompleted before commit");
  ++totals().waits;
  c->done.wait(hold, [&] { return c->status >= kCompleted; });
}
uint64_t status_of(Commands* c, Sel) {
  std::lock_guard<std::mutex> hold(c->mutex);
  return c->status;
}
Object* error_of(Commands* c, Sel) { return c->error; }

void Work::run() {
  for (;;) {
    Commands* c = nullptr;
    {
      std::unique_lock<std::mutex> hold(mutex);
      wake.wait(hold, [&] { return ending || !waiting.empty(); });
      if (waiting.empty()) return;
      c = waiting.front();
      waiting.pop_front();
    }
    ordered(c);
    Error* error = injected();
    for (size_t i = 0; error == nullptr && i < c->dispatches.size(); ++i) {
      const std::string found = run(c->dispatches[i]);
      if (!found.empty()) error = new Error("MTLCommandBufferErrorDomain", 1, found);
    }
    finish(c, error);
    release(c);  // and with it, it may be, the queue
  }
}

std::string Work::run(const Dispatch& d) {
  if (gpu == nullptr) {
    jml::SimOptions options;
    options.checked = !totals().fast;
    gpu = jml::make_sim_device(*jml::find_caps("apple-m1"), options);
  }
  const jml::Kernel*& kernel = kernels[d.pipeline->text()];
  if (kernel == nullptr) {
    auto made = gpu->compile(d.pipeline->function, d.pipeline->constants);
    if (made.error) fail(*made.error);
    kernel = made.value;
  }
  std::vector<jml::Buffer> buffers;
  for (auto& [index, b] : d.buffers) {
    jml::Buffer out;
    out.index = int(index);
    out.data = static_cast<std::byte*>(b.buffer->data) + b.offset;
    out.bytes = int64_t(b.buffer->length - b.offset);
    buffers.push_back(out);
  }
  jml::Params params;
  for (auto& [index, bytes] : d.bytes) {
    params.index = int(index);
    params.data = bytes.data();
    params.bytes = int64_t(bytes.size());
  }
  for (auto& [index, bytes] : d.threadgroup) {
    params.threadgroup_bytes.resize(index + 1);
    params.threadgroup_bytes[index] = int64_t(bytes);
  }
  auto size = [](const Size& s) {
    return jml::Size3{uint32_t(s.width), uint32_t(s.height), uint32_t(s.depth)};
  };
  // Unbound arguments, sizes of structs and so on: what validation would stop.
  if (jml::Status bad = gpu->launch(*kernel, size(d.grid), size(d.group), buffers, params, nullptr))
    fail(*bad);
  jml::Status found = gpu->synchronize();
  return found ? *found : "";
}

void* contents(Buffer* b, Sel) {
  // Whoever asks reads or writes.
  if (b->busy()) fail(b->text() + ": contents while the GPU uses it");
  return b->data;
}
uint64_t length(Buffer* b, Sel) { return b->length; }

struct Setup {
  Setup() {
    device_type()
        .on("name", name)
        .on("supportsFamily:", supports)
        .on("hasUnifiedMemory", unified)
        .on("maxThreadgroupMemoryLength", threadgroup_memory)
        .on("recommendedMaxWorkingSetSize", working_set)
        .on("newCommandQueue", new_queue)
        .on("newBufferWithLength:options:", new_buffer)
        .on("newBufferWithBytesNoCopy:length:options:deallocator:", new_buffer_around)
        .on("newLibraryWithSource:options:error:", new_library)
        .on("newLibraryWithURL:error:", new_library_file)
        .on("newBinaryArchiveWithDescriptor:error:", new_archive)
        .on("newComputePipelineStateWithDescriptor:options:reflection:error:", new_pipeline);
    options_type().on("setLanguageVersion:", set_version).on("setMathMode:", set_math);
    options14_type().on("setLanguageVersion:", set_version).on("setFastMathEnabled:", set_fast);
    values_type().on("setConstantValue:type:atIndex:", set_value);
    library_type()
        .on("newFunctionWithName:", new_function)
        .on("newFunctionWithName:constantValues:error:", new_function_with);
    wanted_type()
        .on("setComputeFunction:", set_function)
        .on("setBinaryArchives:", set_archives)
        .on("setThreadGroupSizeIsMultipleOfThreadExecutionWidth:", set_multiple);
    pipeline_type().on("threadExecutionWidth", width).on("maxTotalThreadsPerThreadgroup", most);
    at_type().on("setUrl:", set_url);
    archive_type()
        .on("addComputePipelineFunctionsWithDescriptor:error:", add_pipeline)
        .on("serializeToURL:error:", serialize);
    queue_type().on("commandBuffer", command_buffer);
    commands_type()
        .on("computeCommandEncoder", compute_encoder)
        .on("commit", commit)
        .on("waitUntilCompleted", wait_completed)
        .on("status", status_of)
        .on("error", error_of);
    encoder_type()
        .on("setComputePipelineState:", set_pipeline)
        .on("setBuffer:offset:atIndex:", set_buffer)
        .on("setBytes:length:atIndex:", set_bytes)
        .on("setThreadgroupMemoryLength:atIndex:", set_threadgroup)
        .on("dispatchThreadgroups:threadsPerThreadgroup:", dispatch)
        .on("endEncoding", end_encoding);
    buffer_type().on("contents", contents).on("length", length);
    add_class("MTLCompileOptions", make_options);
    add_class("MTLFunctionConstantValues", [] { return static_cast<Object*>(new Values); });
    add_class("MTLComputePipelineDescriptor", [] { return static_cast<Object*>(new Wanted); });
    add_class("MTLBinaryArchiveDescriptor", [] { return static_cast<Object*>(new ArchiveAt); });
  }
};

}  // namespace

void set_up_metal() { static Setup once; }

}  // namespace sim

#define JML_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" sim::Object* MTLCreateSystemDefaultDevice() {
  return sim::fault("no_device") ? nullptr : new sim::Device;
}

// Work is not done from here on, only accepted: what is left is the host's part of a call.
JML_EXPORT void jml_metal_sim_stub(int32_t on) { sim::totals().stub = on != 0; }

// The GPU of the next queue judges no accesses.
JML_EXPORT void jml_metal_sim_fast(int32_t on) { sim::totals().fast = on != 0; }

// Command buffers, dispatches, pipelines found in archives, libraries from files, waits of the
// host; since the start.
JML_EXPORT void jml_metal_sim_totals(int64_t* out) {
  out[0] = sim::totals().committed;
  out[1] = sim::totals().dispatches;
  out[2] = sim::totals().archive_hits;
  out[3] = sim::totals().library_files;
  out[4] = sim::totals().waits;
}

JML_EXPORT void jml_metal_sim_forget() { jml::metal_forget(); }
