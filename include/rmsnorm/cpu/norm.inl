// The kernels of the forward pass, included by kernels.inl: statistics and products of whole rows.

struct NoWeight {};  // stands for the weight's type where there is none

template <class W>
constexpr bool is_weight = sizeof(W) > sizeof(NoWeight);

// Of products of bf16 and weights of W.
template <class W>
constexpr Nans nans_with = sizeof(W) > sizeof(bfloat16) ? Nans::any : Nans::of_bf16;

// Of 2 * width elements from w + i on, of which `left` are there, or `absent` where there are no
// weights.
template <class T, class W, class C = typename Compute<T>::scalar>
inline Two<C> load_weights(const W* w, std::int64_t i, std::int64_t left, const Two<C>& absent) {
  if constexpr (is_weight<W>) {
    return load_two<order_of<T>>(w + i, left);
  } else {
    return absent;
  }
}

// ---- the products of some rows ----

// One register of y from one of x and one of offset + weight.
template <class T, class W, bool round_before, class V>
inline V multiply_register(V x, V rstd, V weight) {
  V h = multiply(x, rstd);
  if constexpr (round_before) h = rounded_to(static_cast<T*>(nullptr), h);
  if constexpr (is_weight<W>) h = multiply(h, weight);
  return h;
}

// Of rows first ... first + rows-1, which share the weight.
template <int rows, class T, class W, bool round_before>
class Products {
 public:
  Products(const NormRows& a, std::int64_t first, const double* rstd)
      : first_(first),
        w_(reinterpret_cast<const W*>(a.w + first * a.w_stride)),
        offset_(splat(static_cast<C>(a.offset))) {
    const bool adds = a.residual != nullptr;
    const char* x = adds ? a.out : a.x;
    const std::int64_t stride = adds ? a.out_stride : a.x_stride;
    for_each_register<rows>([&](int k) {
      x_[k] = reinterpret_cast<const T*>(x + (first + k) * stride);
      y_[k] = reinterpret_cast<T*>(a.y + (first + k) * a.y_stride);
      rstd_[k] = splat(static_cast<C>(rstd[k]));
      if (a.rounds_rstd) rstd_[k] = rounded_to(static_cast<T*>(nullptr), rstd_[k]);
    });
  }

  // Of 32 elements.
  template <bool adds_offset, bool streams>
  void set(std::int64_t start) const {
    for_each_pair<C>(lanes, [this, start](int k, std::int64_t count) {
      pair<adds_offset, streams>(start + 2 * k * Lanes<C>::width, count);
    });
  }
  // Of two registers, of which `count` elements are there.
  template <bool adds_offset, bool streams>
  void pair(std::int64_t i, std::int64_t count) const {
    constexpr ElementOrder order = order_of<T>;
    Two<C> factor = load_weights<T>(w_, i, count, {offset_, offset_});
    if constexpr (adds_offset) factor = {add(factor.a, offset_), add(factor.b, offset_)};
    for_each_register<rows>([&](int r) {
      const Two<C> x = load_two<order>(x_[r] + i, count);
      const Two<C> y = {multiply_register<T, W, round_before>(x.a, rstd_[r], factor.a),
                        multiply_register<T, W, round_before>(x.b, rstd_[r], factor.b)};
      put_two<order, nans_with<W>, streams>(y_[r] + i, y, count);
    });
  }
  // Of what is left behind the sets, but for a part of a pair where that is for a call.
  void rest(std::int64_t n) const {
    const std::int64_t left = n % lanes, begin = n - left;
    for_each_pair_in_line<T>(left, [this, begin](int k, std::int64_t count) {
      pair<true, false>(begin + k * 2 * Lanes<C>::width, count);
    });
  }
  // What is read in place of these rows by the next group.
  void fetch_next_rows(const NormRows& a, std::int64_t i) const {
    for_each_register<rows>([&](int r) {
      const std::int64_t next = first_ + r + a.group;
      fetch(reinterpret_cast<const T*>(a.x + next * a.x_stride) + i, 0);
      if (a.residual == nullptr) return;
      fetch(reinterpret_cast<const T*>(a.residual + next * a.residual_stride) + i, 0);
    });
  }
  void fetch_y(std::int64_t i, std::int64_t ahead) const {
    for_each_register<rows>([&](int r) { fetch_to_write(y_[r] + i, ahead); });
  }

