# Finds torch and makes imported targets of it:
#   torchqat_torch::torch       what every C++ program needs (libtorch, libtorch_cpu, libc10)
#   torchqat_torch::torch_cuda  its CUDA half, where torch has one
# torch's own package (find_package(Torch)) refuses a CUDA build of torch on a machine without the CUDA toolkit.
#
# torch is a folder with include/ and lib/: that of the Python package, or LibTorch, the unpacked zip. The first of
#   1. -DTORCHQAT_TORCH_DIR=<folder>, where nothing else is tried
#   2. -DPython_EXECUTABLE=<python>: the torch that this Python would import
#   3. Torch_DIR, and CMAKE_PREFIX_PATH (also the environment variable): LibTorch's folder, or what Python prints as
#      torch.utils.cmake_prefix_path
#   4. in TorchQATConfig.cmake: the torch that the library itself loads (beside it in a wheel, else what it was built with)
#   5. the torch of any Python 3.11 or newer that find_package(Python) finds
#
# Where none is found, TORCHQAT_TORCH_PROBLEM says so, for the caller to raise. Else it is empty, and this sets
# TORCHQAT_TORCH_DIR, TORCHQAT_TORCH_VERSION (2.15.0+cu132), TORCHQAT_TORCH_MINOR (2.15) and TORCHQAT_TORCH_CUDA
# (13.2, or empty).

