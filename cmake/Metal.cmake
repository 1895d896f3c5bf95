# The Metal lane: the Objective-C++ shim, the kernels' sources, and a metallib of them where Xcode's compiler is there.
enable_language(OBJCXX)
set(CMAKE_OBJCXX_STANDARD 20)
set(CMAKE_OBJCXX_STANDARD_REQUIRED ON)

zinc_module(_core_metal ${COMMON_SOURCES} csrc/device_metal.mm)
set_source_files_properties(csrc/device_metal.mm PROPERTIES COMPILE_OPTIONS -fobjc-arc)
# A process without CoreGraphics may be given no default Metal device.
target_link_libraries(_core_metal PRIVATE "-framework Metal" "-framework Foundation" "-framework CoreGraphics")

set(KERNEL_DESTINATION zincmetal/kernels)
install(DIRECTORY kernels/ DESTINATION ${KERNEL_DESTINATION} FILES_MATCHING PATTERN "*.metal" PATTERN "*.h")

# As csrc/device_metal.mm compiles them: MSL 3.1 is of macOS 14, safe math keeps infinities and NaN.
set(METAL_COMPILER xcrun -sdk macosx metal)
set(METAL_OPTIONS -std=metal3.1 -mmacosx-version-min=14.0 -fno-fast-math -Wall -Wextra -Wno-c++17-extensions
    -Wno-unused-parameter -Wno-unused-variable)

# `xcrun --find metal` also finds a stub that only says what to download, so one kernel is compiled to see.
set(PROBE ${CMAKE_CURRENT_BINARY_DIR}/metal_probe)
file(WRITE ${PROBE}.metal "kernel void probe() {}\n")
execute_process(COMMAND ${METAL_COMPILER} ${METAL_OPTIONS} -c ${PROBE}.metal -o ${PROBE}.air
                RESULT_VARIABLE METAL_COMPILER_FAILED OUTPUT_QUIET ERROR_QUIET)
if(METAL_COMPILER_FAILED)
  message(STATUS "No Metal compiler (xcrun metal): the kernels are compiled when a device is opened")
  return()
endif()

file(GLOB KERNEL_HEADERS CONFIGURE_DEPENDS kernels/*.h)
set(KERNEL_AIRS)
foreach(source IN LISTS KERNEL_SOURCES)
  get_filename_component(name ${source} NAME_WE)
  set(air ${CMAKE_CURRENT_BINARY_DIR}/${name}.air)
  add_custom_command(OUTPUT ${air} DEPENDS ${source} ${KERNEL_HEADERS} VERBATIM
                     COMMAND ${METAL_COMPILER} ${METAL_OPTIONS} -c ${source} -o ${air}
                     COMMENT "Metal ${name}")
  list(APPEND KERNEL_AIRS ${air})
endforeach()
set(METALLIB ${CMAKE_CURRENT_BINARY_DIR}/zincmetal.metallib)
add_custom_command(OUTPUT ${METALLIB} DEPENDS ${KERNEL_AIRS} VERBATIM
                   COMMAND xcrun -sdk macosx metallib ${KERNEL_AIRS} -o ${METALLIB} COMMENT "zincmetal.metallib")
add_custom_target(zincmetal_metallib ALL DEPENDS ${METALLIB})
install(FILES ${METALLIB} DESTINATION ${KERNEL_DESTINATION})
