// The sums of squares of rows and what follows from them, included by kernels.inl.

// ---- sum of squares ----
//
// Four accumulators, chosen by what the result can show (docs/numerics.md). Each takes 32 elements
// by take_set(p), or two registers of them while they are being made by take(k, two), k as in
// RegistersOfSet; those that are not taken count as zeros. An accumulator goes on from the sum of
// the blocks before, of its type Sum, which starts as nothing(), and ends its block with flush().

// The eight double lanes of a row's sum, in registers.
struct EightLanes {
  static constexpr int width = Lanes<double>::width;
  static constexpr int count = 8 / width;
  f64v v[count];

  static EightLanes zeros() {
    EightLanes lanes;
    for_each_register<count>([&lanes](int u) { lanes.v[u] = splat(0.0); });
    return lanes;
  }
  static EightLanes of(const double (&values)[8]) {
    EightLanes lanes;
    for_each_register<count>([&](int u) { lanes.v[u] = load(values + u * width); });
    return lanes;
  }
  void store_to(double (&values)[8]) const {
    for_each_register<count>([&](int u) { store(values + u * width, v[u]); });
  }
};

// Adds lanes j + 16 to lanes j in the type of the lanes, and the sums j and j + 8 to double lane j.
template <int i>
inline f64v double_lanes(const Lanes<float>& v) {
  constexpr int first = i * Lanes<double>::width;
  return half<(first % Lanes<float>::width) / Lanes<double>::width>(
      v.v[first / Lanes<float>::width]);
}
template <int i>
inline f64v double_lanes(const Lanes<double>& v) {
  return v.v[i];
}

template <int i, class A>
inline void fold_registers(const Lanes<A>& sums, EightLanes* sum) {
  constexpr int count = EightLanes::count;
  sum->v[i] = add(sum->v[i], add(double_lanes<i>(sums), double_lanes<i + count>(sums)));
  if constexpr (i + 1 < count) fold_registers<i + 1>(sums, sum);
}

template <class A>
class FoldedLanes {
 public:
  using Sum = EightLanes;
  static Sum nothing() { return EightLanes::zeros(); }
  static Sum load_sum(const SquareSum& sum) { return EightLanes::of(sum.hi); }
  static void store_sum(const Sum& lanes, SquareSum* sum) { lanes.store_to(sum->hi); }

  FoldedLanes() {
    for_each_register<Lanes<A>::count>([this](int u) { acc_.v[u] = splat(A(0)); });
  }

  explicit FoldedLanes(const Sum&) : FoldedLanes() {}

  void flush(Sum* sum) const {
    constexpr int half_count = Lanes<A>::count / 2;
    Lanes<A> sums;
    for_each_register<half_count>(
        [&sums, this](int u) { sums.v[u] = add(acc_.v[u], acc_.v[u + half_count]); });
    fold_registers<0>(sums, sum);
  }

 protected:
  using V = typename Lanes<A>::V;
  void add_product(int u, V a, V b) { acc_.v[u] = fma(a, b, acc_.v[u]); }
  void add_square(int u, V v) { add_product(u, v, v); }

 private:
  Lanes<A> acc_;
};

// Floats in float lanes.
template <ElementOrder element_order>
struct FloatLanes : FoldedLanes<float> {
  using FoldedLanes<float>::FoldedLanes;
  static constexpr ElementOrder order = element_order;
  using Set = RegistersOfSet<float, order>;
  void take(int k, const Two<float>& v) {
    add_square(Set::a(k), v.a);
    add_square(Set::b(k), v.b);
  }
  template <class T>
  void take_set(const T* p) {
    for_each_register<Set::pairs>(
        [this, p](int k) { take(k, load_two<order>(p + 2 * k * Set::width)); });
  }
};