  // All but that part. In the nearest caches f32 takes a tenth of its time to add an offset, even
  // one of -0.0, which changes no weight; elsewhere it takes none.
  void all(const NormRows& a) const {
    const std::int64_t full = a.n / lanes * lanes;
    if (a.streams) {
      for (std::int64_t i = 0; i < full; i += lanes) {
        if (fetches_next<T> && a.fetches) fetch_next_rows(a, i);
        set<true, true>(i);
      }
    } else if (a.fetches) {
      for (std::int64_t i = 0; i < full; i += lanes) {
        if constexpr (fetches_next<T>) fetch_next_rows(a, i);
        fetch_y(i, a.y_ahead);
        set<true, false>(i);
      }
    } else if (is_weight<W> && a.offset != 0.0) {
      for (std::int64_t i = 0; i < full; i += lanes) set<true, false>(i);
    } else {
      for (std::int64_t i = 0; i < full; i += lanes) set<false, false>(i);
    }
    rest(a.n);
  }

 private:
  using C = typename Compute<T>::scalar;
  using V = typename Compute<T>::vector;

  std::int64_t first_;
  const T* x_[rows];
  T* y_[rows];
  V rstd_[rows];
  const W* w_;
  V offset_;
};

// y of rows first ... first + rows-1. Two share what it takes to load a weight, to widen it and to
// add the offset: a fifth of the operations for bf16. Copied as in norm().
template <class T, class W, bool round_before>
RMSNORM_KERNEL_PART void multiply_sets(const NormRows& rows, std::int64_t first, std::int64_t count,
                                       const double* rstd) {
  const NormRows a = rows;
  std::int64_t r = 0;
  if constexpr (is_weight<W>) {
    for (; a.w_stride == 0 && r + 2 <= count; r += 2) {
      Products<2, T, W, round_before>(a, first + r, rstd + r).all(a);
    }
  }
  for (; r < count; ++r) Products<1, T, W, round_before>(a, first + r, rstd + r).all(a);
}
// Of their last elements, which are part of a pair.
template <class T, class W, bool round_before>
RMSNORM_KERNEL_PART void multiply_rests(const NormRows& rows, std::int64_t first,
                                        std::int64_t count, const double* rstd) {
  const NormRows a = rows;
  const std::int64_t left = part_of_pair<T>(a.n);
  for (std::int64_t r = 0; r < count; ++r) {
    const Products<1, T, W, round_before> products(a, first + r, rstd + r);
    products.template pair<true, false>(a.n - left, left);
  }
}
template <class T, class W, bool round_before>
inline void multiply_rows(const NormRows& a, std::int64_t first, std::int64_t rows,
                          const double* rstd) {
  const std::int64_t part = part_of_pair<T>(a.n);
  if (a.n > part) multiply_sets<T, W, round_before>(a, first, rows, rstd);
  if (part > 0) multiply_rests<T, W, round_before>(a, first, rows, rstd);
}

// ---- rows in turn ----

// Two rows for the sake of the weights, where their sums leave registers for that.
template <class T, class W>
constexpr int rows_with_a_weight = is_weight<W> && sizeof(T) == 2 ? 2 : 1;

// Copied, since a returned rstd may lie unaligned in a record.
template <class T>
inline void put_rstd(const NormRows& a, std::int64_t first, std::int64_t rows, const double* rstd) {
  if (a.rstd == nullptr) return;
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto value = static_cast<typename Compute<T>::scalar>(rstd[r]);
    std::memcpy(a.rstd + (first + r) * a.rstd_stride, &value, sizeof(value));
  }
}

template <class T>
inline bool find_given_roots(const NormRows& a, std::int64_t first, std::int64_t rows,
                             double* rstd) {
  bool safe = true;
  for (std::int64_t r = 0; r < rows; ++r) {
    const char* given = a.mean_square + (first + r) * a.mean_square_stride;
    double mean, v;
    if (a.mean_square_is_double) {
      std::memcpy(&mean, given, sizeof(mean));
    } else {
      float narrow;
      std::memcpy(&narrow, given, sizeof(narrow));
      mean = static_cast<double>(narrow);
    }
    safe = find_root_of_mean<typename Compute<T>::scalar>({mean, 0.0}, a.eps, &v, rstd + r) & safe;
  }
  return safe;
}

// Adds the residual of rows first ... first + rows-1 and finds their rstd. False: one of those is
// not in the safe range.
template <class T>
inline bool find_rstd(const NormRows& a, std::int64_t first, std::int64_t rows, double* rstd) {
  double v[max_group];
  if (a.mean_square == nullptr) return measure_rows<T>(a, first, rows, v, rstd);
  if (a.residual != nullptr) measure_rows<T>(a, first, rows, v, rstd);
  return find_given_roots<T>(a, first, rows, rstd);
}

