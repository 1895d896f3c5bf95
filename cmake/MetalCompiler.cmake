# Finds Apple's Metal compiler: METAL_XCRUN is the command that runs its tools, empty where there is none.
# From Xcode 26 on it is a component that is downloaded by itself, and `xcrun` may not find one that is there unless it is
# told the toolchain. Needs METAL_OPTIONS, with which a kernel is compiled to see: `xcrun --find metal` also finds a stub
# that only says what to download. METAL4_OPTIONS, for tensor operations, are emptied if the compiler does not take them.
set(PROBE ${CMAKE_CURRENT_BINARY_DIR}/metal_probe)
file(WRITE ${PROBE}.metal "kernel void probe() {}\n")

# Sets METAL_XCRUN where this way works, and adds what was said to METAL_FAILURES where it does not.
macro(zinc_try_metal)
  if(NOT METAL_XCRUN)
    execute_process(COMMAND ${ARGN} metal ${METAL_OPTIONS} -c ${PROBE}.metal -o ${PROBE}.air RESULT_VARIABLE failed
                    OUTPUT_VARIABLE said ERROR_VARIABLE said)
    if(NOT failed)
      set(METAL_XCRUN ${ARGN})
    else()
      string(REPLACE ";" " " way "${ARGN}")
      string(STRIP "${said}" said)
      string(APPEND METAL_FAILURES "  ${way} metal: ${failed} ${said}\n")
    endif()
  endif()
endmacro()

set(METAL_XCRUN)
set(METAL_FAILURES "")
zinc_try_metal(xcrun -sdk macosx)
zinc_try_metal(xcrun -sdk macosx --toolchain Metal)
if(NOT METAL_XCRUN)
  # "Toolchain Identifier: com.apple.dt.toolchain.Metal.32023.619"
  execute_process(COMMAND xcodebuild -showComponent MetalToolchain OUTPUT_VARIABLE said ERROR_VARIABLE ignored
                  RESULT_VARIABLE failed)
  if(NOT failed AND said MATCHES "(com\\.apple\\.dt\\.toolchain\\.Metal[A-Za-z0-9._-]*)")
    set(toolchain ${CMAKE_MATCH_1})
    zinc_try_metal(xcrun -sdk macosx --toolchain ${toolchain})
    zinc_try_metal(${CMAKE_COMMAND} -E env TOOLCHAINS=${toolchain} xcrun -sdk macosx)
  endif()
endif()
if(METAL_XCRUN)
  string(REPLACE ";" " " way "${METAL_XCRUN}")
  message(STATUS "Metal compiler: ${way} metal")
  file(WRITE ${PROBE}_4.metal "#include <metal_tensor>\n#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n"
                              "kernel void probe() {}\n")
  execute_process(COMMAND ${METAL_XCRUN} metal ${METAL4_OPTIONS} -c ${PROBE}_4.metal -o ${PROBE}_4.air
                  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(failed)
    message(STATUS "No tensor operations of Metal 4 (Xcode 26 has them): ${said}")
    set(METAL4_OPTIONS)
  endif()
else()
  message(WARNING "No Metal compiler: this build has no zincmetal.metallib, so that every process compiles the kernels "
                  "it uses anew, which takes seconds. Xcode has the compiler; from Xcode 26 on it is a component of its own: "
                  "xcodebuild -downloadComponent MetalToolchain\n${METAL_FAILURES}")
endif()
