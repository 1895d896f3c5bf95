# Flags that make a fault of memory an end of the process and not a way in. Kernels are left as they are: their loops
# have arrays on the stack, and every index of theirs is checked by the tests (ZINCMETAL_CHECKED). With a sanitizer the
# checks are the sanitizer's.
function(zinc_harden target)
  if(ZINCMETAL_SANITIZE)
    return()
  endif()
  set(language "COMPILE_LANGUAGE:CXX,OBJCXX")  # nvcc has other flags
  target_compile_options(${target} PRIVATE $<$<${language}>:-fstack-protector-strong>)
  if(CMAKE_BUILD_TYPE MATCHES "Release|RelWithDebInfo|MinSizeRel")  # without optimisation glibc only warns
    target_compile_options(${target} PRIVATE "$<$<${language}>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2>")
  endif()
  get_target_property(type ${target} TYPE)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND type STREQUAL "MODULE_LIBRARY")
    target_link_options(${target} PRIVATE LINKER:-z,relro,-z,now,-z,noexecstack)
  endif()
endfunction()
