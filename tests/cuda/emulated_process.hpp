// Death tests that succeed: a test on another machine than the other tests', in a process of its
// own.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>

namespace rmsnorm_test {

template <class Test>
[[noreturn]] void run_and_exit(const Test& test) {
  test();
  std::exit(testing::Test::HasFailure() ? 1 : 0);
}

}  // namespace rmsnorm_test
