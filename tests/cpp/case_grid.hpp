// The grid of cases, shape x dtype x semantics x layout, over which the tests run. It is the same
// list every time; the small one is a sample of the full one for emulators.
#pragma once

#include <vector>

#include "forward_problem.hpp"

namespace rmsnorm_test {

// RMSNORM_TEST_GRID=small: a sample of the cases, for emulators.
bool grid_is_small();

// Every row length around the block and vector sizes, 0 to 17 rows, dtypes and options taking
// turns.
std::vector<Case> shape_cases();

// Every option with every common combination of dtypes and every layout, at a few lengths.
std::vector<Case> option_cases();

// Every element offset of x, y and weight from a 64-byte boundary, and unaligned elements.
std::vector<Case> alignment_cases();

// The shapes of models, through the kernels that they are for; also the small grid has all of them.
std::vector<Case> model_cases();

// Several row dimensions, several normalised dimensions, slices of packed projections, weights per
// head and per sample, outputs over inputs.
std::vector<Case> view_cases();

// All of the above.
const std::vector<Case>& all_cases();

}  // namespace rmsnorm_test
