// The kernels of the backward pass, included by kernels.inl. Formulas: BackwardParams in
// contract.hpp.

template <class C>
struct ProductLanes : FoldedLanes<C> {
  using FoldedLanes<C>::FoldedLanes;
  using FoldedLanes<C>::add_product;
};

// What the elements of a row are multiplied by.
template <class C>
struct RowFactors {
  using V = typename Compute<C>::vector;
  V rstd;
  V offset;
  V minus_c;
};

template <class T, class W>
struct GradientRow {
  const T* dy;
  const T* x;
  const W* w;
  const T* d_residual;
  T* dx;

  static GradientRow of(const GradientRows& a, std::int64_t r) {
    const char* d_residual =
        a.d_residual == nullptr ? nullptr : a.d_residual + r * a.d_residual_stride;
    return {reinterpret_cast<const T*>(a.dy + r * a.dy_stride),
            reinterpret_cast<const T*>(a.x + r * a.x_stride),
            reinterpret_cast<const W*>(a.w + r * a.w_stride),
            reinterpret_cast<const T*>(d_residual), reinterpret_cast<T*>(a.dx + r * a.dx_stride)};
  }
};

// g = dy * (offset + w)
template <class W, class V>
inline V weighted(V dy, V w, V offset) {
  if constexpr (is_weight<W>) {
    return multiply(dy, add(w, offset));
  } else {
    return dy;
  }
}

// 32 elements from `start` on, or those that are left of fewer.
template <class T, class W, class C>
inline void correlate_step(ProductLanes<C>& acc, const GradientRow<T, W>& row, std::int64_t start,
                           std::int64_t left, const RowFactors<C>& f) {
  constexpr ElementOrder order = order_of<T>;
  using Set = RegistersOfSet<C, order>;
  for_each_pair<C>(left, [&acc, &f, &row, start](int k, std::int64_t count) {
    const std::int64_t i = start + 2 * k * Set::width;
    const auto dy = load_two<order>(row.dy + i, count), x = load_two<order>(row.x + i, count);
    const auto w = load_weights<T>(row.w, i, count, dy);
    acc.add_product(Set::a(k), weighted<W>(dy.a, w.a, f.offset), multiply(x.a, f.rstd));
    acc.add_product(Set::b(k), weighted<W>(dy.b, w.b, f.offset), multiply(x.b, f.rstd));
  });
}

// Copied, since a compiler has to read `rows` again after every store.
template <class T, class W>
RMSNORM_KERNEL void correlate(const GradientRows& rows) {
  using C = typename Compute<T>::scalar;
  using Accumulator = ProductLanes<C>;
  const GradientRows a = rows;
  const auto offset = splat(static_cast<C>(a.offset));
  for (std::int64_t r = 0; r < a.rows; ++r) {
    const auto row = GradientRow<T, W>::of(a, r);
    const RowFactors<C> f = {splat(static_cast<C>(a.rstd[r])), offset, offset};
    EightLanes sum = Accumulator::nothing();
    sum_blocks<Accumulator>(
        a.n, &sum,
        [&a, &f, &row](Accumulator& acc, std::int64_t i) {
          if (a.fetches) {
            fetch(row.dy + i, a.dy_ahead);
            fetch(row.x + i, a.x_ahead);
          }
          correlate_step(acc, row, i, lanes, f);
        },
        [&f, &row](Accumulator& acc, std::int64_t i, std::int64_t left) {
          correlate_step(acc, row, i, left, f);
        });
    const double mean = row_total(sum.v) / static_cast<double>(a.n);
    a.correlations[r] = static_cast<double>(static_cast<C>(mean));
  }
}

// Adds to one register of sums.
template <class C>
inline void accumulate_product(C* sums, typename Compute<C>::vector a,
                               typename Compute<C>::vector b) {
  store(sums, fma(a, b, load(sums)));
}
template <class C>
inline void accumulate_value(C* sums, typename Compute<C>::vector a) {
  store(sums, add(load(sums), a));
}

