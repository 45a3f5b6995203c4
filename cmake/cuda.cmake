# Whether the compiled library has CUDA kernels, and for which architectures. Sets rmsnorm_cuda to on,
# off or emulated; when on, CUDA is enabled as a language and CMAKE_CUDA_ARCHITECTURES chosen.

set(RMSNORM_CUDA auto CACHE STRING
    "CUDA kernels: on, off, auto (where nvcc is found), pypi (by the nvcc of Python packages)")
set_property(CACHE RMSNORM_CUDA PROPERTY STRINGS auto on off pypi)
set(RMSNORM_CUDA_ARCHITECTURES "" CACHE STRING
    "As CMAKE_CUDA_ARCHITECTURES, which counts where this is empty; release: those of a wheel for every GPU")

# The nvcc of the packages cuda-toolkit[nvcc,crt,nvvm,cudart,cccl], from version 13 on. They lack two
# things that CMake looks for: a folder lib64, and libcudart.so without a version. The variable is for
# the linking that CMake tries while configuring; afterwards libraries have their paths.
function(rmsnorm_use_nvcc_of_python_packages)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import nvidia.cu13 as m; print(m.__path__[0])"
                  OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "rmsnorm: RMSNORM_CUDA=pypi needs the Python packages"
                        " cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2 in ${Python_EXECUTABLE}")
  endif()
  set(CMAKE_CUDA_COMPILER ${root}/bin/nvcc CACHE FILEPATH "CUDA compiler")
  set(CUDA_CUDART ${root}/lib/libcudart.so.13 CACHE FILEPATH "CUDA runtime")
  set(ENV{LIBRARY_PATH} "${root}/lib:$ENV{LIBRARY_PATH}")
endfunction()

# Those of the arguments after the first that the compiler knows.
function(rmsnorm_known_architectures result)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
  set(architectures)
  foreach(architecture IN LISTS ARGN)
    if(known MATCHES "compute_${architecture}\n")
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()

# Machine code for every GPU since Turing, and PTX for those to come.
function(rmsnorm_release_architectures result)
  rmsnorm_known_architectures(architectures 75 80 86 89 90 100 120)
  list(POP_BACK architectures newest)
  list(TRANSFORM architectures APPEND -real)
  set(${result} ${architectures} ${newest} PARENT_SCOPE)
endfunction()

# The GPUs of this machine. Asked of the driver, since CMake knows `native` from 3.24 on.
function(rmsnorm_architectures_here result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    set(capabilities)
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
  list(REMOVE_DUPLICATES capabilities)
  list(TRANSFORM capabilities REPLACE "\\." "")
  list(FILTER capabilities EXCLUDE REGEX "^([1-6].|7[0-4])$")  # before Turing
  rmsnorm_known_architectures(architectures ${capabilities})
  list(TRANSFORM architectures APPEND -real)
  set(${result} ${architectures} PARENT_SCOPE)
endfunction()

# A macro: a normal variable of the including scope.
macro(rmsnorm_choose_architectures)
  if(RMSNORM_CUDA_ARCHITECTURES STREQUAL "release")
    rmsnorm_release_architectures(CMAKE_CUDA_ARCHITECTURES)
  elseif(RMSNORM_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${RMSNORM_CUDA_ARCHITECTURES})
  elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # Half a minute for each architecture: the GPU that is here. Without one, a wheel is made for
    # another machine, of which nothing is known, and everything else for trying whether it compiles.
    rmsnorm_architectures_here(CMAKE_CUDA_ARCHITECTURES)
    if(NOT CMAKE_CUDA_ARCHITECTURES AND for_python)
      rmsnorm_release_architectures(CMAKE_CUDA_ARCHITECTURES)
    elseif(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 90)
    endif()
  endif()
endmacro()

string(TOLOWER "${RMSNORM_CUDA}" rmsnorm_cuda)
if(rmsnorm_cuda STREQUAL "auto")
  set(rmsnorm_cuda off)
  if(NOT CMAKE_CROSSCOMPILING)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(rmsnorm_cuda on)
    endif()
  endif()
  if(NOT rmsnorm_cuda)
    message(STATUS "rmsnorm: for the CPU alone, as no CUDA compiler was found (nvcc in PATH, or CUDACXX)")
  endif()
elseif(rmsnorm_cuda STREQUAL "pypi")
  rmsnorm_use_nvcc_of_python_packages()
  set(rmsnorm_cuda on)
elseif(rmsnorm_cuda STREQUAL "emulated")
  # For tests only: the kernels run on the CPU, thread by thread.
elseif(rmsnorm_cuda)
  set(rmsnorm_cuda on)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "rmsnorm: RMSNORM_CUDA=${RMSNORM_CUDA}, and no CUDA compiler was found (nvcc in PATH, or CUDACXX)")
  endif()
else()
  set(rmsnorm_cuda off)
endif()

if(rmsnorm_cuda STREQUAL "on")
  rmsnorm_choose_architectures()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
    message(FATAL_ERROR "rmsnorm: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old: 11.8 or later, or RMSNORM_CUDA=off")
  endif()
  message(STATUS "rmsnorm: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()
