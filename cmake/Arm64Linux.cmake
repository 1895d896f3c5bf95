# A toolchain file: compiles for 64-bit Arm on Linux, with the compiler that Debian has for it (g++-aarch64-linux-gnu).
# ARM64_ROOT is a folder with Python for that machine; .ci/neon.py fills it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ARM64_ROOT)

# Debian's pyconfig.h of a machine lies in a folder of that machine.
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${ARM64_ROOT}/usr/include")