// Floats in double lanes: squares are exact, and the sum to 2^-40 for n up to 2^20.
struct WideLanes : FoldedLanes<double> {
  using FoldedLanes<double>::FoldedLanes;
  static constexpr ElementOrder order = ElementOrder::in_order;
  static constexpr int parts = Lanes<float>::width / Lanes<double>::width;
  void take(int k, const Two<float>& v) {
    take_register(2 * k, v.a);
    take_register(2 * k + 1, v.b);
  }
  // Conversions from memory spare the extraction of the upper half.
  void take_set(const float* p) {
    for_each_register<Lanes<double>::count>(
        [this, p](int u) { add_square(u, load_double(p + u * Lanes<double>::width)); });
  }

 private:
  void take_register(int u, f32v v) {
    add_square(parts * u, half<0>(v));
    if constexpr (parts == 2) add_square(parts * u + 1, half<1>(v));
  }
};

// Doubles in eight lanes, element i in lane i mod 8, by Knuth's two-sum: only the rounding of each
// square remains.
class CompensatedLanes {
 public:
  struct Sum {
    EightLanes hi, lo;
  };
  static Sum nothing() { return {EightLanes::zeros(), EightLanes::zeros()}; }
  static Sum load_sum(const SquareSum& sum) {
    return {EightLanes::of(sum.hi), EightLanes::of(sum.lo)};
  }
  static void store_sum(const Sum& lanes, SquareSum* sum) {
    lanes.hi.store_to(sum->hi);
    lanes.lo.store_to(sum->lo);
  }

  CompensatedLanes() {}
  explicit CompensatedLanes(const Sum& sum) : sum_(sum) {}
  static constexpr ElementOrder order = ElementOrder::in_order;
  void take(int k, const Two<double>& v) {
    take_register(2 * k, v.a);
    take_register(2 * k + 1, v.b);
  }
  void take_set(const double* p) {
    for_each_register<Lanes<double>::count>(
        [this, p](int u) { take_register(u, load(p + u * Lanes<double>::width)); });
  }
  void flush(Sum* sum) const { *sum = sum_; }

 private:
  void take_register(int u, f64v v) {
    f64v& hi = sum_.hi.v[u % EightLanes::count];
    f64v& lo = sum_.lo.v[u % EightLanes::count];
    const f64v square = multiply_rounded(v, v), before = hi;
    hi = add(before, square);
    const f64v kept = subtract(hi, before);
    lo = add(lo, add(subtract(before, subtract(hi, kept)), subtract(square, kept)));
  }

  Sum sum_;
};

// What rows of dtype T are summed by in the kernels of their own.
template <class T>
struct AccumulatorOf {
  using type = FloatLanes<order_of<T>>;
};
template <>
struct AccumulatorOf<float> {
  using type = WideLanes;
};
template <>
struct AccumulatorOf<double> {
  using type = CompensatedLanes;
};

// Of elements i ... n-1, one block at most. step(acc, i) adds the squares of 32 elements,
// rest(acc, i, n) those of the last n < 32.
template <class Accumulator, class Step, class Rest>
inline void sum_block(std::int64_t i, std::int64_t n, typename Accumulator::Sum* sum, Step step,
                      Rest rest) {
  Accumulator acc(*sum);
  for (; i + lanes <= n; i += lanes) step(acc, i);
  if (i < n) rest(acc, i, n - i);
  acc.flush(sum);
}
template <class Accumulator, class Step, class Rest>
inline void sum_blocks(std::int64_t n, typename Accumulator::Sum* sum, Step step, Rest rest) {
  std::int64_t i = 0;
  for (; i + block <= n; i += block) {
    Accumulator acc(*sum);
    for (int j = 0; j < block; j += lanes) step(acc, i + j);
    acc.flush(sum);
  }
  if (i < n) sum_block<Accumulator>(i, n, sum, step, rest);
}

