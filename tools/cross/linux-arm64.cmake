# Linux on 64-bit ARM, compiled on another system by zig (PyPI: ziglang). JML_ZIG is its program.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES JML_ZIG)
set(CMAKE_CXX_COMPILER "${JML_ZIG}" c++ -target aarch64-linux-gnu.2.28)
set(CMAKE_CXX_COMPILER_WORKS TRUE)
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
