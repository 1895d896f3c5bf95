# The CUDA lane: the same kernels through nvcc, the plan as a CUDA graph.
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "CUDA 12 or later is needed; ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
# Machine code for what this compiler knows, and PTX of the last for what comes later. -D ZINCMETAL_CUDA_ARCHITECTURES=90
# builds for one GPU, in a fraction of the time.
if(NOT ZINCMETAL_CUDA_ARCHITECTURES)
  set(ZINCMETAL_CUDA_ARCHITECTURES 80-real 86-real 89-real 90)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(ZINCMETAL_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
  endif()
endif()

# The CPU lane compiles the kernels as C++, and a file has one language: here each gets a file that includes it.
set(CUDA_KERNELS)
set(CUDA_SOURCES ${KERNEL_SOURCES})
if(ZINCMETAL_PROBES)
  list(APPEND CUDA_SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/tests/csrc/msl/probes/probe_faults.metal)
endif()
foreach(source IN LISTS CUDA_SOURCES)
  get_filename_component(name ${source} NAME_WE)
  file(CONFIGURE OUTPUT cuda/${name}.cu CONTENT "#include \"@source@\"\n" @ONLY)
  list(APPEND CUDA_KERNELS ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.cu)
endforeach()

add_library(kernels_cuda OBJECT ${CUDA_KERNELS})
set_target_properties(kernels_cuda PROPERTIES CUDA_ARCHITECTURES "${ZINCMETAL_CUDA_ARCHITECTURES}" CUDA_STANDARD 20
                                              CUDA_SEPARABLE_COMPILATION OFF)
target_include_directories(kernels_cuda PRIVATE csrc/msl/stdlib csrc kernels)
target_compile_options(kernels_cuda PRIVATE --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-fno-strict-aliasing)

zinc_module(_core_cuda ${COMMON_SOURCES} csrc/cuda/device.cu csrc/msl/run/registry.cpp $<TARGET_OBJECTS:kernels_cuda>)
target_compile_definitions(_core_cuda PRIVATE ZINC_CUDA=1)  # the sizes by which its kernels are launched
set_target_properties(_core_cuda PROPERTIES CUDA_ARCHITECTURES "${ZINCMETAL_CUDA_ARCHITECTURES}" CUDA_STANDARD 20
                                            CUDA_RUNTIME_LIBRARY Static)
