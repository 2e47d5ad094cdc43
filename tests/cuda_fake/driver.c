// A driver that fails as it is told: the functions that csrc/device_cuda.cc binds, passed on to
// libcuda.so.1, or with FAKE_GPU in the environment those of one pretended GPU that runs nothing.
// The library under test opens it in place of the real one (tests/test_cuda_failures.py), JAX does
// not.
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
  char name[64];
  int code, skip, times;
} order;
static char called[65536];
static int version_told, spoiled, gpus = 1, major = 9, overlapping, argument = -1;
static long value;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// From now on `name` returns `code` after `skip` calls, `times` in a row; a negative number of
// times: always. The call does nothing else then.
void fake_fail(const char* name, int code, int skip, int times) {
  pthread_mutex_lock(&lock);
  snprintf(order.name, sizeof order.name, "%s", name);
  order.code = code;
  order.skip = skip;
  order.times = times;
  pthread_mutex_unlock(&lock);
}
void fake_version(int version) { version_told = version; }
void fake_gpus(int count) { gpus = count; }
void fake_major(int of_arch) { major = of_arch; }
// How many launches may begin before what is ahead of them has ended.
int fake_overlapping(void) { return overlapping; }
// The 64-bit argument `i` of the next launch, once it is made.
void fake_watch(int i) { argument = i; }
long fake_value(void) { return value; }
// Launches ask for more threads than a threadgroup can have, so that the real driver refuses them.
void fake_spoil(int on) { spoiled = on; }
// The names of what was called, a space behind each.
const char* fake_called(void) { return called; }

static int failing(const char* name) {
  int code = 0;
  pthread_mutex_lock(&lock);
  if (strlen(called) + strlen(name) + 2 < sizeof called) strcat(strcat(called, name), " ");
  if (strcmp(order.name, name) == 0 && order.times != 0 && order.skip-- <= 0) {
    code = order.code;
    if (order.times > 0) --order.times;
  }
  pthread_mutex_unlock(&lock);
  return code;
}

static void* real(const char* name) {
  void* lib = getenv("FAKE_GPU") == NULL ? dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) : NULL;
  return lib == NULL ? NULL : dlsym(lib, name);
}

// `pretended` is what the GPU that is not there does.
#define DRIVER(name, parameters, arguments, pretended) \
  int name parameters {                                \
    const int code = failing(#name);                   \
    if (code != 0) return code;                        \
    int(*f) parameters = real(#name);                  \
    if (f != NULL) return f arguments;                 \
    pretended;                                         \
    return 0;                                          \
  }

static int context;

DRIVER(cuInit, (unsigned flags), (flags), )
DRIVER(cuDeviceGetCount, (int* count), (count), *count = gpus)
DRIVER(cuDeviceGet, (int* device, int i), (device, i), *device = i)
DRIVER(cuDeviceGetName, (char* name, int size, int device), (name, size, device),
       snprintf(name, (size_t)size, "Pretended GPU"))
DRIVER(cuDeviceGetAttribute, (int* value, int what, int device), (value, what, device),
       *value = what == 75   ? major
                : what == 76 ? 0
                             : 132)
DRIVER(cuDevicePrimaryCtxGetState, (int device, unsigned* flags, int* active),
       (device, flags, active), (*flags = 0, *active = 1))
DRIVER(cuDevicePrimaryCtxRetain, (void** c, int device), (c, device), *c = &context)
DRIVER(cuDevicePrimaryCtxRelease_v2, (int device), (device), )
DRIVER(cuCtxGetCurrent, (void** c), (c), *c = NULL)
DRIVER(cuCtxPushCurrent_v2, (void* c), (c), )
DRIVER(cuCtxPopCurrent_v2, (void** c), (c), *c = NULL)
DRIVER(cuCtxGetDevice, (int* device), (device), *device = 0)
DRIVER(cuStreamGetCtx, (void* stream, void** c), (stream, c), *c = &context)
DRIVER(cuModuleLoadData, (void** module, const void* image), (module, image), *module = &context)
DRIVER(cuModuleGetFunction, (void** f_, void* module, const char* name), (f_, module, name),
       *f_ = &context)
DRIVER(cuFuncSetAttribute, (void* f_, int what, int value), (f_, what, value), )

int cuDriverGetVersion(int* version) {
  const int code = failing("cuDriverGetVersion");
  int (*f)(int*) = real("cuDriverGetVersion");
  if (code != 0) return code;
  *version = 13000;
  if (version_told != 0) {
    *version = version_told;
  } else if (f != NULL) {
    return f(version);
  }
  return 0;
}

// CUlaunchConfig and CUlaunchAttribute.
struct attribute {
  int id, pad, value[16];
};
struct config {
  unsigned grid[3], group[3], shared_bytes;
  void* stream;
  struct attribute* attributes;
  unsigned count;
};
int cuLaunchKernelEx(const struct config* config, void* kernel, void** argv, void** extra) {
  const int code = failing("cuLaunchKernelEx");
  int (*f)(const struct config*, void*, void**, void**) = real("cuLaunchKernelEx");
  struct config given = *config;
  pthread_mutex_lock(&lock);
  overlapping += given.count == 1 && given.attributes->id == 6 && given.attributes->value[0] == 1;
  if (argument >= 0) value = *(long*)argv[argument];
  argument = -1;
  pthread_mutex_unlock(&lock);
  if (code != 0) return code;
  if (f == NULL) return spoiled ? 1 : 0;
  if (spoiled) given.group[0] = 1 << 20;
  return f(&given, kernel, argv, extra);
}

static int text(const char* name, int code, const char** to, const char* pretended) {
  int (*f)(int, const char**) = real(name);
  if (f != NULL) return f(code, to);
  *to = pretended;
  return 0;
}
int cuGetErrorName(int code, const char** to) {
  const char* name = NULL;
  if (code == 1) name = "CUDA_ERROR_INVALID_VALUE";
  if (code == 2) name = "CUDA_ERROR_OUT_OF_MEMORY";
  if (code == 100) name = "CUDA_ERROR_NO_DEVICE";
  if (code == 209) name = "CUDA_ERROR_NO_BINARY_FOR_GPU";
  if (code == 719) name = "CUDA_ERROR_LAUNCH_FAILED";
  return text("cuGetErrorName", code, to, name);
}
int cuGetErrorString(int code, const char** to) {
  return text("cuGetErrorString", code, to, "what it means");
}
