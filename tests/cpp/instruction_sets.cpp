#include "instruction_sets.hpp"

#include <cstdlib>
#include <cstring>

namespace rmsnorm_test {

using rmsnorm::cpu::Isa;

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::neon}) {
    if (rmsnorm::cpu::available(isa)) isas.push_back(isa);
  }
  return isas;
}

bool grid_is_small() {
  const char* grid = std::getenv("RMSNORM_TEST_GRID");
  return grid != nullptr && std::strcmp(grid, "small") == 0;
}

}  // namespace rmsnorm_test
