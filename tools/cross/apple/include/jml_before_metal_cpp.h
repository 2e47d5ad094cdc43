// Read before metal-cpp. zig's headers are newer than the oldest macOS that is served, and
// metal-cpp then refers to strings that only the newer system has. Without these macros it looks
// them up while the library is loaded, as it does in the tests' simulated framework, and no symbol
// can be missing.
#pragma once

#include <AvailabilityVersions.h>
#undef __MAC_26_0
#undef __IPHONE_26_0
#undef __TVOS_26_0
