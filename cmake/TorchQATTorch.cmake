# Finds the torch that is installed as a Python package, without importing it, and makes imported targets of it:
#   torchqat_torch::torch       what every C++ program needs (libtorch, libtorch_cpu, libc10)
#   torchqat_torch::torch_cuda  its CUDA half, where torch has one
# torch's own package (find_package(Torch)) refuses a CUDA build of torch on a machine without the CUDA toolkit.
#
# In:  TORCHQAT_TORCH_DIR (the folder of the torch package), or else the Python that find_package(Python) finds.
# Out: TORCHQAT_TORCH_DIR, TORCHQAT_TORCH_VERSION (2.15.0+cu132), TORCHQAT_TORCH_MINOR (2.15),
#      TORCHQAT_TORCH_CUDA (13.2, or empty)

function(_torchqat_ask_python out)
  find_package(Python 3.11 COMPONENTS Interpreter)
  if(NOT Python_EXECUTABLE)
    message(FATAL_ERROR "torchqat: no Python 3.11 or newer to ask where torch is. "
      "Pass -DPython_EXECUTABLE=<python> or -DTORCHQAT_TORCH_DIR=<site-packages>/torch.")
  endif()
  set(code "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${code}"
    OUTPUT_VARIABLE dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(NOT dir)
    message(FATAL_ERROR "torchqat: ${Python_EXECUTABLE} has no torch. Install it (pip install -c constraints.txt torch), "
      "or pass -DPython_EXECUTABLE=<python> or -DTORCHQAT_TORCH_DIR=<site-packages>/torch.")
  endif()
  set(${out} "${dir}" PARENT_SCOPE)
endfunction()

function(_torchqat_imported name)
  set(file "${TORCHQAT_TORCH_DIR}/lib/lib${name}.so")
  if(NOT EXISTS "${file}")
    message(FATAL_ERROR "torchqat: ${file} is missing; is ${TORCHQAT_TORCH_DIR} a complete torch?")
  endif()
  add_library(torchqat_torch::${name} SHARED IMPORTED GLOBAL)
  set_target_properties(torchqat_torch::${name} PROPERTIES
    IMPORTED_LOCATION "${file}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES
      "${TORCHQAT_TORCH_DIR}/include;${TORCHQAT_TORCH_DIR}/include/torch/csrc/api/include")
  set_property(TARGET torchqat_torch::${name} PROPERTY
    INTERFACE_INCLUDE_DIRECTORIES "${TORCHQAT_TORCH_DIR}/include;${TORCHQAT_TORCH_DIR}/include/torch/csrc/api/include")
endfunction()

function(_torchqat_read_version)
  file(READ "${TORCHQAT_TORCH_DIR}/version.py" text)
  string(REGEX MATCH "__version__ = '(([0-9]+\\.[0-9]+)[^']*)'" _ "${text}")
  set(TORCHQAT_TORCH_VERSION "${CMAKE_MATCH_1}" PARENT_SCOPE)
  set(TORCHQAT_TORCH_MINOR "${CMAKE_MATCH_2}" PARENT_SCOPE)
  set(cuda "")
  if(text MATCHES "\ncuda[^=\n]*= '([0-9.]+)'")
    set(cuda "${CMAKE_MATCH_1}")
  endif()
  set(TORCHQAT_TORCH_CUDA "${cuda}" PARENT_SCOPE)
endfunction()

# A macro, so that what it finds is known to the caller.
macro(torchqat_find_torch)
  if(NOT TORCHQAT_TORCH_DIR)
    _torchqat_ask_python(TORCHQAT_TORCH_DIR)
  endif()
  if(NOT EXISTS "${TORCHQAT_TORCH_DIR}/version.py")
    message(FATAL_ERROR "torchqat: TORCHQAT_TORCH_DIR=${TORCHQAT_TORCH_DIR} is not the folder of a torch package.")
  endif()
  _torchqat_read_version()
  if(NOT TARGET torchqat_torch::torch)
    _torchqat_imported(c10)
    _torchqat_imported(torch_cpu)
    _torchqat_imported(torch)
    set_property(TARGET torchqat_torch::torch PROPERTY
      INTERFACE_LINK_LIBRARIES torchqat_torch::torch_cpu torchqat_torch::c10)
    if(TORCHQAT_TORCH_CUDA AND EXISTS "${TORCHQAT_TORCH_DIR}/lib/libtorch_cuda.so")
      _torchqat_imported(c10_cuda)
      _torchqat_imported(torch_cuda)
      set_property(TARGET torchqat_torch::torch_cuda PROPERTY INTERFACE_LINK_LIBRARIES torchqat_torch::c10_cuda)
    endif()
  endif()
endmacro()
