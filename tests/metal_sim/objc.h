// A small Objective-C runtime: objects with counted references, classes with methods by selector,
// autorelease pools. It stands in for Apple's under the Metal device in tests, and is strict where
// Apple's is not: whatever our code should never do ends the process with a line that says what.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace sim {

using Sel = const char*;  // interned: equal texts are equal pointers
using Imp = void (*)();

Sel intern(const std::string& name);

// The framework's own locks order nothing as far as ThreadSanitizer knows: every message takes one,
// and what our code forgot to lock would seem to be in order. What Metal does order is said by
// orders(), from one thread, and ordered(), to the next.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
inline void orders(void* what) { __tsan_release(what); }
inline void ordered(void* what) { __tsan_acquire(what); }
inline void begin_quiet() {
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void end_quiet() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}
#else
inline void orders(void*) {}
inline void ordered(void*) {}
inline void begin_quiet() {}
inline void end_quiet() {}
#endif
template <typename Mutex>
class QuietHold {
 public:
  explicit QuietHold(Mutex& mutex) : mutex_(mutex) {
    begin_quiet();
    mutex_.lock();
  }
  ~QuietHold() {
    mutex_.unlock();
    end_quiet();
  }
  QuietHold(const QuietHold&) = delete;
  QuietHold& operator=(const QuietHold&) = delete;

 private:
  Mutex& mutex_;
};

// Ends the process: "metal_sim: <what>".
[[noreturn]] void fail(const std::string& what);

struct Type {
  explicit Type(const char* type_name);
  std::string name;
  std::map<Sel, Imp> methods;
  template <typename F>
  Type& on(const char* selector, F* f) {
    methods[intern(selector)] = reinterpret_cast<Imp>(f);
    return *this;
  }
};

struct Object {
  explicit Object(Type& type);
  virtual ~Object();
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  volatile uint64_t magic;  // read after the end, when other stores might be left out
  Type* type;
  int64_t references = 1;
  int64_t number;  // of its type, from 1, for messages
  std::string text() const;
};

// As the messages of the same names, for use inside.
void release(Object* o);
void autorelease_object(Object* o);
template <typename T>
T* autorelease(T* o) {
  autorelease_object(o);
  return o;
}
void retain_object(Object* o);
template <typename T>
T* retain(T* o) {
  if (o != nullptr) retain_object(o);
  return o;
}

// A class object: answers alloc with `make`, and its own class methods.
void add_class(const char* name, Object* (*make)(), std::map<std::string, Imp> class_methods = {});

struct String : Object {
  explicit String(std::string s);
  std::string value;
};
struct Error : Object {
  Error(std::string domain_name, int64_t error_code, std::string description);
  std::string domain, description;
  int64_t code;
};
struct Url : Object {
  explicit Url(std::string p);
  std::string path;
};
struct Array : Object {
  Array();
  ~Array() override;
  std::vector<Object*> items;
};

// Makes the Metal classes known.
void set_up_metal();

// Ends the process unless `o` is a living object of the type.
void expect(const Object* o, const char* type, const char* what);

// Living objects by type.
std::map<std::string, int64_t> living();

// Faults that a test asked for: true `count` times after `skip` calls were let through.
bool fault(const char* kind);

}  // namespace sim

// What csrc/device_metal.cc gets for sysconf: pages may be smaller here, so that any memory of
// XLA's begins on one.
extern "C" long jml_metal_sim_sysconf(int name) noexcept;
