# The installation: library, its build facts, headers and CMake package. The Python package takes the same installation,
# with its own folder as the prefix.
include(CMakePackageConfigHelpers)

# From <site-packages>/torchqat/lib to torch's libraries and to the CUDA libraries that come as wheels. A wheel keeps
# only these; any other installation also keeps the absolute folders it was linked with.
string(REGEX MATCH "^[0-9]+" cuda_major "${TORCHQAT_TORCH_CUDA}")
set(rpath "$ORIGIN/../../torch/lib" "$ORIGIN/../../nvidia/cu${cuda_major}/lib")
if(TORCHQAT_ABSOLUTE_RPATH)
  list(APPEND rpath "${TORCHQAT_TORCH_DIR}/lib")
  if(TORCHQAT_WITH_CUDA)
    get_target_property(cudart_folder torchqat TORCHQAT_CUDART_FOLDER)
    list(APPEND rpath "${cudart_folder}")
  endif()
endif()
set_target_properties(torchqat PROPERTIES INSTALL_RPATH "${rpath}")

# ------------------------------------------------------------------------------------------------- the headers
# A header is public, and installed, unless it is named here. Public ones include no private ones; a test compiles each
# of them by itself from an installation.
set(TORCHQAT_PRIVATE_HEADERS
  checkpoint_checks.h
  cpu
  ops/affinity_products.h
  ops/autograd_node.h
  ops/bcgd_step_device.h
  ops/dtypes.h
  ops/feature_affinity_loss_device.h
  ops/layer_node.h
  ops/layers.h
  ops/layout.h
  ops/not_differentiable.h
  ops/pack_codes_device.h
  ops/quantize_weight_device.h
  ops/recipe.h
  ops/staircase_relu_device.h
  ops/ste.h
  ops/step_size.h
  optim/checks.h
  optim/latents.h
  safetensors_files.h
  safetensors_header.h
)
set(exclude "")
foreach(header IN LISTS TORCHQAT_PRIVATE_HEADERS)
  list(APPEND exclude PATTERN "torchqat/${header}" EXCLUDE)
endforeach()
install(DIRECTORY csrc/torchqat DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" ${exclude})

# ------------------------------------------------------------------------------------- library and CMake package
# TorchQATConfig.cmake, for the build folder and for an installation. They differ in where the torch lies that the
# library loads by its rpath: from a wheel's lib/cmake/TorchQAT it is found as a neighbour of the Python package.
set(TORCHQAT_PACKAGE_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/TorchQAT")
set(TORCHQAT_LIBRARY_LOADS "${TORCHQAT_TORCH_DIR}")
configure_file(cmake/TorchQATConfig.cmake.in TorchQATConfig.cmake @ONLY)
if(NOT TORCHQAT_ABSOLUTE_RPATH)
  set(TORCHQAT_LIBRARY_LOADS "\${CMAKE_CURRENT_LIST_DIR}/../../../../torch")
endif()
configure_file(cmake/TorchQATConfig.cmake.in installed/TorchQATConfig.cmake @ONLY)
write_basic_package_version_file(TorchQATConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(cmake/TorchQATTorch.cmake TorchQATTorch.cmake COPYONLY)

install(TARGETS torchqat EXPORT TorchQATTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PROJECT_BINARY_DIR}/libtorchqat.json DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT TorchQATTargets NAMESPACE TorchQAT:: DESTINATION ${TORCHQAT_PACKAGE_DIR})
install(FILES
  ${PROJECT_BINARY_DIR}/installed/TorchQATConfig.cmake
  ${PROJECT_BINARY_DIR}/TorchQATConfigVersion.cmake
  cmake/TorchQATTorch.cmake
  DESTINATION ${TORCHQAT_PACKAGE_DIR})
export(EXPORT TorchQATTargets NAMESPACE TorchQAT:: FILE TorchQATTargets.cmake)
