# For tests only: the CUDA half of the compiled library with the kernels run on the CPU by the emulation
# of tests/cuda, so that what calls the library can be tested where there is no GPU.

set(emulation ${PROJECT_SOURCE_DIR}/tests/cuda/emulation)
set(sources src/cuda.cu src/cuda_devices.cpp
  ${emulation}/contexts.cpp ${emulation}/fibre.cpp ${emulation}/host_interface.cpp
  ${emulation}/scheduler.cpp ${emulation}/stream_order.cpp)
target_sources(rmsnorm PRIVATE ${sources})
set_source_files_properties(${sources} PROPERTIES
  LANGUAGE CXX
  INCLUDE_DIRECTORIES ${emulation}
  COMPILE_DEFINITIONS
    "RMSNORM_CUDA_EMULATED=1;__CUDA_ARCH__=900;RMSNORM_CUDA_ARCHITECTURES=\"emulated\""
  # Device code may read memory as another type than it was written, and rounds every operation.
  # gcc's SLP vectorization: see tests/cuda/CMakeLists.txt.
  COMPILE_OPTIONS "-fno-strict-aliasing;-ffp-contract=off;-fno-tree-slp-vectorize;-Wno-unknown-pragmas")