// Of the rows from `begin` on.
template <class T, class W, bool round_before>
inline NormProgress norm_groups(const NormRows& a, std::int64_t begin) {
  double rstd[max_group];
  std::int64_t r = begin;
  while (r < a.rows) {
    const std::int64_t rows = a.rows - r < a.group ? a.rows - r : a.group;
    if (!find_rstd<T>(a, r, rows, rstd)) return {r, r + rows};
    put_rstd<T>(a, r, rows, rstd);
    multiply_rows<T, W, round_before>(a, r, rows, rstd);
    r += rows;
  }
  return {r, r};
}

// Rows that are summed at once, with their residuals where `adds`.
template <bool adds, int rows, class T>
class SummedRows {
 public:
  using Accumulator = typename AccumulatorOf<T>::type;
  // Of all of them.
  struct Sum {
    SumOf<T> of[rows];
  };
  class Accumulators {
   public:
    using Sum = SummedRows::Sum;
    explicit Accumulators(const Sum& sum) {
      for_each_register<rows>([&](int k) { of[k] = Accumulator(sum.of[k]); });
    }
    void flush(Sum* sum) const {
      for_each_register<rows>([&](int k) { of[k].flush(&sum->of[k]); });
    }
    Accumulator of[rows];
  };

  SummedRows(const NormRows& a, std::int64_t first) {
    for_each_register<rows>([&](int k) {
      x_[k] = reinterpret_cast<const T*>(a.x + (first + k) * a.x_stride);
      if constexpr (adds) {
        residual_[k] = reinterpret_cast<const T*>(a.residual + (first + k) * a.residual_stride);
        out_[k] = reinterpret_cast<T*>(a.out + (first + k) * a.out_stride);
      }
    });
  }
  static Sum nothing() {
    Sum sum;
    for_each_register<rows>([&sum](int k) { sum.of[k] = Accumulator::nothing(); });
    return sum;
  }
  const T* x(int k) const { return x_[k]; }
  void take_set(Accumulators& acc, std::int64_t i) const {
    for_each_register<rows>([&](int k) {
      if constexpr (adds) {
        add_step(acc.of[k], x_[k] + i, residual_[k] + i, out_[k] + i, lanes);
      } else {
        acc.of[k].take_set(x_[k] + i);
      }
    });
  }
  void take_rest(Accumulators& acc, std::int64_t i, std::int64_t left) const {
    for_each_register<rows>([&](int k) {
      if constexpr (adds) {
        add_rest_apart(acc.of[k], x_[k] + i, residual_[k] + i, out_[k] + i, left);
      } else {
        take_rest_apart(acc.of[k], x_[k] + i, left);
      }
    });
  }
  void fetch_x(const NormRows& a, std::int64_t i) const {
    for_each_register<rows>([&](int k) {
      fetch(x_[k] + i, a.x_ahead);
      if constexpr (adds) fetch(residual_[k] + i, a.residual_ahead);
    });
  }
  void fetch_out(const NormRows& a, std::int64_t i) const {
    for_each_register<rows>([&](int k) {
      if constexpr (adds) fetch_to_write(out_[k] + i, a.out_ahead);
    });
  }

 private:
  const T* x_[rows];
  const T* residual_[rows];
  T* out_[rows];
};

// What the loops over sets are made for, besides dtypes.
template <bool with_residual, bool with_offset, bool ahead, bool past>
struct SetOptions {
  static constexpr bool adds = with_residual;
  static constexpr bool adds_offset = with_offset;
  static constexpr bool fetches = ahead;
  static constexpr bool streams = past;
};

