// The instruction sets that these tests run.
#pragma once

#include <vector>

#include "rmsnorm/rmsnorm.hpp"

namespace rmsnorm_test {

// Everything that can run here, scalar first.
std::vector<rmsnorm::cpu::Isa> available_isas();

}  // namespace rmsnorm_test
