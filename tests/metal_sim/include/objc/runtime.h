// What metal-cpp asks of Apple's header of this name.
#pragma once

struct objc_object {
  void* isa;
};
struct objc_class;
struct objc_selector;
typedef struct objc_object* id;
typedef struct objc_selector* SEL;
typedef struct objc_class* Class;

#ifdef __cplusplus
extern "C" {
#endif
SEL sel_registerName(const char* name);
void* objc_lookUpClass(const char* name);
void* objc_getProtocol(const char* name);
#ifdef __cplusplus
}
#endif
