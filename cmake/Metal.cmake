# The Metal lane: the Objective-C++ shim, the kernels' sources, and a metallib of them where Xcode's compiler is there.
enable_language(OBJCXX)
set(CMAKE_OBJCXX_STANDARD 20)
set(CMAKE_OBJCXX_STANDARD_REQUIRED ON)

zinc_module(_core_metal ${COMMON_SOURCES} csrc/metal/device.mm)
set_source_files_properties(csrc/metal/device.mm PROPERTIES COMPILE_OPTIONS -fobjc-arc)
# A process without CoreGraphics may be given no default Metal device.
target_link_libraries(_core_metal PRIVATE "-framework Metal" "-framework Foundation" "-framework CoreGraphics")

set(KERNEL_DESTINATION zincmetal/kernels)
install(DIRECTORY kernels/ DESTINATION ${KERNEL_DESTINATION} FILES_MATCHING PATTERN "*.metal" PATTERN "*.h")

# As csrc/metal/library.h compiles them: MSL 3.1 is of macOS 14, safe math keeps infinities and NaN.
set(METAL_OPTIONS -std=metal3.1 -mmacosx-version-min=14.0 -fno-fast-math -Wall -Wextra -Wno-c++17-extensions
    -Wno-unused-parameter -Wno-unused-variable)
include(cmake/MetalCompiler.cmake)
if(NOT METAL_XCRUN)
  return()
endif()

file(GLOB KERNEL_HEADERS CONFIGURE_DEPENDS kernels/*.h)
set(KERNEL_AIRS)
foreach(source IN LISTS KERNEL_SOURCES)
  get_filename_component(name ${source} NAME_WE)
  set(air ${CMAKE_CURRENT_BINARY_DIR}/${name}.air)
  set(included ${source} ${KERNEL_HEADERS})
  if(name MATCHES "^types_")  # includes the sources of families: see kernels/quant_types.h
    list(APPEND included ${KERNEL_SOURCES})
  endif()
  add_custom_command(OUTPUT ${air} DEPENDS ${included} VERBATIM
                     COMMAND ${METAL_XCRUN} metal ${METAL_OPTIONS} -c ${source} -o ${air}
                     COMMENT "Metal ${name}")
  list(APPEND KERNEL_AIRS ${air})
endforeach()
set(METALLIB ${CMAKE_CURRENT_BINARY_DIR}/zincmetal.metallib)
add_custom_command(OUTPUT ${METALLIB} DEPENDS ${KERNEL_AIRS} VERBATIM
                   COMMAND ${METAL_XCRUN} metallib ${KERNEL_AIRS} -o ${METALLIB} COMMENT "zincmetal.metallib")
add_custom_target(zincmetal_metallib ALL DEPENDS ${METALLIB})
install(FILES ${METALLIB} DESTINATION ${KERNEL_DESTINATION})
