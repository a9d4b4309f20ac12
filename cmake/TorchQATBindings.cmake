# The optional pybind11 module torchqat._bindings, for the Python that torch was found through. torch brings pybind11.
# It is installed as the component `python`, into the Python package alone. The target torchqat_python is all that
# the package takes.
add_custom_target(torchqat_python DEPENDS torchqat)
find_package(Python QUIET COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND OR NOT EXISTS "${TORCHQAT_TORCH_DIR}/_C.${Python_SOABI}.so")
  message(STATUS "torchqat: torchqat._bindings is left out (no Python headers, or a torch of another Python or of none)")
  return()
endif()
Python_add_library(torchqat_bindings MODULE WITH_SOABI python/torchqat/bindings.cpp)
set_target_properties(torchqat_bindings PROPERTIES OUTPUT_NAME _bindings CXX_VISIBILITY_PRESET hidden
  INSTALL_RPATH "$ORIGIN/lib;$ORIGIN/../torch/lib")
target_compile_options(torchqat_bindings PRIVATE -Wall -Wextra)
target_link_libraries(torchqat_bindings PRIVATE torchqat "${TORCHQAT_TORCH_DIR}/lib/libtorch_python.so")
add_dependencies(torchqat_python torchqat_bindings)
install(TARGETS torchqat_bindings LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