// The products of a set of `together` rows while a later set is summed.
//
// Between the sums of a set and its first product lies a chain of some 110 cycles: the fold of the
// lanes, a quotient, a root and a quotient. Where the products of one set do not last as long, the
// set that is summed is the one after the next.
template <int together, class Options, class T, class W, bool round_before>
inline NormProgress norm_side_by_side(const NormRows& a) {
  using Rows = SummedRows<Options::adds, together, T>;
  constexpr std::int64_t least_elements = 2048;
  constexpr int most_sets_ahead = 2;
  const int sets_ahead = a.n * together < least_elements ? most_sets_ahead : 1;
  const std::int64_t ahead = sets_ahead * together;
  if (a.rows < ahead + together) return {0, 0};
  const std::int64_t part = part_of_pair<T>(a.n);
  double rstd[most_sets_ahead][together], v;
  std::int64_t r = 0;
  bool safe = true;
  for (int set = 0; set < sets_ahead; ++set) {
    for (int k = 0; k < together; ++k) {
      safe = measure_rows<T>(a, set * together + k, 1, &v, rstd[set] + k) & safe;
    }
  }
  int set = 0;
  for (; safe && r + ahead + together <= a.rows; r += together) {
    const Products<together, T, W, round_before> products(a, r, rstd[set]);
    put_rstd<T>(a, r, together, rstd[set]);
    const Rows next(a, r + ahead);
    auto sum = Rows::nothing();
    sum_blocks<typename Rows::Accumulators>(
        a.n, &sum,
        [&](typename Rows::Accumulators& acc, std::int64_t i) {
          if constexpr (Options::fetches) {
            next.fetch_x(a, i);
            next.fetch_out(a, i);
            if constexpr (!Options::streams) products.fetch_y(i, a.y_ahead);
          }
          next.take_set(acc, i);
          products.template set<Options::adds_offset, Options::streams>(i);
        },
        [&next](typename Rows::Accumulators& acc, std::int64_t i, std::int64_t left) {
          next.take_rest(acc, i, left);
        });
    products.rest(a.n);
    if (part > 0) multiply_rests<T, W, round_before>(a, r, together, rstd[set]);
    for_each_register<together>([&](int k) {
      safe = find_root(sum.of[k], static_cast<double>(a.counted), a.eps, &v, rstd[set] + k) & safe;
    });
    set = sets_ahead - 1 - set;
  }
  if (!safe) return {r, r + ahead};
  for (int k = 0; k < sets_ahead; ++k, r += together) {
    put_rstd<T>(a, r, together, rstd[set]);
    multiply_rows<T, W, round_before>(a, r, together, rstd[set]);
    set = sets_ahead - 1 - set;
  }
  return {r, r};
}

// The sum of a set of `together` rows, then their products, without a call in between, from row
// `begin` on.
template <int together, class T, class W, bool round_before>
inline NormProgress norm_one_by_one(const NormRows& a, std::int64_t begin) {
  using Rows = SummedRows<false, together, T>;
  const std::int64_t part = part_of_pair<T>(a.n), full = a.n / lanes * lanes;
  double rstd[together], v;
  std::int64_t r = begin;
  for (; r + together <= a.rows; r += together) {
    const Rows summed(a, r);
    bool safe = true;
    for_each_register<together>([&](int k) {
      SumOf<T> sum = AccumulatorOf<T>::type::nothing();
      add_squares<typename AccumulatorOf<T>::type>(summed.x(k), a.n, &sum, [](const T*) {});
      safe = find_root(sum, static_cast<double>(a.counted), a.eps, &v, rstd + k) & safe;
    });
    if (!safe) return {r, r + together};
    put_rstd<T>(a, r, together, rstd);
    const Products<together, T, W, round_before> products(a, r, rstd);
    for (std::int64_t i = 0; i < full; i += lanes) products.template set<true, false>(i);
    products.rest(a.n);
    if (part > 0) multiply_rests<T, W, round_before>(a, r, together, rstd);
  }
  return {r, r};
}

// The sum of a row of one block at most.
template <bool adds, class T>
inline SumOf<T> sum_of_block(const NormRows& a, std::int64_t r) {
  using Row = SummedRows<adds, 1, T>;
  using Accumulators = typename Row::Accumulators;
  const Row row(a, r);
  auto sum = Row::nothing();
  sum_block<Accumulators>(
      0, a.n, &sum,
      [&](Accumulators& acc, std::int64_t i) {
        if constexpr (fetches_next<T> && !adds) row.fetch_x(a, i);
        row.take_set(acc, i);
      },
      [&row](Accumulators& acc, std::int64_t i, std::int64_t left) {
        row.take_rest(acc, i, left);
      });
  return sum.of[0];
}