# Where Python would import torch from, without importing it; empty where it has none.
function(_torchqat_ask_python python out)
  set(code "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
  execute_process(COMMAND "${python}" -c "${code}" OUTPUT_VARIABLE dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

# The torch of Torch_DIR or CMAKE_PREFIX_PATH, empty where there is none; folders of the system are not searched.
function(_torchqat_torch_of_prefixes out)
  find_path(TORCHQAT_TORCH_PACKAGE TorchConfig.cmake NO_CACHE NO_DEFAULT_PATH PATH_SUFFIXES share/cmake/Torch Torch
    PATHS ${Torch_DIR} ${CMAKE_PREFIX_PATH} ENV CMAKE_PREFIX_PATH)
  set(dir "")
  if(TORCHQAT_TORCH_PACKAGE)
    get_filename_component(dir "${TORCHQAT_TORCH_PACKAGE}/../../.." ABSOLUTE)  # it is <torch>/share/cmake/Torch
  endif()
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

# The order above, from 2 on. `library_loads` is the folder of 4, or empty.
function(_torchqat_look_for_torch library_loads out)
  set(dir "")
  if(DEFINED CACHE{Python_EXECUTABLE})
    _torchqat_ask_python("$CACHE{Python_EXECUTABLE}" dir)
  endif()
  if(NOT dir)
    _torchqat_torch_of_prefixes(dir)
  endif()
  if(NOT dir AND EXISTS "${library_loads}/include/torch")
    get_filename_component(dir "${library_loads}" ABSOLUTE)
  endif()
  if(NOT dir)
    find_package(Python 3.11 QUIET COMPONENTS Interpreter)
    if(Python_EXECUTABLE)
      _torchqat_ask_python("${Python_EXECUTABLE}" dir)
    endif()
  endif()
  if(NOT dir)
    set(TORCHQAT_TORCH_PROBLEM "torchqat: no torch was found; name its folder (<site-packages>/torch, or LibTorch) with \
-DTORCHQAT_TORCH_DIR=<folder>, a Python that has it with -DPython_EXECUTABLE=<python>, or add it to CMAKE_PREFIX_PATH."
      PARENT_SCOPE)
  endif()
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

# The full version is in version.py (the Python package) or build-version (LibTorch); every torch has it in a header.
function(_torchqat_read_version)
  set(header "${TORCHQAT_TORCH_DIR}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${header}")  # an old torch, to be told apart from no torch
    set(header "${TORCHQAT_TORCH_DIR}/include/torch/csrc/api/include/torch/version.h")
  endif()
  set(text "")
  if(EXISTS "${header}")
    file(READ "${header}" text)
  endif()
  if(NOT text MATCHES "TORCH_VERSION_MAJOR ([0-9]+).*TORCH_VERSION_MINOR ([0-9]+).*TORCH_VERSION_PATCH ([0-9]+)")
    set(TORCHQAT_TORCH_PROBLEM "torchqat: ${TORCHQAT_TORCH_DIR} is not the folder of a torch: a Python package's \
(<site-packages>/torch) or LibTorch's, which have include/torch/headeronly/version.h." PARENT_SCOPE)
    return()
  endif()
  set(minor "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  set(version "${minor}.${CMAKE_MATCH_3}")
  set(cuda "")
  if(EXISTS "${TORCHQAT_TORCH_DIR}/version.py")
    file(READ "${TORCHQAT_TORCH_DIR}/version.py" text)
    if(text MATCHES "__version__ = '([^']+)'")
      set(version "${CMAKE_MATCH_1}")
    endif()
    if(text MATCHES "\ncuda[^=\n]*= '([0-9.]+)'")
      set(cuda "${CMAKE_MATCH_1}")
    endif()
  elseif(EXISTS "${TORCHQAT_TORCH_DIR}/build-version")
    file(STRINGS "${TORCHQAT_TORCH_DIR}/build-version" version LIMIT_COUNT 1)
    if(version MATCHES "\\+cu([0-9]+)([0-9])$")
      set(cuda "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    endif()
  endif()
  set(TORCHQAT_TORCH_VERSION "${version}" PARENT_SCOPE)
  set(TORCHQAT_TORCH_MINOR "${minor}" PARENT_SCOPE)
  set(TORCHQAT_TORCH_CUDA "${cuda}" PARENT_SCOPE)
endfunction()

# A macro, so that what it finds is known to the caller.
macro(torchqat_find_torch library_loads)
  set(TORCHQAT_TORCH_PROBLEM "")
  if(NOT TORCHQAT_TORCH_DIR)
    _torchqat_look_for_torch("${library_loads}" TORCHQAT_TORCH_DIR)
  endif()
  if(NOT TORCHQAT_TORCH_PROBLEM)
    _torchqat_read_version()
  endif()
endmacro()

# Sets `out` to the file of a library of torch.
function(_torchqat_library name out)
  set(file "${TORCHQAT_TORCH_DIR}/lib/lib${name}.so")
  if(NOT EXISTS "${file}")
    message(FATAL_ERROR "torchqat: ${file} is missing; is ${TORCHQAT_TORCH_DIR} a complete torch?")
  endif()
  set(${out} "${file}" PARENT_SCOPE)
endfunction()

function(_torchqat_imported name)
  _torchqat_library(${name} file)
  add_library(torchqat_torch::${name} SHARED IMPORTED GLOBAL)
  set(include "${TORCHQAT_TORCH_DIR}/include" "${TORCHQAT_TORCH_DIR}/include/torch/csrc/api/include")
  set_target_properties(torchqat_torch::${name} PROPERTIES
    IMPORTED_LOCATION "${file}"
    INTERFACE_INCLUDE_DIRECTORIES "${include}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${include}")
endfunction()

function(torchqat_add_torch_targets)
  if(TARGET torchqat_torch::torch)
    return()
  endif()
  _torchqat_imported(c10)
  _torchqat_imported(torch_cpu)
  # libtorch.so has no function that is called, but brings torch's CUDA half: a linker that drops unused libraries
  # (--as-needed, a default of some systems) must keep it.
  _torchqat_library(torch libtorch)
  add_library(torchqat_torch::torch INTERFACE IMPORTED GLOBAL)
  set_property(TARGET torchqat_torch::torch PROPERTY INTERFACE_LINK_LIBRARIES
    "-Wl,--push-state,--no-as-needed,\"${libtorch}\",--pop-state" torchqat_torch::torch_cpu torchqat_torch::c10)
  if(TORCHQAT_TORCH_CUDA AND EXISTS "${TORCHQAT_TORCH_DIR}/lib/libtorch_cuda.so")
    _torchqat_imported(c10_cuda)
    _torchqat_imported(torch_cuda)
    set_property(TARGET torchqat_torch::torch_cuda PROPERTY INTERFACE_LINK_LIBRARIES torchqat_torch::c10_cuda)
  endif()
endfunction()
