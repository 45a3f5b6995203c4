#include "case_grid.hpp"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace rmsnorm_test {
namespace {

constexpr DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32, f64 = DType::f64;

struct DTypes {
  DType x, weight, y;
};
constexpr DTypes common_dtypes[] = {
    {f16, f16, f16},   {bf16, bf16, bf16}, {f32, f32, f32},  {f64, f64, f64},  {f16, f32, f16},
    {bf16, f32, bf16}, {bf16, f32, f32},   {f32, f32, bf16}, {f32, bf16, f16}, {f16, bf16, f64},
};

Case with_dtypes(std::vector<std::int64_t> sizes, const DTypes& t) {
  Case c;
  c.sizes = std::move(sizes);
  c.x = tensor(t.x);
  c.weight = tensor(t.weight);
  c.y = tensor(t.y);
  return c;
}

void add_rstd(Case& c) { c.rstd = tensor(c.rstd_type()); }

// The options of the formulas in use, one by one. Each works on any dtypes.
using Option = void (*)(Case&);
constexpr Option options[] = {
    [](Case&) {},
    [](Case& c) { c.weight.present = false; },
    [](Case& c) { c.rounding = Rounding::before_weight; },
    [](Case& c) {
      c.rounding = Rounding::rstd;
      c.weight.present = false;
    },
    [](Case& c) { c.rounding = Rounding::rstd; },
    [](Case& c) { c.weight_offset = 1; },
    [](Case& c) {
      c.weight_offset = 1;
      c.rounding = Rounding::before_weight;
    },
    [](Case& c) { c.bias = tensor(c.weight.dtype); },
    [](Case& c) {
      c.bias = tensor(c.x.dtype);
      c.rounding = Rounding::before_weight;
    },
    [](Case& c) {
      c.weight.present = false;
      c.bias = tensor(c.y.dtype);
    },
    [](Case& c) { c.residual = tensor(c.x.dtype); },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
    },
    [](Case& c) {
      c.residual = tensor(c.y.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.round_residual = false;
      c.rounding = Rounding::before_weight;
    },
    [](Case& c) {
      c.residual = tensor(f32);
      c.residual_out = tensor(bf16);
    },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.round_residual = false;
      add_rstd(c);
    },
    [](Case& c) { c.partial = 0.0625; },
    [](Case& c) {
      c.partial = 0.7;
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.bias = tensor(f32);
    },
    [](Case& c) { add_rstd(c); },
    [](Case& c) { c.eps = 0; },
    [](Case& c) { c.mean_square = tensor(f32); },
    [](Case& c) {
      c.mean_square = tensor(f64);
      c.residual = tensor(c.x.dtype);
      c.rounding = Rounding::before_weight;
      add_rstd(c);
    },
    [](Case& c) { c.y_over = Alias::x, c.y.dtype = c.x.dtype; },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.residual_out_over = Alias::residual;
    },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.residual_out_over = Alias::residual;
      c.y_over = Alias::x, c.y.dtype = c.x.dtype;
    },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.residual_out = tensor(c.x.dtype);
      c.residual_out_over = Alias::x;
      c.round_residual = false;
    },
    [](Case& c) {
      c.residual = tensor(c.x.dtype);
      c.y_over = Alias::residual, c.y.dtype = c.x.dtype;
      c.bias = tensor(c.weight.dtype);
    },
};
constexpr std::size_t option_count = sizeof options / sizeof *options;
constexpr std::size_t dtypes_count = sizeof common_dtypes / sizeof *common_dtypes;

void set_layouts(Case& c, Layout inputs, Layout outputs) {
  c.x.layout = c.residual.layout = inputs;
  c.weight.layout = c.bias.layout = inputs;
  c.y.layout = c.residual_out.layout = outputs;
  c.mean_square.layout = c.rstd.layout = outputs;
}

std::vector<Case> sample(std::vector<Case> cases, std::size_t every) {
  if (!grid_is_small()) return cases;
  std::vector<Case> kept;
  for (std::size_t i = every / 2; i < cases.size(); i += every) kept.push_back(cases[i]);
  return kept;
}

}  // namespace

bool grid_is_small() {
  const char* grid = std::getenv("RMSNORM_TEST_GRID");
  return grid != nullptr && std::strcmp(grid, "small") == 0;
}

std::vector<Case> shape_cases() {
  constexpr std::int64_t lengths[] = {1,    2,    3,    4,    5,    7,    8,    9,    15,  16,
                                      17,   31,   32,   33,   47,   63,   64,   65,   95,  127,
                                      128,  129,  255,  256,  257,  287,  511,  512,  513, 769,
                                      1023, 1024, 1025, 2049, 4095, 4096, 4097, 65537};
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (const std::int64_t n : lengths) {
    if (grid_is_small() && n > 513 && n != 4097) continue;
    for (const std::int64_t rows : {0, 1, 3, 17}) {
      if (rows == 17 && n > 4096) continue;
      const std::size_t times = grid_is_small() ? (n > 200 ? 2 : 4) : (n > 5000 ? 6 : 24);
      if (grid_is_small() && rows == 17 && n > 33) continue;
      for (std::size_t i = 0; i < times; ++i, ++turn) {
        // Two coprime counters visit every pair.
        Case c = with_dtypes({rows, n}, common_dtypes[turn % dtypes_count]);
        options[turn * 7 % option_count](c);
        if (turn % 5 == 0) set_layouts(c, Layout::padded_rows, Layout::padded_rows);
        if (turn % 11 == 0) set_layouts(c, Layout::contiguous, Layout::inner_stride_two);
        cases.push_back(c);
      }
    }
  }
  return cases;
}

