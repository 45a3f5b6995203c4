# The CUDA half of the compiled library.

# CUDA's runtime is linked statically and finds the driver when it is first called: what is linked to
# the library loads on machines without one.
target_sources(rmsnorm PRIVATE src/cuda.cu src/cuda_devices.cpp)
target_link_libraries(rmsnorm PRIVATE CUDA::cudart_static)
set_target_properties(rmsnorm PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_EXTENSIONS OFF)

# One architecture for each core at a time.
set(options --threads=0)
# The smallest form takes a driver that knows it, as all do that run CUDA 13.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13)
  list(APPEND options -Xfatbin=-compress-all)
else()
  list(APPEND options --compress-mode=size)
endif()
target_compile_options(rmsnorm PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${options}>")

list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "-(real|virtual)$" "" OUTPUT_VARIABLE architectures)
list(JOIN architectures "\\;" architectures)
set_source_files_properties(src/cuda_devices.cpp PROPERTIES
  COMPILE_DEFINITIONS "RMSNORM_CUDA_ARCHITECTURES=\"${architectures}\"")
