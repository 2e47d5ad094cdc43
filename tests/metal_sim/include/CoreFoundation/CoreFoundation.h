// What metal-cpp asks of Apple's header of this name.
#pragma once

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef unsigned char Boolean;