std::vector<Case> option_cases() {
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (const Option option : options) {
    for (const DTypes& dtypes : common_dtypes) {
      for (const std::int64_t n : {21, 96, 300}) {
        for (const Layout outputs : output_layouts) {
          Case c = with_dtypes({3, n}, dtypes);
          option(c);
          const Layout inputs = output_layouts[turn++ * 3 % 8];
          set_layouts(c, inputs, outputs);
          if (turn % 9 == 0 && c.y_over == Alias::none && c.residual_out_over == Alias::none) {
            c.x.layout = Layout::broadcast_rows;
          }
          cases.push_back(c);
        }
      }
    }
  }
  return sample(std::move(cases), 41);
}

std::vector<Case> alignment_cases() {
  std::vector<Case> cases;
  for (const DTypes& dtypes : common_dtypes) {
    for (int offset = 0; offset <= 16; ++offset) {
      for (const std::int64_t n : {31, 64, 129}) {
        Case c = with_dtypes({3, n}, dtypes);
        c.x.offset = offset;
        c.y.offset = offset * 5 % 17;
        c.weight.offset = offset * 3 % 17;
        if (offset % 4 == 2) c.x.shift = 1;
        if (offset % 4 == 3) {
          c.y.shift = c.weight.shift = 3;
          add_rstd(c);
          c.rstd.shift = 1;
        }
        if (offset % 3 == 1) {
          c.residual = tensor(c.x.dtype, Layout::contiguous, offset * 7 % 17);
          c.residual_out = tensor(c.x.dtype, Layout::contiguous, offset * 11 % 17);
        }
        cases.push_back(c);
      }
    }
  }
  return sample(std::move(cases), 19);
}

std::vector<Case> model_cases() {
  std::vector<Case> cases;
  for (const DTypes& dtypes : common_dtypes) {
    // A residual stream, each tensor with another row stride.
    Case stream = with_dtypes({6, 160}, dtypes);
    stream.residual = tensor(dtypes.x, Layout::gapped);
    stream.residual_out = tensor(dtypes.x, Layout::padded_rows);
    stream.y.layout = Layout::reversed_rows;
    cases.push_back(stream);
    // q of a packed projection, one weight for all heads, in place.
    Case q = with_dtypes({5, 4, 64}, dtypes);
    q.x.layout = Layout::packed_slice;
    q.y.dtype = dtypes.x;
    q.y_over = Alias::x;
    cases.push_back(q);
    // A weight per head; the same over groups of one row.
    Case heads = with_dtypes({5, 3, 72}, dtypes);
    heads.x.layout = Layout::packed_slice;
    heads.broadcast = Broadcast::per_head;
    heads.weight.layout = Layout::padded_rows;
    cases.push_back(heads);
    // The compressed part of a wider row.
    Case part = with_dtypes({7, 96}, dtypes);
    part.x.layout = Layout::padded_rows;
    add_rstd(part);
    cases.push_back(part);
    // Scale and shift per sample.
    Case modulated = with_dtypes({2, 5, 48}, dtypes);
    modulated.broadcast = Broadcast::per_sample;
    modulated.weight_offset = 1;
    cases.push_back(modulated);
    modulated.bias = tensor(dtypes.weight);
    cases.push_back(modulated);
  }
  return cases;
}

std::vector<Case> view_cases() {
  struct Shape {
    std::vector<std::int64_t> sizes;
    std::int32_t axis;
  };
  // All negative axes have a positive sibling; sizes of one have strides that do not count.
  const Shape shapes[] = {
      {{5, 4, 64}, -1},    {{5, 4, 64}, 1},
      {{2, 3, 4, 33}, -1}, {{2, 3, 5, 7}, 2},
      {{3, 5, 70}, -2},    {{2, 2, 3, 40}, 1},
      {{6, 1, 80}, -1},    {{4, 1, 1, 90}, -3},
      {{37}, 0},           {{300}, -1},
      {{2, 9, 11}, 0},     {{0, 4, 32}, -1},
      {{3, 0, 32}, -1},    {{2, 1, 2, 1, 2, 1, 3, 50}, -2},
  };
  std::vector<Case> cases;
  std::size_t turn = 0;
  for (const Shape& shape : shapes) {
    for (const Layout inputs : output_layouts) {
      for (const Broadcast broadcast :
           {Broadcast::shared, Broadcast::per_head, Broadcast::per_sample}) {
        for (int i = 0; i < 4; ++i, ++turn) {
          Case c = with_dtypes(shape.sizes, common_dtypes[turn % dtypes_count]);
          c.axis = shape.axis;
          options[turn * 5 % option_count](c);
          const Layout outputs = output_layouts[(turn * 3 + turn / 8) % 8];
          set_layouts(c, inputs, outputs);
          c.broadcast = broadcast;
          c.weight.layout = outputs;
          c.bias.layout = turn % 3 == 0 ? Layout::broadcast_rows : inputs;
          if (turn % 2 == 0) add_rstd(c);
          if (turn % 2 == 0) c.rstd.layout = outputs;
          cases.push_back(c);
        }
      }
    }
  }
  return sample(std::move(cases), 23);
}

const std::vector<Case>& all_cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> cases = shape_cases();
    for (const std::vector<Case>& more :
         {option_cases(), alignment_cases(), model_cases(), view_cases()}) {
      cases.insert(cases.end(), more.begin(), more.end());
    }
    return cases;
  }();
  return all;
}

}  // namespace rmsnorm_test