// dx of one pair of registers.
template <bool streams, class T, class W, class C>
inline void put_gradient(const GradientRow<T, W>& row, std::int64_t i, std::int64_t left,
                         const RowFactors<C>& f, const Two<C>& dy, const Two<C>& xhat) {
  constexpr ElementOrder order = order_of<T>;
  const Two<C> w = load_weights<T>(row.w, i, left, dy);
  Two<C> d = {fma(f.minus_c, xhat.a, weighted<W>(dy.a, w.a, f.offset)),
              fma(f.minus_c, xhat.b, weighted<W>(dy.b, w.b, f.offset))};
  if (row.d_residual != nullptr) {
    const Two<C> more = load_two<order>(row.d_residual + i, left);
    d = {fma(d.a, f.rstd, more.a), fma(d.b, f.rstd, more.b)};
  } else {
    d = {multiply(d.a, f.rstd), multiply(d.b, f.rstd)};
  }
  put_two<order, nans_with<W>, streams>(row.dx + i, d, left);
}

// One set of 32 elements of each of some rows, or those that are left of fewer, whose products are
// added to the sums in ascending order. `dweight` are the row's sums, or null.
template <int rows, bool streams, class T, class W, class C>
inline void differentiate_step(const GradientRow<T, W>* row, std::int64_t start, std::int64_t left,
                               const RowFactors<C>* f, C* dweight) {
  constexpr ElementOrder order = order_of<T>;
  using Set = RegistersOfSet<C, order>;
  for_each_pair<C>(left, [row, start, f, dweight](int k, std::int64_t count) {
    const std::int64_t i = start + 2 * k * Set::width;
    const std::int64_t first = start + Set::a(k) * Set::width;
    const std::int64_t second = start + Set::b(k) * Set::width;
    Two<C> products = {};
    if (dweight != nullptr) products = {load(dweight + first), load(dweight + second)};
    for_each_register<rows>([&](int r) {
      const Two<C> dy = load_two<order>(row[r].dy + i, count);
      const Two<C> x = load_two<order>(row[r].x + i, count);
      const Two<C> xhat = {multiply(x.a, f[r].rstd), multiply(x.b, f[r].rstd)};
      products = {fma(dy.a, xhat.a, products.a), fma(dy.b, xhat.b, products.b)};
      put_gradient<streams>(row[r], i, count, f[r], dy, xhat);
    });
    if (dweight != nullptr) {
      store(dweight + first, products.a);
      store(dweight + second, products.b);
    }
  });
}

// dy of one set of 32 elements, or of those that are left of fewer, to the row's sums.
template <class T, class C>
inline void add_to_dbias(const T* dy, std::int64_t start, std::int64_t left, C* dbias) {
  using Set = RegistersOfSet<C, order_of<T>>;
  for_each_pair<C>(left, [dy, start, dbias](int k, std::int64_t count) {
    const auto v = load_two<order_of<T>>(dy + start + 2 * k * Set::width, count);
    accumulate_value(dbias + start + Set::a(k) * Set::width, v.a);
    accumulate_value(dbias + start + Set::b(k) * Set::width, v.b);
  });
}

// The next rows are fetched also where those of forward are not: with what dy and x take, f32
// 4096 x 4096 would need 1.12 times as long.
template <int rows, bool streams, class T, class W>
inline void differentiate_rows(const GradientRows& a, std::int64_t first) {
  using C = typename Compute<T>::scalar;
  GradientRow<T, W> row[rows];
  RowFactors<C> f[rows];
  NextRow next[rows];
  for_each_register<rows>([&](int k) {
    const std::int64_t r = first + k;
    next[k] = NextRow::of(a.next, r);
    row[k] = GradientRow<T, W>::of(a, r);
    f[k] = {splat(static_cast<C>(a.rstd[r])), splat(static_cast<C>(a.offset)),
            splat(static_cast<C>(-a.correlations[r]))};
  });
  C* const dweight = reinterpret_cast<C*>(a.dweight);
  for_each_step(
      a.n,
      [&](std::int64_t i) {
        for_each_register<rows>([&](int k) {
          if constexpr (streams || fetches_next<T>) next[k].template fetch<T>(i);
          if (!a.fetches) return;
          if constexpr (!streams) fetch_to_write(row[k].dx + i, a.dx_ahead);
          if (row[k].d_residual != nullptr) fetch(row[k].d_residual + i, a.d_residual_ahead);
        });
        differentiate_step<rows, streams, T, W>(row, i, lanes, f, dweight);
      },
      [&](std::int64_t i, std::int64_t left) {
        differentiate_step<rows, false, T, W>(row, i, left, f, dweight);
      });
}

