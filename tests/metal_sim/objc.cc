#include "tests/metal_sim/objc.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>

#if !defined(__x86_64__)
#error "tests/metal_sim: the trampoline is written for x86-64"
#endif

// Finds the method and jumps to it with every argument register as it was. The other two differ in
// where the receiver is: behind the address of a returned struct, or not.
asm(R"(
.text
.macro JML_SEND name, receiver, selector
.globl \name
.type \name,@function
\name:
  pushq %rbp
  movq %rsp, %rbp
  subq $192, %rsp
  movq %rdi, 0(%rsp)
  movq %rsi, 8(%rsp)
  movq %rdx, 16(%rsp)
  movq %rcx, 24(%rsp)
  movq %r8, 32(%rsp)
  movq %r9, 40(%rsp)
  movq %rax, 48(%rsp)
  movups %xmm0, 64(%rsp)
  movups %xmm1, 80(%rsp)
  movups %xmm2, 96(%rsp)
  movups %xmm3, 112(%rsp)
  movups %xmm4, 128(%rsp)
  movups %xmm5, 144(%rsp)
  movups %xmm6, 160(%rsp)
  movups %xmm7, 176(%rsp)
  movq \selector, %rax
  movq \receiver, %rdi
  movq %rax, %rsi
  call jml_metal_sim_lookup@PLT
  movq %rax, %r11
  movq 0(%rsp), %rdi
  movq 8(%rsp), %rsi
  movq 16(%rsp), %rdx
  movq 24(%rsp), %rcx
  movq 32(%rsp), %r8
  movq 40(%rsp), %r9
  movq 48(%rsp), %rax
  movups 64(%rsp), %xmm0
  movups 80(%rsp), %xmm1
  movups 96(%rsp), %xmm2
  movups 112(%rsp), %xmm3
  movups 128(%rsp), %xmm4
  movups 144(%rsp), %xmm5
  movups 160(%rsp), %xmm6
  movups 176(%rsp), %xmm7
  leave
  jmp *%r11
.size \name,.-\name
.endm
JML_SEND objc_msgSend, %rdi, %rsi
JML_SEND objc_msgSend_fpret, %rdi, %rsi
JML_SEND objc_msgSend_stret, %rsi, %rdx
)");

// Looks at objects that may be gone, on purpose.
#define JML_MAY_BE_GONE __attribute__((no_sanitize("vptr")))

