# The Metal lane without a Mac, for the tests: csrc/metal/device.mm as it is, compiled by clang against the stand-in
# classes of tests/csrc/metal/double, as a module that runs its dispatches with the kernels of the CPU lane. Never
# installed.
set(DOUBLE ${CMAKE_CURRENT_SOURCE_DIR}/tests/csrc/metal/double)
file(GLOB DOUBLE_OBJC CONFIGURE_DEPENDS ${DOUBLE}/*.mm)
file(GLOB DOUBLE_CXX CONFIGURE_DEPENDS ${DOUBLE}/*.cpp)
file(GLOB DOUBLE_HEADERS CONFIGURE_DEPENDS ${DOUBLE}/*.h ${DOUBLE}/include/*/*.h csrc/core/*.h csrc/metal/*.h
     csrc/metal/portable/*.h)

# The clang in the PyPI package ziglang, or one of the system's.
set(ZIG ${Python_EXECUTABLE} -m ziglang c++)
execute_process(COMMAND ${ZIG} --version RESULT_VARIABLE NO_ZIG OUTPUT_QUIET ERROR_QUIET)
find_program(CLANG NAMES clang++ clang++-20 clang++-19 clang++-18 clang++-17 clang++-16)
if(NOT NO_ZIG)
  set(OBJC_COMPILER ${ZIG} -fno-sanitize=undefined)
elseif(CLANG)
  set(OBJC_COMPILER ${CLANG})
else()
  message(FATAL_ERROR "The Metal double needs clang: pip install ziglang")
endif()

# With the C++ library of the compiler that links: what they share has one layout.
set(OBJC_FLAGS -std=c++20 -O1 -g -fPIC -fvisibility=hidden -nostdinc++)
foreach(folder IN LISTS CMAKE_CXX_IMPLICIT_INCLUDE_DIRECTORIES)
  if(folder MATCHES "/c\\+\\+(/|$)")
    list(APPEND OBJC_FLAGS -I${folder})
  endif()
endforeach()
# Legacy dispatch: messages are looked up by a call that C++ can serve, and not sent through assembler.
list(APPEND OBJC_FLAGS -fobjc-arc -fblocks -fobjc-exceptions -fexceptions -fobjc-runtime=gnustep-2.0
     -Xclang -fobjc-dispatch-method=legacy -Wall -Wextra -Werror -Wno-deprecated-declarations -Wno-objc-literal-conversion
     -Wno-nullability-completeness -Wno-property-attribute-mismatch)

set(DOUBLE_OBJECTS)
foreach(source IN LISTS DOUBLE_OBJC ITEMS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/metal/device.mm)
  file(RELATIVE_PATH path ${CMAKE_CURRENT_SOURCE_DIR} ${source})
  string(MAKE_C_IDENTIFIER ${path} name)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/metal_double/${name}.o)
  add_custom_command(OUTPUT ${object} DEPENDS ${source} ${DOUBLE_HEADERS} VERBATIM
                     COMMAND ${OBJC_COMPILER} ${OBJC_FLAGS} -I${CMAKE_CURRENT_SOURCE_DIR}/csrc -I${CMAKE_CURRENT_SOURCE_DIR}/kernels -I${DOUBLE} -I${DOUBLE}/include
                             -DMETAL_DOUBLE_CXX="${CMAKE_CXX_COMPILER}" -c ${source} -o ${object}
                     COMMENT "Objective-C++ ${path}")
  list(APPEND DOUBLE_OBJECTS ${object})
endforeach()
list(FILTER DOUBLE_CXX EXCLUDE REGEX "/execute.cpp$")  # the one part that the checked build changes
add_library(metal_double_parts OBJECT csrc/core/module.cpp ${DOUBLE_CXX} ${NATIVE_COMMON})
target_include_directories(metal_double_parts PRIVATE csrc kernels ${DOUBLE} ${DOUBLE}/include)
target_compile_options(metal_double_parts PRIVATE -Wall -Wextra)

add_custom_target(metal_doubles ALL)
# A module named _core_metal in a folder of its own, with these kernels.
function(metal_double_module name kernels)
  pybind11_add_module(${name} NO_EXTRAS ${MSL_SOURCES} ${DOUBLE}/execute.cpp ${DOUBLE_OBJECTS}
                      $<TARGET_OBJECTS:core_common> $<TARGET_OBJECTS:metal_double_parts> $<TARGET_OBJECTS:${kernels}> ${NATIVE_OBJECTS})
  target_include_directories(${name} PRIVATE csrc ${DOUBLE})
  target_compile_definitions(${name} PRIVATE ${ARGN})
  target_compile_options(${name} PRIVATE -Wall -Wextra)
  target_link_libraries(${name} PRIVATE Threads::Threads)
  set_target_properties(${name} PROPERTIES OUTPUT_NAME _core_metal
                                           LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${name})
  add_dependencies(metal_doubles ${name})
endfunction()

metal_double_module(metal_double kernels_cpu)
if(TARGET kernels_checked)
  metal_double_module(metal_double_checked kernels_checked ZINC_CHECKED=1)
endif()
