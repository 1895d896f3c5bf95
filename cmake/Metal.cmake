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

# As csrc/metal/library.h compiles them: safe math keeps infinities and NaN. MSL 3.1 is of macOS 14. Tensor operations
# are of Metal 4 and macOS 26: for GPUs from Apple10 on.
set(METAL_FLAGS -fno-fast-math -Wall -Wextra -Wno-c++17-extensions -Wno-unused-parameter -Wno-unused-variable)
set(METAL_OPTIONS -std=metal3.1 -mmacosx-version-min=14.0 ${METAL_FLAGS})
set(METAL4_OPTIONS -std=metal4.0 -mmacosx-version-min=26.0 -DCOOPERATIVE=1 ${METAL_FLAGS})
include(cmake/MetalCompiler.cmake)
if(NOT METAL_XCRUN)
  return()
endif()

file(GLOB KERNEL_HEADERS CONFIGURE_DEPENDS kernels/*.h)
# A metallib of all kernels, compiled with these options.
function(zinc_metallib library)
  set(airs)
  foreach(source IN LISTS KERNEL_SOURCES)
    get_filename_component(name ${source} NAME_WE)
    set(air ${CMAKE_CURRENT_BINARY_DIR}/${library}/${name}.air)
    set(included ${source} ${KERNEL_HEADERS})
    if(name MATCHES "^types_")  # includes the sources of families: see kernels/quant_types.h
      list(APPEND included ${KERNEL_SOURCES})
    endif()
    add_custom_command(OUTPUT ${air} DEPENDS ${included} VERBATIM
                       COMMAND ${METAL_XCRUN} metal ${ARGN} -c ${source} -o ${air} COMMENT "Metal ${library} ${name}")
    list(APPEND airs ${air})
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${library})
  set(metallib ${CMAKE_CURRENT_BINARY_DIR}/${library}.metallib)
  add_custom_command(OUTPUT ${metallib} DEPENDS ${airs} VERBATIM
                     COMMAND ${METAL_XCRUN} metallib ${airs} -o ${metallib} COMMENT "${library}.metallib")
  add_custom_target(${library}_metallib ALL DEPENDS ${metallib})
  install(FILES ${metallib} DESTINATION ${KERNEL_DESTINATION})
endfunction()

zinc_metallib(zincmetal ${METAL_OPTIONS})
if(METAL4_OPTIONS)
  zinc_metallib(zincmetal_4 ${METAL4_OPTIONS})
endif()