// The squares of the last elements of a row, fewer than 32, of which `left` are there.
template <class Accumulator, class T>
inline void take_rest(Accumulator& acc, const T* p, std::int64_t left) {
  for_each_pair<typename Compute<T>::scalar>(left, [&acc, p](int k, std::int64_t count) {
    acc.take(k, load_two<Accumulator::order>(p + k * 2 * LanesFor<T>::width, count));
  });
}
// The same in the loops over rows.
template <class Accumulator, class T>
RMSNORM_KERNEL_PART void take_part_of_pair(Accumulator* acc, const T* p, std::int64_t left) {
  for_each_pair<typename Compute<T>::scalar>(left, [acc, p](int k, std::int64_t count) {
    constexpr int of_pair = 2 * LanesFor<T>::width;
    if (count < of_pair) acc->take(k, load_two<Accumulator::order>(p + k * of_pair, count));
  });
}
template <class Accumulator, class T>
inline void take_rest_apart(Accumulator& acc, const T* p, std::int64_t left) {
  for_each_pair_in_line<T>(left, [&acc, p](int k, std::int64_t count) {
    acc.take(k, load_two<Accumulator::order>(p + k * 2 * LanesFor<T>::width, count));
  });
  if (part_of_pair<T>(left) == 0) return;
  Accumulator copy = acc;
  take_part_of_pair(&copy, p, left);
  acc = copy;
}

// fetched(p) is called with the place of every full set.
template <class Accumulator, class T, class Fetch>
inline void add_squares(const T* x, std::int64_t n, typename Accumulator::Sum* sum, Fetch fetched) {
  sum_blocks<Accumulator>(
      n, sum,
      [x, fetched](Accumulator& acc, std::int64_t i) {
        fetched(x + i);
        acc.take_set(x + i);
      },
      [x](Accumulator& acc, std::int64_t i, std::int64_t left) {
        take_rest_apart(acc, x + i, left);
      });
}

// What is summed is read back from where it was rounded to: two conversions of the other 16-bit
// format are fewer than rounding twice.
template <class Accumulator, class T>
inline void add_step(Accumulator& acc, const T* x, const T* residual, T* out, std::int64_t left) {
  constexpr ElementOrder order = Accumulator::order;
  using C = typename Compute<T>::scalar;
  for_each_pair<C>(left, [&acc, x, residual, out](int k, std::int64_t count) {
    const int i = 2 * k * Lanes<C>::width;
    const Two<C> a = load_two<order>(x + i, count), b = load_two<order>(residual + i, count);
    Two<C> s = {add(a.a, b.a), add(a.b, b.b)};
    put_two<order, Nans::of_bf16, false>(out + i, s, count);
    if constexpr (sizeof(T) < sizeof(C)) s = load_two<order>(out + i, count);
    acc.take(k, s);
  });
}

// The last elements of a row, fewer than 32, as a call.
template <class Accumulator, class T>
RMSNORM_KERNEL_PART void add_rest_from_memory(Accumulator* acc, const T* x, const T* residual,
                                              T* out, std::int64_t left) {
  add_step(*acc, x, residual, out, left);
}
// The same in the loops over rows: see take_rest_apart().
template <class Accumulator, class T>
inline void add_rest_apart(Accumulator& acc, const T* x, const T* residual, T* out,
                           std::int64_t left) {
  if constexpr (has_partial_registers) {
    add_step(acc, x, residual, out, left);
  } else {
    Accumulator copy = acc;
    add_rest_from_memory(&copy, x, residual, out, left);
    acc = copy;
  }
}

// x + residual of elements first ... last-1 of a row, and the sum of its squares.
template <class T, class Sum>
inline void add_row(const MeasuredRows& a, std::int64_t r, std::int64_t first, std::int64_t last,
                    Sum* sum) {
  using Accumulator = typename AccumulatorOf<T>::type;
  const T* x = reinterpret_cast<const T*>(a.x + r * a.x_stride) + first;
  const T* residual = reinterpret_cast<const T*>(a.residual + r * a.residual_stride) + first;
  T* out = reinterpret_cast<T*>(a.out + r * a.out_stride) + first;
  sum_blocks<Accumulator>(
      last - first, sum,
      [=, &a](Accumulator& acc, std::int64_t i) {
        if (a.fetches) {
          fetch(x + i, a.x_ahead);
          fetch(residual + i, a.residual_ahead);
          fetch_to_write(out + i, a.out_ahead);
        }
        add_step(acc, x + i, residual + i, out + i, lanes);
      },
      [=](Accumulator& acc, std::int64_t i, std::int64_t left) {
        add_step(acc, x + i, residual + i, out + i, left);
      });
}

