# Instruments targets for `make sanitize`. ZINCMETAL_SANITIZE is "address", with undefined behaviour, or "thread".
# For `make coverage` it is "coverage", which counts how often each line runs.
# Python itself is not instrumented, so the sanitizer's library must be preloaded (.ci/sanitize.py). Of the native
# kernels there is the plain version alone: the others take an hour to compile so. Kernels from Metal text are left as
# they are, since ZINCMETAL_CHECKED checks every access and race of theirs. "thread" is for the core, its pool and its
# queue of steps, and leaves all kernels as they are.
if(ZINCMETAL_SANITIZE STREQUAL "address")
  set(SANITIZE_FLAGS -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(ZINCMETAL_SANITIZE STREQUAL "thread")
  set(SANITIZE_FLAGS -fsanitize=thread)
elseif(ZINCMETAL_SANITIZE STREQUAL "coverage")
  set(SANITIZE_FLAGS --coverage -fprofile-update=atomic -O1)
elseif(ZINCMETAL_SANITIZE)
  message(FATAL_ERROR "ZINCMETAL_SANITIZE is \"${ZINCMETAL_SANITIZE}\"; it takes address, thread or coverage")
endif()
function(zinc_sanitize target)
  if(ZINCMETAL_SANITIZE)
    target_compile_options(${target} PRIVATE ${SANITIZE_FLAGS} -fno-omit-frame-pointer -g1)
    target_link_options(${target} PRIVATE ${SANITIZE_FLAGS})
  endif()
endfunction()