namespace sim {
namespace {

constexpr uint64_t kAlive = 0x6a6d6c416c697665, kDead = 0x6a6d6c2044656164;

// Everything is under one mutex: this is for finding faults, not for speed.
struct World {
  std::recursive_mutex mutex;
  std::set<std::string> names;
  std::map<std::string, int64_t> living, made;
  std::map<std::string, Object*> classes;
  std::deque<void*> dead;  // memory of the last ones that went, so that a late message is noticed
  std::map<std::string, std::pair<int64_t, int64_t>> faults;
};
World& world() {
  static auto* w = new World;
  return *w;
}
using Hold = QuietHold<std::recursive_mutex>;

struct Pool : Object {
  Pool();
  ~Pool() override;
  std::vector<Object*> items;
};
thread_local std::vector<Pool*> pools;

struct ClassObject : Object {
  ClassObject(Type& type, Object* (*maker)()) : Object(type), make(maker) {}
  Object* (*make)();
};

void do_retain(Object* o, Sel) { retain_object(o); }
void do_release(Object* o, Sel) { release(o); }
Object* do_autorelease(Object* o, Sel) { return autorelease(o); }
Object* do_init(Object* o, Sel) { return o; }
bool do_responds(Object* o, Sel, Sel asked) { return o->type->methods.count(asked) != 0; }
Object* do_signature(Object*, Sel, Sel) { return nullptr; }
uint64_t do_count(Object* o, Sel) { return uint64_t(o->references); }
Object* do_alloc(Object* o, Sel) { return static_cast<ClassObject*>(o)->make(); }
const char* do_utf8(String* s, Sel) { return s->value.c_str(); }
Object* do_description(Error* e, Sel) { return autorelease(new String(e->description)); }
Object* do_domain(Error* e, Sel) { return autorelease(new String(e->domain)); }
int64_t do_code(Error* e, Sel) { return e->code; }
void do_drain(Pool* p, Sel) { release(p); }

Object* string_with(Object*, Sel, const char* s, uint64_t encoding) {
  if (s == nullptr) fail("stringWithCString:encoding: of null");
  if (encoding != 4) fail("stringWithCString:encoding: expected UTF-8 (4)");
  return autorelease(new String(s));
}
Object* url_with(Object*, Sel, String* path) { return autorelease(new Url(path->value)); }
Object* array_with(Object*, Sel, Object* const* items, uint64_t count) {
  auto* a = new Array;
  for (uint64_t i = 0; i < count; ++i) a->items.push_back(retain(items[i]));
  return autorelease(a);
}
struct Process : Object {
  Process();
};
Object* process_info(Object*, Sel) { return autorelease(new Process); }
Object* version(Object*, Sel) { return autorelease(new String("Version 14.0 (simulated)")); }

#define JML_TYPE(function, name)        \
  Type& function() {                    \
    static auto* type = new Type(name); \
    return *type;                       \
  }
JML_TYPE(pool_type, "NSAutoreleasePool")
JML_TYPE(string_type, "NSString")
JML_TYPE(error_type, "NSError")
JML_TYPE(url_type, "NSURL")
JML_TYPE(array_type, "NSArray")
JML_TYPE(process_type, "NSProcessInfo")
#undef JML_TYPE

Pool::Pool() : Object(pool_type()) { pools.push_back(this); }
Pool::~Pool() {
  if (pools.empty() || pools.back() != this)
    fail("an autorelease pool ends on another thread or out of order");
  for (Object* o : items) release(o);
  pools.pop_back();
}
Process::Process() : Object(process_type()) {}

struct Setup {
  Setup() {
    string_type().on("UTF8String", do_utf8);
    error_type()
        .on("localizedDescription", do_description)
        .on("domain", do_domain)
        .on("code", do_code);
    pool_type().on("drain", do_drain);
    process_type().on("operatingSystemVersionString", version);
    add_class("NSAutoreleasePool", [] { return static_cast<Object*>(new Pool); });
    add_class("NSString", nullptr,
              {{"stringWithCString:encoding:", reinterpret_cast<Imp>(string_with)}});
    add_class("NSURL", nullptr, {{"fileURLWithPath:", reinterpret_cast<Imp>(url_with)}});
    add_class("NSArray", nullptr, {{"arrayWithObjects:count:", reinterpret_cast<Imp>(array_with)}});
    add_class("NSProcessInfo", nullptr, {{"processInfo", reinterpret_cast<Imp>(process_info)}});
  }
};
// Classes are looked up while libraries are initialised, in an order that nobody chose.
void set_up() { static Setup once; }

}  // namespace

Sel intern(const std::string& name) {
  Hold hold(world().mutex);
  return world().names.insert(name).first->c_str();
}

void fail(const std::string& what) {
  std::fprintf(stderr, "metal_sim: %s\n", what.c_str());
  std::fflush(stderr);
  std::abort();
}

Type::Type(const char* type_name) : name(type_name) {
  on("retain", do_retain);
  on("release", do_release);
  on("autorelease", do_autorelease);
  on("retainCount", do_count);
  on("init", do_init);
  on("respondsToSelector:", do_responds);
  on("methodSignatureForSelector:", do_signature);
}

Object::Object(Type& object_type) : magic(kAlive), type(&object_type) {
  Hold hold(world().mutex);
  number = ++world().made[type->name];
  ++world().living[type->name];
}

Object::~Object() {
  magic = kDead;
  Hold hold(world().mutex);
  --world().living[type->name];
}

JML_MAY_BE_GONE std::string Object::text() const {
  return type->name + " #" + std::to_string(number);
}

void retain_object(Object* o) {
  Hold hold(world().mutex);
  ++o->references;
}

JML_MAY_BE_GONE void release(Object* o) {
  orders(o);
  {
    Hold hold(world().mutex);
    if (o->magic == kDead) fail("release of " + o->text() + ", which is gone");
    if (--o->references > 0) return;
  }
  ordered(o);
  o->~Object();  // its memory stays, so that its name can still be told
  Hold hold(world().mutex);
  world().dead.push_back(o);
  if (world().dead.size() > 4096) {
    ::operator delete(world().dead.front());
    world().dead.pop_front();
  }
}

void autorelease_object(Object* o) {
  if (pools.empty()) fail(o->text() + " is autoreleased on a thread without a pool");
  pools.back()->items.push_back(o);
}

void add_class(const char* name, Object* (*make)(), std::map<std::string, Imp> class_methods) {
  auto* type = new Type(intern(std::string("class ") + name));
  if (make != nullptr) type->on("alloc", do_alloc);
  for (auto& [selector, imp] : class_methods) type->methods[intern(selector)] = imp;
  auto* object = new ClassObject(*type, make);
  Hold hold(world().mutex);
  --world().living[type->name];
  world().classes[name] = object;
}

String::String(std::string s) : Object(string_type()), value(std::move(s)) {}
Error::Error(std::string domain_name, int64_t error_code, std::string text)
    : Object(error_type()),
      domain(std::move(domain_name)),
      description(std::move(text)),
      code(error_code) {}
Url::Url(std::string p) : Object(url_type()), path(std::move(p)) {}
Array::Array() : Object(array_type()) {}
Array::~Array() {
  for (Object* o : items) release(o);
}

JML_MAY_BE_GONE void expect(const Object* o, const char* type, const char* what) {
  if (o == nullptr) fail(std::string(what) + " expected " + type + ", got nil");
  if (o->magic == kDead) fail(std::string(what) + " got " + o->text() + ", which is gone");
  if (o->magic != kAlive) fail(std::string(what) + " expected " + type + ", got no object");
  if (o->type->name != type) fail(std::string(what) + " expected " + type + ", got " + o->text());
}

std::map<std::string, int64_t> living() {
  Hold hold(world().mutex);
  std::map<std::string, int64_t> out;
  for (auto& [name, count] : world().living) {
    if (count != 0) out[name] = count;
  }
  return out;
}

bool fault(const char* kind) {
  Hold hold(world().mutex);
  auto it = world().faults.find(kind);
  if (it == world().faults.end()) return false;
  auto& [skip, count] = it->second;
  if (skip > 0) {
    --skip;
    return false;
  }
  if (--count == 0) world().faults.erase(it);
  return true;
}

}  // namespace sim

