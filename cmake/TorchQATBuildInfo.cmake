# The facts of a build: compiled into the library (torchqat::build_info), and as JSON beside it, where Python reads
# them before it loads the library.

set(TORCHQAT_COMMIT "")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS "${PROJECT_SOURCE_DIR}/.git")
  execute_process(COMMAND ${GIT_EXECUTABLE} describe --always --dirty --abbrev=12 --exclude=*
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} OUTPUT_VARIABLE TORCHQAT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  # Another commit configures anew. In a worktree these files lie elsewhere than in .git.
  foreach(file HEAD logs/HEAD)
    execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --git-path ${file}
      WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} OUTPUT_VARIABLE path OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    cmake_path(ABSOLUTE_PATH path BASE_DIRECTORY ${PROJECT_SOURCE_DIR})
    if(EXISTS "${path}" AND NOT IS_DIRECTORY "${path}")
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${path}")
    endif()
  endforeach()
endif()
set(cuda_version "")
set(architectures "")
set(TORCHQAT_CUDA_JSON null)
set(TORCHQAT_ARCHITECTURES_JSON "")
set(TORCHQAT_COMMIT_JSON null)
if(TORCHQAT_COMMIT)
  set(TORCHQAT_COMMIT_JSON "\"${TORCHQAT_COMMIT}\"")
endif()
if(TORCHQAT_WITH_CUDA)
  set(cuda_version ${TORCHQAT_NVCC_VERSION})
  set(TORCHQAT_CUDA_JSON "\"${TORCHQAT_NVCC_VERSION}\"")
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "(.+)" "\"\\1\"" OUTPUT_VARIABLE TORCHQAT_ARCHITECTURES_JSON)
  list(JOIN TORCHQAT_ARCHITECTURES_JSON ", " TORCHQAT_ARCHITECTURES_JSON)
endif()
configure_file(cmake/build_info.json.in libtorchqat.json @ONLY)
set_source_files_properties(csrc/torchqat/build_info.cpp PROPERTIES COMPILE_DEFINITIONS
  "TORCHQAT_VERSION=\"${PROJECT_VERSION}\";TORCHQAT_TORCH_VERSION=\"${TORCHQAT_TORCH_VERSION}\";\
TORCHQAT_CUDA_VERSION=\"${cuda_version}\";TORCHQAT_ARCHITECTURES=\"${architectures}\";\
TORCHQAT_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\";TORCHQAT_COMMIT=\"${TORCHQAT_COMMIT}\"")