template <class T>
using SumOf = typename AccumulatorOf<T>::type::Sum;

// Adds the residual of row r. Returns the sum of the squares of what comes of it.
template <class T>
RMSNORM_KERNEL_PART SumOf<T> sum_of_added_row(const MeasuredRows& a, std::int64_t r) {
  SumOf<T> sum = AccumulatorOf<T>::type::nothing(), not_counted = sum;
  add_row<T>(a, r, 0, a.counted, &sum);
  if (a.counted < a.n) add_row<T>(a, r, a.counted, a.n, &not_counted);
  return sum;
}

// Of the squares of row r.
template <class T>
inline SumOf<T> sum_of_row(const MeasuredRows& a, std::int64_t r) {
  using Accumulator = typename AccumulatorOf<T>::type;
  SumOf<T> sum = Accumulator::nothing();
  const T* x = reinterpret_cast<const T*>(a.x + r * a.x_stride);
  if (a.fetches) {
    add_squares<Accumulator>(x, a.counted, &sum,
                             [ahead = a.x_ahead](const T* p) { fetch(p, ahead); });
  } else {
    add_squares<Accumulator>(x, a.counted, &sum, [](const T*) {});
  }
  return sum;
}
// Of a row of fewer than 32 elements.
template <class T>
inline SumOf<T> sum_of_short_row(const MeasuredRows& a, std::int64_t r) {
  using Accumulator = typename AccumulatorOf<T>::type;
  SumOf<T> sum = Accumulator::nothing();
  Accumulator acc(sum);
  take_rest(acc, reinterpret_cast<const T*>(a.x + r * a.x_stride), a.counted);
  acc.flush(&sum);
  return sum;
}

// ---- from sums to factors of rows ----

// As many rows as a register has doubles share the quotients and the root.
constexpr int rows_together = Lanes<double>::width;

// Calls sum_of(r) for each row, and then take(r, sums, rows) for those of rows r ... r + rows-1,
// where sums that are missing in the register are those of row r.
template <class Sum, class SumOfRow, class Take>
inline void for_rows_together(std::int64_t rows, SumOfRow sum_of, Take take) {
  Sum sums[rows_together];
  for (std::int64_t r = 0; r < rows; r += rows_together) {
    const std::int64_t left = rows - r;
    for (int k = 0; k < rows_together; ++k) sums[k] = k < left ? sum_of(r + k) : sums[0];
    take(r, sums, left < rows_together ? left : rows_together);
  }
}

inline f64v totals(const EightLanes (&sums)[rows_together]) {
  f64v lanes[rows_together][EightLanes::count];
  for_each_register<rows_together>([&](int k) {
    for_each_register<EightLanes::count>([&](int u) { lanes[k][u] = sums[k].v[u]; });
  });
  return row_totals(lanes);
}

// mean + eps and 1 / sqrt of that as a value of the compute type. False: it is not in the safe
// range.
template <class C>
inline bool find_root_of_mean(const rmsnorm::detail::Statistic<double>& mean, double eps, double* v,
                              double* rstd) {
  if constexpr (sizeof(C) == sizeof(float)) {
    *v = mean.high + eps;
    *rstd = static_cast<double>(static_cast<float>(1.0 / square_root(*v)));
  } else {
    const auto sum = rmsnorm::detail::plus(mean, eps);
    *v = sum.high;
    *rstd = rmsnorm::detail::reciprocal_root<double>(sum);
  }
  return (*v >= rmsnorm::detail::SafeRange<C>::least) & (*v <= rmsnorm::detail::SafeRange<C>::most);
}
inline bool find_root(const EightLanes& sum, double count, double eps, double* v, double* rstd) {
  return find_root_of_mean<float>({row_total(sum.v) / count, 0.0}, eps, v, rstd);
}
inline bool find_root(const CompensatedLanes::Sum& lanes_of_sum, double count, double eps,
                      double* v, double* rstd) {
  SquareSum sum;
  CompensatedLanes::store_sum(lanes_of_sum, &sum);
  return find_root_of_mean<double>(rmsnorm::detail::mean_of(sum.compensated_total(), count), eps, v,
                                   rstd);
}

