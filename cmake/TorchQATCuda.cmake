# Decides whether the CUDA kernels are built (TORCHQAT_CUDA = auto, on or off), and how.

# No CUDA kernels, because of `reason`: an error where they were asked for, else a warning nobody overlooks.
function(_torchqat_no_cuda reason)
  if(TORCHQAT_CUDA STREQUAL "on")
    message(FATAL_ERROR "torchqat: TORCHQAT_CUDA=on, but ${reason}")
  endif()
  message(WARNING "torchqat: building WITHOUT CUDA kernels, because ${reason} "
    "CUDA tensors will be refused. Say TORCHQAT_CUDA=off to build for the CPU without this warning.")
endfunction()

# An nvcc: CUDACXX, the PATH, the usual folder, or the one that PyPI's cuda-toolkit[nvcc,cccl] puts beside torch.
function(_torchqat_find_nvcc out)
  if(CMAKE_CUDA_COMPILER)
    set(${out} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
    return()
  endif()
  string(REGEX MATCH "^[0-9]+" major "${TORCHQAT_TORCH_CUDA}")
  find_program(TORCHQAT_NVCC nvcc NO_CACHE
    PATHS /usr/local/cuda/bin "${TORCHQAT_TORCH_DIR}/../nvidia/cu${major}/bin")
  if(DEFINED ENV{CUDACXX})
    set(TORCHQAT_NVCC "$ENV{CUDACXX}")
  endif()
  set(${out} "${TORCHQAT_NVCC}" PARENT_SCOPE)
endfunction()

# The release that `nvcc` says it is, e.g. 13.0.
function(_torchqat_nvcc_version nvcc out)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${text}")
  set(${out} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

function(_torchqat_decide_cuda out)
  set(${out} "" PARENT_SCOPE)
  if(NOT TORCHQAT_CUDA MATCHES "^(auto|on|off)$")
    message(FATAL_ERROR "torchqat: TORCHQAT_CUDA must be auto, on or off, got '${TORCHQAT_CUDA}'.")
  elseif(TORCHQAT_CUDA STREQUAL "off")
    message(STATUS "torchqat: CUDA kernels are off, as asked")
    return()
  elseif(NOT TARGET torchqat_torch::torch_cuda)
    _torchqat_no_cuda("torch ${TORCHQAT_TORCH_VERSION} is a CPU-only build.")
    return()
  endif()
  _torchqat_find_nvcc(nvcc)
  if(nvcc AND NOT EXISTS "${nvcc}")
    _torchqat_no_cuda("the nvcc that was named, ${nvcc}, is not there.")
    return()
  elseif(NOT nvcc)
    _torchqat_no_cuda("no nvcc was found. Install the CUDA toolkit ${TORCHQAT_TORCH_CUDA}, or its compiler from PyPI \
(pip install 'cuda-toolkit[nvcc,cccl]==${TORCHQAT_TORCH_CUDA}.*'), or name one with CUDACXX=<path of nvcc>.")
    return()
  endif()
  _torchqat_nvcc_version("${nvcc}" version)
  string(REGEX MATCH "^[0-9]+" toolkit_major "${version}")
  string(REGEX MATCH "^[0-9]+" torch_major "${TORCHQAT_TORCH_CUDA}")
  if(NOT toolkit_major STREQUAL torch_major)
    _torchqat_no_cuda("${nvcc} is of CUDA '${version}', and torch ${TORCHQAT_TORCH_VERSION} needs CUDA ${torch_major}.")
    return()
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

# A macro, because a language must be enabled in the scope that uses it.
macro(torchqat_find_cuda)
  set(TORCHQAT_WITH_CUDA OFF)
  _torchqat_decide_cuda(_torchqat_nvcc)
  if(_torchqat_nvcc)
    set(CMAKE_CUDA_COMPILER "${_torchqat_nvcc}")
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_ARCHITECTURES "${TORCHQAT_CUDA_ARCHITECTURES}")
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake before 3.26 does not know that nvcc can.
    endif()
    set(TORCHQAT_WITH_CUDA ON)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" TORCHQAT_NVCC_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
    message(STATUS "torchqat: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} by ${CMAKE_CUDA_COMPILER} "
      "(CUDA ${TORCHQAT_NVCC_VERSION}; torch has ${TORCHQAT_TORCH_CUDA})")
  endif()
endmacro()

# Keeps what ptxas says of each kernel and prints it as a table when the library is linked.
function(_torchqat_report_resources target)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    set(script ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/scripts/kernel_resources.py)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--resource-usage>)
    # A list of its own: where there is no ccache, an empty word at its end would be taken for the compiler.
    set(launcher ${script} record ${CMAKE_CUDA_COMPILER_LAUNCHER})
    set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
    add_custom_command(TARGET ${target} POST_BUILD COMMAND ${script} report ${PROJECT_BINARY_DIR} VERBATIM)
  endif()
endfunction()

# The CUDA runtime that torch itself loads: the wheel beside torch, which has no libcudart.so without a number, or the
# toolkit's. A second one, or a static one, would not know torch's streams.
function(_torchqat_find_cudart out)
  string(REGEX MATCH "^[0-9]+" major "${TORCHQAT_TORCH_CUDA}")
  find_library(TORCHQAT_CUDART NAMES libcudart.so.${major} cudart NO_CACHE REQUIRED
    HINTS "${TORCHQAT_TORCH_DIR}/../nvidia/cu${major}/lib"
    PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} /usr/local/cuda/lib64)
  set(${out} "${TORCHQAT_CUDART}" PARENT_SCOPE)
endfunction()

function(torchqat_add_cuda target)
  _torchqat_find_cudart(cudart)
  get_filename_component(folder "${cudart}" DIRECTORY)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY None TORCHQAT_CUDART_FOLDER "${folder}")
  target_link_libraries(${target} PRIVATE torchqat_torch::torch_cuda "${cudart}")
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;--extended-lambda;-Werror=cross-execution-space-call;-lineinfo;-Xcompiler=-Wall,-Wextra>)
  _torchqat_report_resources(${target})
endfunction()
