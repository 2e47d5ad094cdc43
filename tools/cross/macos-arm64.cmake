# macOS on Apple silicon, compiled on another system by zig (PyPI: ziglang). JML_ZIG is its program.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_SYSTEM_VERSION 23)
set(CMAKE_OSX_ARCHITECTURES "" CACHE STRING "")
set(CMAKE_OSX_DEPLOYMENT_TARGET "" CACHE STRING "")
set(CMAKE_OSX_SYSROOT "" CACHE STRING "")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES JML_ZIG)
set(CMAKE_CXX_COMPILER "${JML_ZIG}" c++ -target aarch64-macos.14.0)
set(CMAKE_CXX_COMPILER_TARGET "")
# Nothing here can change a name in a signed library: it is linked with the one that it keeps.
set(CMAKE_INSTALL_NAME_TOOL /bin/true)
set(CMAKE_BUILD_WITH_INSTALL_NAME_DIR ON)
set(CMAKE_INSTALL_NAME_DIR "@rpath")
set(CMAKE_CXX_COMPILER_WORKS TRUE)
# What CMake would find out by linking a program, for which zig first builds a C++ library: a minute.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_CXX_COMPILER_ID_RUN TRUE)
set(CMAKE_CXX_COMPILER_ID Clang)
set(CMAKE_CXX_COMPILER_VERSION 20.1)
set(CMAKE_CXX_COMPILER_FRONTEND_VARIANT GNU)
set(CMAKE_CXX_STANDARD_COMPUTED_DEFAULT 17)
set(CMAKE_CXX_EXTENSIONS_COMPUTED_DEFAULT ON)
# The part of Apple's headers and of its libraries' lists of symbols that zig does not bring.
set(JML_APPLE_STUBS "${CMAKE_CURRENT_LIST_DIR}/apple/include")
set(JML_METAL_CROSS_FLAGS -include "${JML_APPLE_STUBS}/jml_before_metal_cpp.h")
# Stripped while it is signed: zig's linker writes object files' names, and a signature covers them.
set(CMAKE_SHARED_LINKER_FLAGS_INIT
    "-s -F${CMAKE_CURRENT_LIST_DIR}/apple/Frameworks -L${CMAKE_CURRENT_LIST_DIR}/apple/lib")