// Few norms have a bias: its sums are added apart, while dy is there, which dx may be.
template <class T, class W>
inline void sum_dbias(const GradientRows& a) {
  auto* const dbias = reinterpret_cast<typename Compute<T>::scalar*>(a.dbias);
  for (std::int64_t r = 0; r < a.rows && dbias != nullptr; ++r) {
    const T* dy = GradientRow<T, W>::of(a, r).dy;
    for_each_step(
        a.n, [dy, dbias](std::int64_t i) { add_to_dbias(dy, i, lanes, dbias); },
        [dy, dbias](std::int64_t i, std::int64_t left) { add_to_dbias(dy, i, left, dbias); });
  }
}

// Two rows share the sums' way from and to the cache, which is a third of what one row moves there.
template <bool streams, class T, class W>
inline void differentiate_all(const GradientRows& a) {
  std::int64_t r = 0;
  if constexpr (sizeof(T) > 2) {
    const bool in_pairs = shares_sums(dtype_of<T>::value, a.n);
    for (; in_pairs && r + 2 <= a.rows; r += 2) differentiate_rows<2, streams, T, W>(a, r);
  }
  for (; r < a.rows; ++r) differentiate_rows<1, streams, T, W>(a, r);
}
template <class T, class W>
RMSNORM_KERNEL void differentiate(const GradientRows& rows) {
  const GradientRows a = rows;
  sum_dbias<T, W>(a);
  if (a.streams) {
    differentiate_all<true, T, W>(a);
  } else {
    differentiate_all<false, T, W>(a);
  }
}

// ---- blocks in scratch memory ----

template <class C>
void scale_add_block(C* v, C factor, const C* b, std::int64_t n) {
  using V = typename Compute<C>::vector;
  const V f = splat(factor);
  transform_block(v, n, [=](V a, std::int64_t i) { return fma(a, f, load(b + i)); });
}
template <class C>
void add_scaled_block(C* v, C factor, const C* w, std::int64_t n) {
  using V = typename Compute<C>::vector;
  const V f = splat(factor);
  transform_block(v, n, [=](V a, std::int64_t i) { return fma(f, load(w + i), a); });
}

// Scratch memory is in order, sums are not. What lies behind the n elements is left out: zeros that
// were there are NaN once they have been multiplied by an infinite rstd.
template <class C, ElementOrder order>
void add_products_block(const C* a, const C* b, std::int64_t n, SquareSum* sum) {
  using Set = RegistersOfSet<C, order>;
  EightLanes lanes_of_sum = ProductLanes<C>::load_sum(*sum);
  ProductLanes<C> acc(lanes_of_sum);
  for (std::int64_t i = 0; i < n; i += lanes) {
    for_each_pair<C>(n - i, [&acc, a, b, i](int k, std::int64_t count) {
      const std::int64_t place = i + 2 * k * Set::width;
      const auto one = load_two<order>(a + place, count);
      const auto other = load_two<order>(b + place, count);
      acc.add_product(Set::a(k), one.a, other.a);
      acc.add_product(Set::b(k), one.b, other.b);
    });
  }
  acc.flush(&lanes_of_sum);
  ProductLanes<C>::store_sum(lanes_of_sum, sum);
}
template <class C, ElementOrder order>
void accumulate_products_block(C* sums, const C* a, const C* b, std::int64_t n) {
  using Set = RegistersOfSet<C, order>;
  for (std::int64_t i = 0; i < n; i += lanes) {
    for_each_register<Set::pairs>([sums, a, b, i](int k) {
      const std::int64_t place = i + 2 * k * Set::width;
      const auto one = load_two<order>(a + place), other = load_two<order>(b + place);
      accumulate_product(sums + i + Set::a(k) * Set::width, one.a, other.a);
      accumulate_product(sums + i + Set::b(k) * Set::width, one.b, other.b);
    });
  }
}
template <class C, ElementOrder order>
void accumulate_block(C* sums, const C* a, std::int64_t n) {
  using Set = RegistersOfSet<C, order>;
  for (std::int64_t i = 0; i < n; i += lanes) {
    for_each_register<Set::pairs>([sums, a, i](int k) {
      const auto one = load_two<order>(a + i + 2 * k * Set::width);
      accumulate_value(sums + i + Set::a(k) * Set::width, one.a);
      accumulate_value(sums + i + Set::b(k) * Set::width, one.b);
    });
  }
}

template <class C>
void add_to_totals_block(double* totals, const C* sums, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += Lanes<double>::width) {
    if constexpr (sizeof(C) == sizeof(float)) {
      store(totals + i, add(load(totals + i), load_double(sums + i)));
    } else {
      store(totals + i, add(load(totals + i), load(sums + i)));
    }
  }
}
