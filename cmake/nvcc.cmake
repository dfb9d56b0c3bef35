# Finds nvcc, sees that it can compile the kernels, and enables the CUDA language; sets FREEDAVE_HAS_CUDA and the
# architectures. What is wrong is said in one line, with the remedy, before CMake or nvcc can say it in fifty.
#
# FREEDAVE_CUDA=auto builds without CUDA only where there is no nvcc at all. One that does not work stops the build: a
# package without its CUDA kernels must not come out of a machine that meant to build them.
set(FREEDAVE_NVCC_OLDEST 12.0)  # C++20 in device code

function(freedave_nvcc_failure what remedy)
  # The space in front keeps CMake from wrapping the line.
  message(FATAL_ERROR " freedave-kernels: ${what}; ${remedy}, or build without CUDA: FREEDAVE_CUDA=off")
endfunction()

if(CMAKE_CUDA_COMPILER)
  set(nvcc ${CMAKE_CUDA_COMPILER})
elseif(DEFINED ENV{CUDACXX})
  set(nvcc $ENV{CUDACXX})
else()
  find_program(FREEDAVE_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(FREEDAVE_NVCC)
    set(nvcc ${FREEDAVE_NVCC})
  endif()
endif()
if(NOT nvcc)
  if(FREEDAVE_CUDA STREQUAL "on")
    freedave_nvcc_failure("FREEDAVE_CUDA=on, but nvcc was not found"
                          "install the CUDA toolkit and put nvcc on PATH or set CUDACXX")
  endif()
  message(STATUS "No nvcc found: building without CUDA kernels")
  return()
endif()

execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
if(result OR NOT output MATCHES "release ([0-9]+\\.[0-9]+)")
  freedave_nvcc_failure("${nvcc} does not run as nvcc" "install the CUDA toolkit and put nvcc on PATH or set CUDACXX")
endif()
set(version ${CMAKE_MATCH_1})
if(version VERSION_LESS FREEDAVE_NVCC_OLDEST)
  freedave_nvcc_failure("nvcc ${version} (${nvcc}) is too old for the kernels, which need CUDA ${FREEDAVE_NVCC_OLDEST}"
                        "install a newer CUDA toolkit and put its nvcc on PATH or set CUDACXX")
endif()

# Architectures: those asked for; those of the GPUs here; or those of ours that this nvcc knows. Each takes about half a
# minute of processor time, so where there are GPUs that the kernels and this nvcc serve, they are enough.
execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE output RESULT_VARIABLE result)
string(REGEX MATCHALL "compute_[0-9]+" known "${output}")
list(TRANSFORM known REPLACE "compute_" "")
set(ours)
foreach(arch IN LISTS FREEDAVE_CUDA_ARCHS_DEFAULT)
  if(arch IN_LIST known)
    list(APPEND ours ${arch})
  endif()
endforeach()
execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                OUTPUT_VARIABLE output RESULT_VARIABLE result ERROR_QUIET)
set(here)
if(result EQUAL 0)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" here "${output}")
  list(TRANSFORM here REPLACE "\\." "")
  list(REMOVE_DUPLICATES here)
endif()
if(FREEDAVE_CUDA_ARCHS STREQUAL "native")
  if(NOT here)
    freedave_nvcc_failure("FREEDAVE_CUDA_ARCHS=native, but nvidia-smi names no GPU here"
                          "name the architectures (FREEDAVE_CUDA_ARCHS=90 is an H100) or take FREEDAVE_CUDA_ARCHS=all")
  endif()
  set(FREEDAVE_CUDA_ARCHS ${here})
elseif(FREEDAVE_CUDA_ARCHS STREQUAL "all")
  set(FREEDAVE_CUDA_ARCHS ${ours})
elseif(FREEDAVE_CUDA_ARCHS MATCHES "^(auto)?$")
  set(FREEDAVE_CUDA_ARCHS ${here})
  foreach(arch IN LISTS here)
    if(arch LESS 80 OR NOT arch IN_LIST known)
      set(FREEDAVE_CUDA_ARCHS ${ours})
    endif()
  endforeach()
  if(NOT here)
    set(FREEDAVE_CUDA_ARCHS ${ours})
  endif()
endif()
foreach(arch IN LISTS FREEDAVE_CUDA_ARCHS)
  string(REGEX REPLACE "^([0-9]+)[af]?(-real|-virtual)?$" "\\1" number "${arch}")
  if(number MATCHES "^[0-9]+$" AND number LESS 80)
    freedave_nvcc_failure("the kernels need architecture 80 or later, FREEDAVE_CUDA_ARCHS asks for ${arch}"
                          "take 80 (A100), 86, 89, 90 (H100), 100 (B200) or 120")
  endif()
  if(number MATCHES "^[0-9]+$" AND NOT number IN_LIST known)
    list(JOIN known " " names)
    freedave_nvcc_failure("nvcc ${version} cannot compile for architecture ${arch} (it knows ${names})"
                          "set FREEDAVE_CUDA_ARCHS to architectures that it knows, or install another CUDA toolkit")
  endif()
endforeach()
list(JOIN FREEDAVE_CUDA_ARCHS " " names)
message(STATUS "CUDA kernels for architectures: ${names}")

# The host compiler: nvcc refuses those newer than itself.
set(probe ${CMAKE_BINARY_DIR}/nvcc_probe.cu)
file(WRITE ${probe} "#include <cuda_runtime.h>\n__global__ void probe(int* x) { *x = 1; }\n")
set(host)
if(DEFINED ENV{CUDAHOSTCXX})
  set(host -ccbin $ENV{CUDAHOSTCXX})
endif()
execute_process(COMMAND ${nvcc} -std=c++20 ${host} -c ${probe} -o ${probe}.o
                OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
if(result)
  if(output MATCHES "unsupported (GNU|clang|Microsoft)")
    set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
    freedave_nvcc_failure("nvcc ${version} does not support the host compiler (${compiler})"
                          "install an older one and name it, for example CUDAHOSTCXX=g++-12")
  endif()
  string(REGEX MATCH "[^\n]*[Ee]rror[^\n]*" line "${output}")
  freedave_nvcc_failure("nvcc ${version} (${nvcc}) cannot compile: ${line}"
                        "repair the CUDA toolkit or set CUDACXX to another nvcc")
endif()

set(ENV{CUDACXX} ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES ${FREEDAVE_CUDA_ARCHS})
enable_language(CUDA)
set(FREEDAVE_HAS_CUDA 1)
