# The CPU lane: the kernels compiled as C++ through the stand-in metal_stdlib, and their native versions per ISA.
# Of the native folder, these two are compiled for the machine that everything else is compiled for.
set(NATIVE_COMMON csrc/cpu/native/kernel.cpp csrc/cpu/native/register.cpp)
set(CPU_SOURCES csrc/cpu/device.cpp csrc/cpu/pool.cpp ${NATIVE_COMMON})
file(GLOB MSL_SOURCES CONFIGURE_DEPENDS csrc/msl/run/*.cpp)
file(GLOB NATIVE_SOURCES CONFIGURE_DEPENDS csrc/cpu/native/*.cpp)
list(FILTER NATIVE_SOURCES EXCLUDE REGEX "/(kernel|register)\\.cpp$")

# Without strict aliasing: MSL lets a kernel view weight bytes as blocks. Attributes such as [[buffer(0)]] are Metal's.
# -O1: what is hot here has a native version. MSL's char is signed; on Arm under Linux, that of C++ is not.
set(MSL_OPTIONS -x c++ -O1 -fno-strict-aliasing -ffp-contract=off -fsigned-char -Wno-attributes -Wno-unknown-attributes
    -Wno-unknown-pragmas -Wno-unused-parameter -Wno-unused-variable)

function(zinc_kernels target)
  add_library(${target} OBJECT ${KERNEL_SOURCES} ${ARGN})
  set_source_files_properties(${KERNEL_SOURCES} ${ARGN} PROPERTIES LANGUAGE CXX)
  target_include_directories(${target} PRIVATE csrc/msl/stdlib csrc kernels)
  target_compile_options(${target} PRIVATE -Wall -Wextra ${MSL_OPTIONS})
endfunction()

# Each native source is compiled once per instruction set; the best that the machine has is picked at run time.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(ISAS plain avx2 avx512)
  set(ISA_plain -O1)  # for machines older than 2013
  set(ISA_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(ISA_avx512 ${ISA_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(ISAS plain neon)
  set(ISA_plain -O1)  # for comparison: every machine has the other
  set(ISA_neon -DNATIVE_WITH_NEON=1)
else()
  set(ISAS plain)
endif()
if(ZINCMETAL_SANITIZE)
  set(ISAS plain)
  set_source_files_properties(csrc/cpu/native/register.cpp PROPERTIES COMPILE_DEFINITIONS NATIVE_ONLY_PLAIN=1)
  if(NOT ZINCMETAL_SANITIZE STREQUAL "coverage")  # which takes the kernels as any build has them
    list(APPEND MSL_OPTIONS -O0)  # replaced by native versions: only what compiles soon
  endif()
  # Fibres change stacks, which the tools do not know; the checked build watches what runs on them.
  set_source_files_properties(${MSL_SOURCES} PROPERTIES COMPILE_OPTIONS "-fno-sanitize=address;-fno-sanitize=thread")
endif()
if(NOT ZINCMETAL_NATIVE)
  set(ISAS)
  set_source_files_properties(csrc/cpu/native/register.cpp PROPERTIES COMPILE_DEFINITIONS NATIVE_NONE=1)
endif()
set(NATIVE_OBJECTS)
foreach(isa IN LISTS ISAS)
  add_library(native_${isa} OBJECT ${NATIVE_SOURCES})
  target_include_directories(native_${isa} PRIVATE csrc kernels)
  target_compile_definitions(native_${isa} PRIVATE NATIVE_ISA=${isa})
  target_compile_options(native_${isa} PRIVATE -Wall -Wextra -Wno-psabi -O2 -fno-math-errno -fno-trapping-math ${ISA_${isa}})
  if(NOT ZINCMETAL_SANITIZE STREQUAL "thread")
    zinc_sanitize(native_${isa})
  endif()
  list(APPEND NATIVE_OBJECTS $<TARGET_OBJECTS:native_${isa}>)
endforeach()

zinc_kernels(kernels_cpu)
zinc_module(_core_cpu ${COMMON_SOURCES} ${CPU_SOURCES} ${MSL_SOURCES} $<TARGET_OBJECTS:kernels_cpu> ${NATIVE_OBJECTS})
target_link_libraries(_core_cpu PRIVATE Threads::Threads)

# The checker reads Linux's list of loaded segments; elsewhere the tests run the kernels unchecked.
if(ZINCMETAL_CHECKED AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # The compiler calls a hook at every memory access of a kernel, and at every index outside an array; csrc/msl/run
  # defines the hooks (no sanitizer is linked).
  file(GLOB PROBE_SOURCES CONFIGURE_DEPENDS tests/csrc/msl/probes/*.metal)
  zinc_kernels(kernels_checked ${PROBE_SOURCES})
  target_compile_definitions(kernels_checked PRIVATE ZINC_CHECKED=1)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(kernels_checked PRIVATE -fsanitize=thread,bounds-strict
                           --param tsan-instrument-func-entry-exit=0)
  else()
    target_compile_options(kernels_checked PRIVATE -fsanitize=thread,array-bounds)
  endif()
  zinc_module(_core_checked ${COMMON_SOURCES} ${CPU_SOURCES} ${MSL_SOURCES} $<TARGET_OBJECTS:kernels_checked>
              ${NATIVE_OBJECTS})
  target_compile_definitions(_core_checked PRIVATE ZINC_CHECKED=1)
  target_link_libraries(_core_checked PRIVATE Threads::Threads)
endif()