// The sums of a group of rows of one block at most, then their products, without a call in between.
//
// Whatever `fetches` says, rows of 16 bits are fetched while others are summed: bf16 4096 x 128,
// cold, takes 0.8 of the time on a Zen 5; near, where x_ahead is none, that costs little. For the
// others the lines of y are asked for right before they are written, which is earlier than stores
// do, since those wait for their turn: f32 4096 x 96, cold, takes 0.8 of the time as well.
template <bool adds, bool streams, class T, class W, bool round_before>
inline NormProgress norm_short_rows(const NormRows& a) {
  constexpr int group = max_group, together = rows_with_a_weight<T, W>;
  const std::int64_t part = part_of_pair<T>(a.n), full = a.n / lanes * lanes;
  double v[group], rstd[group];
  std::int64_t r = 0;
  for (; r + group <= a.rows; r += group) {
    bool safe = true;
    for (int k = 0; k < group; k += rows_together) {
      SumOf<T> sums[rows_together];
      for (int j = 0; j < rows_together; ++j) sums[j] = sum_of_block<adds, T>(a, r + k + j);
      safe =
          find_roots(sums, rows_together, static_cast<double>(a.counted), a.eps, v + k, rstd + k) &
          safe;
    }
    if (!safe) return {r, r + group};
    put_rstd<T>(a, r, group, rstd);
    for (int k = 0; k < group; k += together) {
      const Products<together, T, W, round_before> products(a, r + k, rstd + k);
      for (std::int64_t i = 0; i < full; i += lanes) {
        if constexpr (!streams && !fetches_next<T>) products.fetch_y(i, 0);
        products.template set<true, streams>(i);
      }
      products.rest(a.n);
    }
    if (part > 0) multiply_rests<T, W, round_before>(a, r, group, rstd);
  }
  return {r, r};
}

// Rows whose loops over sets stand in the kernel itself: all have the same weight and count in
// whole. What is not done is left to norm_groups().
template <class T, class W, bool round_before>
inline NormProgress norm_in_line(const NormRows& a) {
  constexpr bool yes = true, no = false;
  // Compilers unroll the loops over sets where they know that n makes no more than a block. What is
  // a part of a pair is left to calls anyhow.
  if (a.walk == RowWalk::short_rows && a.n <= block) {
    if (a.n == part_of_pair<T>(a.n)) return {0, 0};
    if (a.residual == nullptr) {
      return a.streams ? norm_short_rows<no, yes, T, W, round_before>(a)
                       : norm_short_rows<no, no, T, W, round_before>(a);
    }
    return a.streams ? norm_short_rows<yes, yes, T, W, round_before>(a)
                     : norm_short_rows<yes, no, T, W, round_before>(a);
  }
  // Sums and products of bf16 together take more than 16 registers, and walks that put 16-bit rows
  // with a residual side by side were no faster than groups.
  constexpr bool has_room = has_partial_registers || order_of<T> == ElementOrder::in_order;
  if (!has_room || (sizeof(T) == 2 && a.residual != nullptr)) return {0, 0};
  if constexpr (has_room) {
    constexpr int together = rows_with_a_weight<T, W>;
    const auto side_by_side = [&a](auto options) {
      return norm_side_by_side<together, decltype(options), T, W, round_before>(a);
    };
    if constexpr (sizeof(T) > 2) {
      if (a.residual != nullptr && a.streams) return side_by_side(SetOptions<yes, yes, yes, yes>());
      if (a.residual != nullptr) return side_by_side(SetOptions<yes, yes, no, no>());
    }
    if (a.walk == RowWalk::one_by_one) return norm_one_by_one<together, T, W, round_before>(a, 0);
    if (a.streams) return side_by_side(SetOptions<no, yes, yes, yes>());
    if (a.fetches) return side_by_side(SetOptions<no, yes, yes, no>());
    const bool with_offset = is_weight<W> && a.offset != 0.0;
    return with_offset ? side_by_side(SetOptions<no, yes, no, no>())
                       : side_by_side(SetOptions<no, no, no, no>());
  }
}

// Copied, since stores of y might change `rows` as far as a compiler can see: without, 4096 x 128
// of f32 takes 1.1 times as long.
template <class T, class W, bool round_before>
RMSNORM_KERNEL NormProgress norm(const NormRows& rows) {
  const NormRows a = rows;
  const bool has_common_parts = a.mean_square == nullptr && a.counted == a.n && a.w_stride == 0;
  NormProgress progress = {0, 0};
  if (has_common_parts && a.walk != RowWalk::groups) {
    progress = norm_in_line<T, W, round_before>(a);
    if (progress.done == a.rows || progress.measured > progress.done) return progress;
  }
  // Short rows that are too few to share a root need no group.
  if (has_common_parts && a.residual == nullptr && a.n <= block &&
      a.rows - progress.done < rows_together) {
    return norm_one_by_one<1, T, W, round_before>(a, progress.done);
  }
  return norm_groups<T, W, round_before>(a, progress.done);
}
