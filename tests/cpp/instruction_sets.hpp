// The instruction sets that these tests run.
#pragma once

#include <vector>

#include "rmsnorm/rmsnorm.hpp"

namespace rmsnorm_test {

// Everything that can run here, scalar first.
std::vector<rmsnorm::cpu::Isa> available_isas();

// RMSNORM_TEST_GRID=small: a sample of the cases, for emulators.
bool grid_is_small();

}  // namespace rmsnorm_test
