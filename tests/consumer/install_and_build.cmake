# cmake -DBUILD_DIR=<build tree of rmsnorm> -DWORK_DIR=<scratch> -DGENERATOR= -DC_COMPILER=
#       -DCXX_COMPILER= [-DCUDA=ON] -P install_and_build.cmake
#
# Installs rmsnorm into a fresh prefix, moves the prefix, and builds and runs the project beside this
# file against it, without optimisation: a build that the unit tests do not make. CUDA adds a program that
# the nvcc of the build tree compiles.
cmake_minimum_required(VERSION 3.18...4.0)

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE result OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGV " " command)
    message(FATAL_ERROR "${command}\n${output}")
  endif()
endfunction()

set(cuda)
if(CUDA)
  load_cache(${BUILD_DIR} READ_WITH_PREFIX tree_ CMAKE_CUDA_COMPILER CUDA_CUDART)
  set(cuda -DCONSUMER_CUDA=ON -DCMAKE_CUDA_COMPILER=${tree_CMAKE_CUDA_COMPILER}
      -DCUDA_CUDART=${tree_CUDA_CUDART})
  # As in cmake/cuda.cmake.
  get_filename_component(libraries ${tree_CUDA_CUDART} DIRECTORY)
  set(ENV{LIBRARY_PATH} "${libraries}:$ENV{LIBRARY_PATH}")
endif()
file(REMOVE_RECURSE ${WORK_DIR})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${WORK_DIR}/installed)
# Nothing in the installation may point to where it was made.
file(RENAME ${WORK_DIR}/installed ${WORK_DIR}/moved)
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${WORK_DIR}/build -G ${GENERATOR}
    -DCMAKE_C_COMPILER=${C_COMPILER}
    -DCMAKE_CXX_COMPILER=${CXX_COMPILER}
    -DCMAKE_PREFIX_PATH=${WORK_DIR}/moved ${cuda})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
run(${CMAKE_CTEST_COMMAND} --test-dir ${WORK_DIR}/build --output-on-failure --no-tests=error)
