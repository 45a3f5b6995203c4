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

template <class T, class W, class C>
inline void correlate_step(ProductLanes<C>& acc, const T* dy_, const T* x_, const W* w_,
                           const RowFactors<C>& f) {
  using Set = RegistersOfSet<C, order_of<T>>;
  for_each_register<Set::pairs>([&acc, &f, dy_, x_, w_](int k) {
    const int i = 2 * k * Set::width;
    const auto dy = load_two<order_of<T>>(dy_ + i), x = load_two<order_of<T>>(x_ + i);
    const auto w = load_weights<T>(is_weight<W> ? w_ + i : w_, dy);
    acc.add_product(Set::a(k), weighted<W>(dy.a, w.a, f.offset), multiply(x.a, f.rstd));
    acc.add_product(Set::b(k), weighted<W>(dy.b, w.b, f.offset), multiply(x.b, f.rstd));
  });
}

template <class T, class W>
RMSNORM_KERNEL void correlate(const GradientRows& a) {
  using C = typename Compute<T>::scalar;
  using Accumulator = ProductLanes<C>;
  const auto offset = splat(static_cast<C>(a.offset));
  for (std::int64_t r = 0; r < a.rows; ++r) {
    const T* dy = reinterpret_cast<const T*>(a.dy + r * a.dy_stride);
    const T* x = reinterpret_cast<const T*>(a.x + r * a.x_stride);
    const W* w = reinterpret_cast<const W*>(a.w + r * a.w_stride);
    const RowFactors<C> f = {splat(static_cast<C>(a.rstd[r])), offset, offset};
    SquareSum sum;
    Accumulator::start(&sum);
    sum_blocks<Accumulator>(
        a.n, &sum,
        [&a, &f, dy, x, w](Accumulator& acc, std::int64_t i) {
          fetch(dy + i, a.dy_ahead);
          fetch(x + i, a.x_ahead);
          correlate_step<T, W>(acc, dy + i, x + i, is_weight<W> ? w + i : w, f);
        },
        [&f, dy, x, w](Accumulator& acc, std::int64_t i, std::int64_t left) {
          const Tail<T> last_dy(dy + i, left), last_x(x + i, left);
          if constexpr (is_weight<W>) {
            const Tail<W> last_w(w + i, left);
            correlate_step<T, W>(acc, last_dy.elements, last_x.elements, last_w.elements, f);
          } else {
            correlate_step<T, W>(acc, last_dy.elements, last_x.elements, w, f);
          }
        });
    a.correlations[r] = Accumulator::total(sum);
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
inline void put_gradient(const GradientRow<T, W>& row, std::int64_t i, const RowFactors<C>& f,
                         const Two<C>& dy, const Two<C>& xhat) {
  constexpr ElementOrder order = order_of<T>;
  const Two<C> w = load_weights<T>(is_weight<W> ? row.w + i : row.w, dy);
  Two<C> d = {fma(f.minus_c, xhat.a, weighted<W>(dy.a, w.a, f.offset)),
              fma(f.minus_c, xhat.b, weighted<W>(dy.b, w.b, f.offset))};
  if (row.d_residual != nullptr) {
    const Two<C> more = load_two<order>(row.d_residual + i);
    d = {fma(d.a, f.rstd, more.a), fma(d.b, f.rstd, more.b)};
  } else {
    d = {multiply(d.a, f.rstd), multiply(d.b, f.rstd)};
  }
  put_two<order, nans_with<W>, streams>(row.dx + i, d);
}

// One set of 32 elements of each of some rows, whose products are added to the sums in ascending
// order. `dweight` and `dbias` are that set's sums, or null.
template <int rows, bool streams, class T, class W, class C>
inline void differentiate_step(const GradientRow<T, W>* row, std::int64_t start,
                               const RowFactors<C>* f, C* dweight, C* dbias) {
  constexpr ElementOrder order = order_of<T>;
  using Set = RegistersOfSet<C, order>;
  for_each_register<Set::pairs>([row, start, f, dweight, dbias](int k) {
    const std::int64_t i = start + 2 * k * Set::width;
    const std::int64_t first = start + Set::a(k) * Set::width;
    const std::int64_t second = start + Set::b(k) * Set::width;
    Two<C> products = {}, values = {};
    if (dweight != nullptr) products = {load(dweight + first), load(dweight + second)};
    if (dbias != nullptr) values = {load(dbias + first), load(dbias + second)};
    for_each_register<rows>([&](int r) {
      const Two<C> dy = load_two<order>(row[r].dy + i), x = load_two<order>(row[r].x + i);
      const Two<C> xhat = {multiply(x.a, f[r].rstd), multiply(x.b, f[r].rstd)};
      products = {fma(dy.a, xhat.a, products.a), fma(dy.b, xhat.b, products.b)};
      values = {add(values.a, dy.a), add(values.b, dy.b)};
      put_gradient<streams>(row[r], i, f[r], dy, xhat);
    });
    if (dweight != nullptr) {
      store(dweight + first, products.a);
      store(dweight + second, products.b);
    }
    if (dbias != nullptr) {
      store(dbias + first, values.a);
      store(dbias + second, values.b);
    }
  });
}

// The last n < 32 elements of a row.
template <class T, class W, class C>
inline void differentiate_rest(const GradientRow<T, W>& row, std::int64_t i, std::int64_t n,
                               const RowFactors<C>& f, C* dweight, C* dbias) {
  const Tail<T> dy(row.dy + i, n), x(row.x + i, n);
  Tail<T> d_residual, dx;
  if (row.d_residual != nullptr) d_residual = Tail<T>(row.d_residual + i, n);
  GradientRow<T, W> last = {dy.elements, x.elements, row.w,
                            row.d_residual == nullptr ? nullptr : d_residual.elements, dx.elements};
  C* const dweight_here = dweight == nullptr ? nullptr : dweight + i;
  C* const dbias_here = dbias == nullptr ? nullptr : dbias + i;
  if constexpr (is_weight<W>) {
    const Tail<W> w(row.w + i, n);
    last.w = w.elements;
    differentiate_step<1, false, T, W>(&last, 0, &f, dweight_here, dbias_here);
  } else {
    differentiate_step<1, false, T, W>(&last, 0, &f, dweight_here, dbias_here);
  }
  dx.copy_to(row.dx + i, n);
}

// The next rows are fetched also where those of forward are not: with what dy and x take, f32
// 4096 x 4096 would need 1.12 times as long.
template <int rows, bool streams, class T, class W>
inline void differentiate_rows(const GradientRows& a, std::int64_t first) {
  using C = typename Compute<T>::scalar;
  // Copied out of `a`, which stores of dx might change as far as a compiler can see.
  const std::int64_t dx_ahead = a.dx_ahead, d_residual_ahead = a.d_residual_ahead;
  GradientRow<T, W> row[rows];
  RowFactors<C> f[rows];
  NextRow next[rows];
  for_each_register<rows>([&](int k) {
    const std::int64_t r = first + k;
    next[k] = NextRow::of(a.next, r);
    const char* d_residual =
        a.d_residual == nullptr ? nullptr : a.d_residual + r * a.d_residual_stride;
    row[k] = {reinterpret_cast<const T*>(a.dy + r * a.dy_stride),
              reinterpret_cast<const T*>(a.x + r * a.x_stride),
              reinterpret_cast<const W*>(a.w + r * a.w_stride),
              reinterpret_cast<const T*>(d_residual), reinterpret_cast<T*>(a.dx + r * a.dx_stride)};
    f[k] = {splat(static_cast<C>(a.rstd[r])), splat(static_cast<C>(a.offset)),
            splat(static_cast<C>(-a.correlations[r]))};
  });
  C* const dweight = reinterpret_cast<C*>(a.dweight);
  C* const dbias = reinterpret_cast<C*>(a.dbias);
  for_each_step(
      a.n,
      [&](std::int64_t i) {
        for_each_register<rows>([&](int k) {
          if constexpr (streams || fetches_next<T>) next[k].template fetch<T>(i);
          if constexpr (!streams) fetch_to_write(row[k].dx + i, dx_ahead);
          if (row[k].d_residual != nullptr) fetch(row[k].d_residual + i, d_residual_ahead);
        });
        differentiate_step<rows, streams, T, W>(row, i, f, dweight, dbias);
      },
      [&](std::int64_t i, std::int64_t left) {
        for_each_register<rows>(
            [&](int k) { differentiate_rest(row[k], i, left, f[k], dweight, dbias); });
      });
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
RMSNORM_KERNEL void differentiate(const GradientRows& a) {
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

// Scratch memory is in order, sums are not.
template <ElementOrder order, class C>
inline void add_products_step(ProductLanes<C>& acc, const C* a, const C* b) {
  using Set = RegistersOfSet<C, order>;
  for_each_register<Set::pairs>([&acc, a, b](int k) {
    const std::int64_t place = 2 * k * Set::width;
    const auto one = load_two<order>(a + place), other = load_two<order>(b + place);
    acc.add_product(Set::a(k), one.a, other.a);
    acc.add_product(Set::b(k), one.b, other.b);
  });
}
// What lies behind the n elements is left out: zeros that were there are NaN once they have been
// multiplied by an infinite rstd.
template <class C, ElementOrder order>
void add_products_block(const C* a, const C* b, std::int64_t n, SquareSum* sum) {
  ProductLanes<C> acc(*sum);
  for_each_step(
      n, [&acc, a, b](std::int64_t i) { add_products_step<order>(acc, a + i, b + i); },
      [&acc, a, b](std::int64_t i, std::int64_t left) {
        add_products_step<order>(acc, Tail<C>(a + i, left).elements, Tail<C>(b + i, left).elements);
      });
  acc.flush(sum);
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