// The same for `rows` of the rows together; the arrays have places for all of these.
inline bool find_roots(const EightLanes (&sums)[rows_together], std::int64_t, double count,
                       double eps, double* v, double* rstd) {
  const f64v sum = add(divide(totals(sums), splat(count)), splat(eps));
  store(v, sum);
  store(rstd, rounded_to_float(divide(splat(1.0), square_root(sum))));
  return all_within(sum, rmsnorm::detail::SafeRange<float>::least,
                    rmsnorm::detail::SafeRange<float>::most);
}
inline bool find_roots(const CompensatedLanes::Sum (&sums)[rows_together], std::int64_t rows,
                       double count, double eps, double* v, double* rstd) {
  bool safe = true;
  for (std::int64_t k = 0; k < rows; ++k) {
    safe = find_root(sums[k], count, eps, v + k, rstd + k) & safe;
  }
  return safe;
}

// Those of rows first ... first + rows-1, with sum_of(r) of each.
template <class T, class SumOfRow>
inline bool find_roots_of_rows(const MeasuredRows& a, std::int64_t first, std::int64_t rows,
                               SumOfRow sum_of, double* v, double* rstd) {
  const double counted = static_cast<double>(a.counted);
  if (rows == 1) return find_root(sum_of(first), counted, a.eps, v, rstd);
  bool safe = true;
  for_rows_together<SumOf<T>>(
      rows, [&](std::int64_t r) { return sum_of(first + r); },
      [&](std::int64_t r, const SumOf<T>(&sums)[rows_together], std::int64_t count) {
        safe = find_roots(sums, count, counted, a.eps, v + r, rstd + r) & safe;
      });
  return safe;
}
template <class T>
RMSNORM_KERNEL_PART bool measure_long_rows(const MeasuredRows& rows, std::int64_t first,
                                           std::int64_t count, double* v, double* rstd) {
  const MeasuredRows a = rows;
  return find_roots_of_rows<T>(
      a, first, count, [&a](std::int64_t r) { return sum_of_row<T>(a, r); }, v, rstd);
}
template <class T>
RMSNORM_KERNEL_PART bool measure_short_rows(const MeasuredRows& rows, std::int64_t first,
                                            std::int64_t count, double* v, double* rstd) {
  const MeasuredRows a = rows;
  return find_roots_of_rows<T>(
      a, first, count, [&a](std::int64_t r) { return sum_of_short_row<T>(a, r); }, v, rstd);
}
// Where nothing counts, since the statistics are given, the rows are added alone.
template <class T>
RMSNORM_KERNEL_PART bool measure_added_rows(const MeasuredRows& a, std::int64_t first,
                                            std::int64_t count, double* v, double* rstd) {
  if (a.counted == 0 && a.n > 0) {
    for (std::int64_t r = 0; r < count; ++r) sum_of_added_row<T>(a, first + r);
    return true;
  }
  return find_roots_of_rows<T>(
      a, first, count, [&a](std::int64_t r) { return sum_of_added_row<T>(a, r); }, v, rstd);
}
template <class T>
inline bool measure_rows(const MeasuredRows& a, std::int64_t first, std::int64_t rows, double* v,
                         double* rstd) {
  if (a.residual != nullptr) return measure_added_rows<T>(a, first, rows, v, rstd);
  if (a.counted < lanes) return measure_short_rows<T>(a, first, rows, v, rstd);
  return measure_long_rows<T>(a, first, rows, v, rstd);
}
template <class T>
bool measure(const MeasuredRows& a, double* v, double* rstd) {
  return measure_rows<T>(a, 0, a.rows, v, rstd);
}
