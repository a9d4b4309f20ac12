# The installation: library, its build facts, headers and CMake package. The Python package
# takes the same installation, with its own folder as the prefix.
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

set(TORCHQAT_PACKAGE_DIR "${CMAKE_INSTALL_LIBDIR}/cmake/TorchQAT")
install(TARGETS torchqat EXPORT TorchQATTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${PROJECT_BINARY_DIR}/libtorchqat.json DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY csrc/torchqat DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING
  PATTERN "*.h" PATTERN "cpu" EXCLUDE)
install(EXPORT TorchQATTargets NAMESPACE TorchQAT:: DESTINATION ${TORCHQAT_PACKAGE_DIR})

configure_package_config_file(cmake/TorchQATConfig.cmake.in TorchQATConfig.cmake
  INSTALL_DESTINATION ${TORCHQAT_PACKAGE_DIR})
write_basic_package_version_file(TorchQATConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/TorchQATConfig.cmake
  ${PROJECT_BINARY_DIR}/TorchQATConfigVersion.cmake
  cmake/TorchQATTorch.cmake
  DESTINATION ${TORCHQAT_PACKAGE_DIR})
