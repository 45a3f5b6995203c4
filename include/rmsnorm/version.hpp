// The version of the library, read from here by CMake and by the Python package.
#pragma once

#define RMSNORM_VERSION_MAJOR 0
#define RMSNORM_VERSION_MINOR 1
#define RMSNORM_VERSION_PATCH 0
#define RMSNORM_VERSION "0.1.0"