#define JML_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" JML_MAY_BE_GONE
    __attribute__((used, visibility("hidden"))) sim::Imp jml_metal_sim_lookup(sim::Object* o,
                                                                              sim::Sel selector) {
  if (o == nullptr) sim::fail(std::string("message ") + selector + " to nil");
  if (o->magic == sim::kDead)
    sim::fail(std::string("message ") + selector + " to " + o->text() + ", which is gone");
  if (o->magic != sim::kAlive) sim::fail(std::string("message ") + selector + " to no object");
  auto it = o->type->methods.find(selector);
  if (it == o->type->methods.end())
    sim::fail("unknown selector " + std::string(selector) + " sent to " + o->text());
  return it->second;
}

extern "C" {
const char* sel_registerName(const char* name) { return sim::intern(name); }
void* objc_lookUpClass(const char* name) {
  sim::set_up();
  sim::set_up_metal();
  sim::Hold hold(sim::world().mutex);
  auto it = sim::world().classes.find(name);
  return it == sim::world().classes.end() ? nullptr : it->second;
}
void* objc_getProtocol(const char*) { return nullptr; }

// metal-cpp's inline functions with completion handlers refer to the blocks runtime. None is
// called.
void* _NSConcreteStackBlock[32];
void* _NSConcreteGlobalBlock[32];
void _Block_object_assign(void*, const void*, int) { sim::fail("a block is copied"); }
void _Block_object_dispose(const void*, int) { sim::fail("a block is disposed of"); }
void* MTLCopyAllDevicesWithObserver(void*, void*) { sim::fail("MTLCopyAllDevicesWithObserver"); }
void MTLRemoveDeviceObserver(const void*) { sim::fail("MTLRemoveDeviceObserver"); }
}

// kind: see the calls of fault() in metal.cc. Lets `skip` pass, then strikes `count` times.
JML_EXPORT void jml_metal_sim_fault(const char* kind, int64_t skip, int64_t count) {
  sim::Hold hold(sim::world().mutex);
  if (count == 0)
    sim::world().faults.erase(kind);
  else
    sim::world().faults[kind] = {skip, count};
}

// How many objects live, by type: "MTLBuffer 3\n...".
JML_EXPORT const char* jml_metal_sim_living() {
  static thread_local std::string text;
  text.clear();
  for (auto& [name, count] : sim::living()) text += name + " " + std::to_string(count) + "\n";
  return text.c_str();
}

static std::atomic<long> page_bytes{0};
extern "C" long jml_metal_sim_sysconf(int name) noexcept {
  const long own = page_bytes;
  return name == _SC_PAGESIZE && own != 0 ? own : sysconf(name);
}
// 0: as the system has it.
JML_EXPORT void jml_metal_sim_page(int64_t bytes) { page_bytes = long(bytes); }
