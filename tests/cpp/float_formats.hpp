// The four formats, written apart from the library and differently: values are decoded by powers of
// two and rounded by nearbyint on a scaled value, where the library works on bits.
#pragma once

#include <cstdint>

#include "rmsnorm/contract.hpp"

namespace rmsnorm_test {

using rmsnorm::DType;

constexpr DType all_dtypes[] = {DType::f16, DType::bf16, DType::f32, DType::f64};

// Finite nonzero values are m * 2^(e - precision + 1) with integers m < 2^precision, e >=
// min_exponent.
struct Format {
  int precision;
  int min_exponent;
  int max_exponent;
};

constexpr Format format_of(DType t) {
  return t == DType::f16    ? Format{11, -14, 15}
         : t == DType::bf16 ? Format{8, -126, 127}
         : t == DType::f32  ? Format{24, -126, 127}
                            : Format{53, -1022, 1023};
}

// The value of a bit pattern. Every value of every format is a double.
double decode(DType t, std::uint64_t bits);

// The bit pattern of a value of the format; any NaN becomes the positive quiet one.
std::uint64_t encode(DType t, double value);

// The nearest value of the format, ties to even, as a double.
double round_to(DType t, double value);

// Size of a unit in the last place of the format at v.
long double ulp_at(DType t, long double v);

// |got - exact| in ulps of the format at `exact`. Zero when both are infinite or NaN alike, or when
// exact lies so high that it rounds to the infinity that came; infinite when only one is NaN.
double ulp_error(DType t, long double exact, double got);

bool is_nan(DType t, std::uint64_t bits);
bool is_signalling_nan(DType t, std::uint64_t bits);

// Equal bits, or both NaN.
inline bool same(DType t, std::uint64_t a, std::uint64_t b) {
  return a == b || (is_nan(t, a) && is_nan(t, b));
}

std::uint64_t load_bits(DType t, const void* p);
void store_bits(DType t, void* p, std::uint64_t bits);

// Splitmix64: the same numbers everywhere, which std's distributions do not promise.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(n));
  }
  // Uniform in [-1, 1).
  double symmetric() {
    return static_cast<double>(static_cast<std::int64_t>(bits()) >> 11) * 0x1p-52;
  }
  // Three uniforms: bell-shaped in [-3, 3), variance 1, which is what activations look like.
  double bell() { return symmetric() + symmetric() + symmetric(); }

 private:
  std::uint64_t state_;
};

}  // namespace rmsnorm_test
