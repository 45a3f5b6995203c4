// The kernels, written once over the primitives of an ISA and compiled once per ISA: scalar.hpp,
// avx2.hpp, avx512.hpp, avx512_bf16.hpp (with RMSNORM_BF16_ALONE, the kernels of bf16 alone) and
// neon.hpp include this file inside their namespace and target region, after defining
//
//   f32v, f64v                    vectors of W floats and of D doubles, W = 2 D (scalar: both 1)
//   load(const T*)                widened to f32v (f16, bf16, f32) or f64v (f64)
//   store(T*, v)                  rounded to T
//   stream(T*, v)                 the same past the caches, to T* on a 16-byte boundary
//   rounded_to(T*, v)             the value after rounding to T, still wide; T* only selects T;
//                                 NaNs as of `Nans::of_bf16`
//   splat, add, subtract, multiply, fma; of f64v also divide, square_root
//   rounded_to_float(f64v)        to the nearest floats, as doubles
//   all_within(f64v, a, b)        whether all elements are in [a, b]
//   square_root(double)
//   row_total(f64v[8 / D])        of the eight lanes of a sum, added as by SquareSum::total()
//   row_totals(f64v[D][8 / D])    of D sums, element k that of sum k
//   multiply_rounded(f64v, f64v)  a product that no compiler contracts into a following sum
//   load_double(const float*)     D floats as f64v
//   Pair {even, odd}              2 W elements of bf16 or f32, split by their index
//   load_pair(const T*)
//   store_pair and stream_pair<Nans>(bfloat16*, Pair), whose NaNs become quiet ones
//   half<i>(f32v)                 elements D i ... D i + D-1 as f64v
//   has_partial_registers         whether there are also
//   load_first, load_pair_first, store_first, store_pair_first(..., count)
//                                 of the first `count` elements, from none to all or more; those
//                                 that are not loaded are zeros, and no other memory is touched
//   RMSNORM_KERNEL                RMSNORM_FLATTEN, or nothing where a call costs no vector
//   registers
//   RMSNORM_KERNEL_PART           the same for what kernels call, and RMSNORM_NOINLINE
//
// No std:: templates here: their out-of-line copies would be compiled for this ISA and could be
// picked by the linker for code that runs everywhere.

// The type that T computes in, and the vectors of it.
template <class T>
struct Compute {
  using scalar = float;
  using vector = f32v;
};
template <>
struct Compute<double> {
  using scalar = double;
  using vector = f64v;
};

// The registers that hold the 32 lanes of compute type C.
template <class C>
struct Lanes {
  using V = typename Compute<C>::vector;
  static constexpr int width = static_cast<int>(sizeof(V) / sizeof(C));
  static constexpr int count = lanes / width;
  V v[count];
};

template <class T>
using LanesFor = Lanes<typename Compute<T>::scalar>;

// Calls f(u) for u = 0 ... count-1: without a loop for vectors, so that arrays of registers stay in
// registers also at -O2, and as a loop for the 32 lanes of the scalar code.
template <int count, int u = 0, class F>
inline void for_each_register(F f) {
  if constexpr (count > 16) {
    for (int i = 0; i < count; ++i) f(i);
  } else if constexpr (u < count) {
    f(u);
    for_each_register<count, u + 1>(f);
  }
}

// Copies less than twice `most` bytes, by the largest power of two that fits, from both ends. A
// call of memcpy would take longer than a short row, and no vector stays in its register over a
// call.
template <int most>
inline void copy_bytes(void* to, const void* from, std::int64_t bytes) {
  if (bytes >= most) {
    const std::int64_t last = bytes - most;
    std::memcpy(to, from, most);
    std::memcpy(static_cast<char*>(to) + last, static_cast<const char*>(from) + last, most);
  } else if constexpr (most > 1) {
    copy_bytes<most / 2>(to, from, bytes);
  }
}

// Less than `size` elements in a buffer of that many: what follows them is +0, which adds nothing
// to a sum of squares and never faults. One algorithm then serves tails on every ISA.
template <class T, int size>
struct Tail {
  T elements[size];

  Tail() {}
  // By vector stores: gcc clears arrays of this size by `rep stos`, which takes some 40 cycles.
  Tail(const T* from, std::int64_t n) {
    for_each_register<size / LanesFor<T>::width>([this](int u) {
      store(elements + u * LanesFor<T>::width, splat(typename Compute<T>::scalar(0)));
    });
    copy_bytes<bytes / 2>(elements, from, n * static_cast<std::int64_t>(sizeof(T)));
  }
  void copy_to(T* to, std::int64_t n) const {
    copy_bytes<bytes / 2>(to, elements, n * static_cast<std::int64_t>(sizeof(T)));
  }

 private:
  static constexpr int bytes = size * static_cast<int>(sizeof(T));
};

// Calls step(i) for each full set of lanes and rest(i, n - i) for what is left.
template <class Step, class Rest>
inline void for_each_step(std::int64_t n, Step step, Rest rest) {
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(i);
  if (i < n) rest(i, n - i);
}

// ---- lines that are needed soon ----

// Calls prefetch(address) for each line of `lanes` elements of T.
template <class T, class Prefetch>
inline void for_each_line(const char* p, Prefetch prefetch) {
  constexpr int line = 64;
  for (int b = 0; b < lanes * static_cast<int>(sizeof(T)); b += line) prefetch(p + b);
}
// Of the 32 elements that lie `ahead` bytes after those at p.
template <class T>
inline void fetch(const T* p, std::int64_t ahead) {
  for_each_line<T>(reinterpret_cast<const char*>(p) + ahead, [](const char* q) { prefetch(q); });
}
template <class T>
inline void fetch_to_write(const T* p, std::int64_t ahead) {
  for_each_line<T>(reinterpret_cast<const char*>(p) + ahead,
                   [](const char* q) { prefetch_to_write(q); });
}

// The row that is read next in place of row r.
struct NextRow {
  const char* rows[2];

  static NextRow of(const NextRows& next, std::int64_t r) {
    const auto place = [&next, r](int k) {
      return next.rows[k] == nullptr ? nullptr : next.rows[k] + r * next.strides[k];
    };
    return {{place(0), place(1)}};
  }
  // 32 elements of T from element i on.
  template <class T>
  void fetch(std::int64_t i) const {
    for (const char* row : rows) {
      if (row == nullptr) continue;
      for_each_line<T>(row + i * static_cast<std::int64_t>(sizeof(T)),
                       [](const char* q) { prefetch(q); });
    }
  }
};

// Whether kernels fetch the next rows of T while they store y: those of 16 bits, which compute for
// longer than lines of the third level take. For f32 there it is the other way round, and
// 256 x 4096 would take 1.17 times as long; beyond the caches 128 x 65536 takes 1.05 times as long.
template <class T>
constexpr bool fetches_next = sizeof(T) == 2;

// ---- two registers of a set ----

// Two registers of a set of 32 elements, and which ones: see ElementOrder.
template <class C>
struct Two {
  typename Compute<C>::vector a, b;
};

template <class C, ElementOrder order>
struct RegistersOfSet {
  static constexpr int width = Lanes<C>::width;
  static constexpr int pairs = Lanes<C>::count / 2;  // of registers
  static constexpr int a(int k) { return order == ElementOrder::in_order ? 2 * k : k; }
  static constexpr int b(int k) { return order == ElementOrder::in_order ? 2 * k + 1 : k + pairs; }
};

template <class T>
struct OrderOf {
  static constexpr ElementOrder value = ElementOrder::in_order;
};
template <>
struct OrderOf<bfloat16> {
  static constexpr ElementOrder value = ElementOrder::pairs;
};
template <class T>
constexpr ElementOrder order_of = OrderOf<T>::value;

// Calls f(k, count) for the pairs of registers that hold the first `left` elements of a set, of
// which `count` or more are of pair k or behind it. Where a full set is known to be left the tests
// vanish.
template <class C, class F>
inline void for_each_pair(std::int64_t left, F f) {
  constexpr int of_pair = 2 * Lanes<C>::width, pairs = lanes / of_pair;
  const auto visit = [left, f](int k) {
    if (k * of_pair < left) f(k, left - k * of_pair);
  };
  if constexpr (of_pair == 2) {
    for (int k = 0; k < pairs; ++k) visit(k);
  } else {
    for_each_register<pairs>(visit);
  }
}

// How many elements at the end of a row of n are left to a call: less than a pair of registers, and
// not just one of them, unless registers are loaded and stored in part. What it takes to find out
// how many are there stays out of the loops over rows and sets.
template <class T>
inline std::int64_t part_of_pair(std::int64_t n) {
  constexpr std::int64_t width = LanesFor<T>::width;
  if (has_partial_registers) return 0;
  const std::int64_t rest = n % (2 * width);
  return order_of<T> == ElementOrder::in_order && rest == width ? 0 : rest;
}

// Calls f(k, count) as for_each_pair() does for all others. Where registers are whole, `count` is
// one of two constants to a compiler.
template <class T, class F>
inline void for_each_pair_in_line(std::int64_t left, F f) {
  using C = typename Compute<T>::scalar;
  constexpr int width = Lanes<C>::width;
  if constexpr (has_partial_registers) {
    for_each_pair<C>(left, f);
  } else {
    for_each_pair<C>(left, [f](int k, std::int64_t count) {
      if (count >= 2 * width) {
        f(k, 2 * width);
      } else if (order_of<T> == ElementOrder::in_order && count == width) {
        f(k, width);
      }
    });
  }
}

// Of 2 * width elements from p on.
template <ElementOrder order, class T>
inline Two<typename Compute<T>::scalar> load_two(const T* p) {
  if constexpr (order == ElementOrder::in_order) {
    return {load(p), load(p + LanesFor<T>::width)};
  } else {
    const Pair both = load_pair(p);
    return {both.even, both.odd};
  }
}
// The same where `left` elements, which may be fewer, are there: zeros in place of the others.
template <ElementOrder order, class T>
inline Two<typename Compute<T>::scalar> load_two(const T* p, std::int64_t left) {
  constexpr int width = LanesFor<T>::width;
  if (left >= 2 * width) return load_two<order>(p);
  if constexpr (has_partial_registers && order == ElementOrder::in_order) {
    return {load_first(p, left), load_first(p + width, left - width)};
  } else if constexpr (has_partial_registers) {
    const Pair both = load_pair_first(p, left);
    return {both.even, both.odd};
  } else {
    if constexpr (order == ElementOrder::in_order) {
      if (left == width) return {load(p), splat(typename Compute<T>::scalar(0))};
    }
    return load_two<order>(Tail<T, 2 * width>(p, left).elements);
  }
}

template <bool streams, class T, class V>
inline void put(T* p, V v) {
  if constexpr (streams) {
    stream(p, v);
  } else {
    store(p, v);
  }
}
template <Nans nans, bool streams>
inline void put_pair(bfloat16* p, Pair v) {
  if constexpr (streams) {
    stream_pair<nans>(p, v);
  } else {
    store_pair<nans>(p, v);
  }
}

template <ElementOrder order, Nans nans, bool streams, class T>
inline void put_two(T* p, Two<typename Compute<T>::scalar> v) {
  if constexpr (order == ElementOrder::in_order) {
    put<streams>(p, v.a);
    put<streams>(p + LanesFor<T>::width, v.b);
  } else {
    put_pair<nans, streams>(p, {v.a, v.b});
  }
}
// The first `left` of them, where those are fewer.
template <ElementOrder order, Nans nans, bool streams, class T>
inline void put_two(T* p, const Two<typename Compute<T>::scalar>& v, std::int64_t left) {
  constexpr int width = LanesFor<T>::width;
  if (left >= 2 * width) return put_two<order, nans, streams>(p, v);
  if constexpr (has_partial_registers && order == ElementOrder::in_order) {
    store_first(p, v.a, left);
    store_first(p + width, v.b, left - width);
  } else if constexpr (has_partial_registers) {
    store_pair_first(p, Pair{v.a, v.b}, left, NansOf<nans>());
  } else {
    if constexpr (order == ElementOrder::in_order) {
      if (left == width) return store(p, v.a);
    }
    Tail<T, 2 * width> out;
    put_two<order, nans, false>(out.elements, v);
    out.copy_to(p, left);
  }
}

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

// step(acc, i) adds the squares of 32 elements, rest(acc, i, n) those of the last n < 32.
template <class Accumulator, class Step, class Rest>
inline void sum_blocks(std::int64_t n, typename Accumulator::Sum* sum, Step step, Rest rest) {
  std::int64_t i = 0;
  for (; i + block <= n; i += block) {
    Accumulator acc(*sum);
    for (int j = 0; j < block; j += lanes) step(acc, i + j);
    acc.flush(sum);
  }
  if (i == n) return;
  Accumulator acc(*sum);
  for (; i + lanes <= n; i += lanes) step(acc, i);
  if (i < n) rest(acc, i, n - i);
  acc.flush(sum);
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

// The last elements of a row, fewer than 32, as a call: see take_rest_apart().
template <class Accumulator, class T>
RMSNORM_KERNEL_PART void add_rest_from_memory(Accumulator* acc, const T* x, const T* residual,
                                              T* out, std::int64_t left) {
  add_step(*acc, x, residual, out, left);
}
template <class Accumulator, class T>
inline void add_rest_apart(Accumulator& acc, const T* x, const T* residual, T* out,
                           std::int64_t left) {
  Accumulator copy = acc;
  add_rest_from_memory(&copy, x, residual, out, left);
  acc = copy;
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
template <class T>
RMSNORM_KERNEL_PART bool measure_added_rows(const MeasuredRows& a, std::int64_t first,
                                            std::int64_t count, double* v, double* rstd) {
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

#include "norm.inl"

// ---- blocks in scratch memory ----

// One set of lanes from one type to another, one of which is the compute type.
template <class From, class To>
inline void convert_step(const From* from, To* to) {
  if constexpr (sizeof(typename Compute<From>::scalar) == sizeof(typename Compute<To>::scalar)) {
    for_each_register<LanesFor<From>::count>([=](int u) {
      const int i = u * LanesFor<From>::width;
      store(to + i, load(from + i));
    });
  } else {
    // Between double and a narrower type, which only mixes with f64 tensors need.
    for (int i = 0; i < lanes; ++i) {
      to[i] = rmsnorm::detail::narrow<To>::from(rmsnorm::detail::widen(from[i]));
    }
  }
}

// Fills the target up to the next multiple of `lanes`, with zeros: the operations below run on
// whole vectors.
template <class C, class T>
void widen_block(const void* from_, C* to, std::int64_t n) {
  const T* from = static_cast<const T*>(from_);
  for_each_step(
      n, [=](std::int64_t i) { convert_step(from + i, to + i); },
      [=](std::int64_t i, std::int64_t left) {
        convert_step(Tail<T, lanes>(from + i, left).elements, to + i);
      });
}

template <class C, class T>
void narrow_block(const C* from, void* to_, std::int64_t n) {
  T* to = static_cast<T*>(to_);
  for_each_step(
      n, [=](std::int64_t i) { convert_step(from + i, to + i); },
      [=](std::int64_t i, std::int64_t left) {
        Tail<T, lanes> out;
        convert_step(from + i, out.elements);
        out.copy_to(to + i, left);
      });
}

template <class Accumulator, class C>
void add_squares_block(const C* v, std::int64_t n, SquareSum* sum) {
  auto lanes_of_sum = Accumulator::load_sum(*sum);
  add_squares<Accumulator>(v, n, &lanes_of_sum, [](const C*) {});
  Accumulator::store_sum(lanes_of_sum, sum);
}

template <class C, class Operation>
inline void transform_block(C* v, std::int64_t n, Operation operation) {
  for (std::int64_t i = 0; i < n; i += Lanes<C>::width) store(v + i, operation(load(v + i), i));
}

template <class C>
void scale_block(C* v, C factor, std::int64_t n) {
  using V = typename Compute<C>::vector;
  const V f = splat(factor);
  transform_block(v, n, [=](V a, std::int64_t) { return multiply(a, f); });
}
template <class C>
void add_constant_block(C* v, C offset, std::int64_t n) {
  using V = typename Compute<C>::vector;
  const V o = splat(offset);
  transform_block(v, n, [=](V a, std::int64_t) { return add(a, o); });
}
template <class C>
void add_block(C* v, const C* b, std::int64_t n) {
  using V = typename Compute<C>::vector;
  transform_block(v, n, [=](V a, std::int64_t i) { return add(a, load(b + i)); });
}
template <class C>
void multiply_block(C* v, const C* w, std::int64_t n) {
  using V = typename Compute<C>::vector;
  transform_block(v, n, [=](V a, std::int64_t i) { return multiply(a, load(w + i)); });
}
template <class C>
void multiply_add_block(C* v, const C* w, const C* b, std::int64_t n) {
  using V = typename Compute<C>::vector;
  transform_block(v, n, [=](V a, std::int64_t i) { return fma(a, load(w + i), load(b + i)); });
}

#include "gradients.inl"

// ---- the table ----

#if defined(RMSNORM_BF16_ALONE)

// Kernels of bf16, and others that a table has already.
inline KernelTable with_own_bf16(KernelTable table) {
  using T = bfloat16;
  constexpr int bf16 = static_cast<int>(DType::bf16);
  KernelTable own = {};
  own.measure[bf16] = measure<T>;
  const NormKernel norms[weight_kind_count][2] = {
      {norm<T, NoWeight, false>, norm<T, NoWeight, true>},
      {norm<T, T, false>, norm<T, T, true>},
      {norm<T, float, false>, norm<T, float, true>}};
  const GradientKernel first[] = {correlate<T, NoWeight>, correlate<T, T>, correlate<T, float>};
  const GradientKernel second[] = {differentiate<T, NoWeight>, differentiate<T, T>,
                                   differentiate<T, float>};
  for (int w = 0; w < weight_kind_count; ++w) {
    for (int rounds = 0; rounds < 2; ++rounds) own.norm[bf16][w][rounds] = norms[w][rounds];
    own.correlate[bf16][w] = first[w];
    own.differentiate[bf16][w] = second[w];
  }
  take_kernels(own, DType::bf16, &table);
  return table;
}

#else

// A row with an f64 tensor is computed in double, so float blocks never meet f64.
template <class C, class Widen = decltype(&widen_block<C, float>),
          class Narrow = decltype(&narrow_block<C, float>),
          class Sum = void (*)(const C*, std::int64_t, SquareSum*),
          class Products = void (*)(const C*, const C*, std::int64_t, SquareSum*),
          class Multiply = void (*)(C*, const C*, const C*, std::int64_t),
          class Add = void (*)(C*, const C*, std::int64_t)>
constexpr BlockOps<C> block_ops() {
  Widen widen_f64 = nullptr;
  Narrow narrow_f64 = nullptr;
  Sum sum_narrow = nullptr, sum_in_pairs = nullptr, sum_wide = nullptr;
  constexpr ElementOrder in_order = ElementOrder::in_order;
  Products products_in_pairs = nullptr;
  Multiply accumulate_products_in_pairs = nullptr;
  Add accumulate_in_pairs = nullptr;
  if constexpr (sizeof(C) == sizeof(float)) {
    constexpr ElementOrder pairs = ElementOrder::pairs;
    sum_narrow = add_squares_block<FloatLanes<in_order>, C>;
    sum_in_pairs = add_squares_block<FloatLanes<pairs>, C>;
    sum_wide = add_squares_block<WideLanes, C>;
    products_in_pairs = add_products_block<C, pairs>;
    accumulate_products_in_pairs = accumulate_products_block<C, pairs>;
    accumulate_in_pairs = accumulate_block<C, pairs>;
  } else {
    sum_narrow = sum_in_pairs = sum_wide = add_squares_block<CompensatedLanes, C>;
    widen_f64 = widen_block<C, double>;
    narrow_f64 = narrow_block<C, double>;
  }
  return {
      {sum_narrow, sum_in_pairs, sum_wide},
      {widen_block<C, float16>, widen_block<C, bfloat16>, widen_block<C, float>, widen_f64},
      {narrow_block<C, float16>, narrow_block<C, bfloat16>, narrow_block<C, float>, narrow_f64},
      scale_block<C>,
      add_constant_block<C>,
      add_block<C>,
      multiply_block<C>,
      multiply_add_block<C>,
      scale_add_block<C>,
      add_scaled_block<C>,
      {add_products_block<C, in_order>, products_in_pairs},
      {accumulate_products_block<C, in_order>, accumulate_products_in_pairs},
      {accumulate_block<C, in_order>, accumulate_in_pairs},
      add_to_totals_block<C>,
  };
}

inline const KernelTable& kernel_table() {
  static constexpr KernelTable table = {
      {measure<float16>, measure<bfloat16>, measure<float>, measure<double>},
      {{{norm<float16, NoWeight, false>, norm<float16, NoWeight, true>},
        {norm<float16, float16, false>, norm<float16, float16, true>},
        {norm<float16, float, false>, norm<float16, float, true>}},
       {{norm<bfloat16, NoWeight, false>, norm<bfloat16, NoWeight, true>},
        {norm<bfloat16, bfloat16, false>, norm<bfloat16, bfloat16, true>},
        {norm<bfloat16, float, false>, norm<bfloat16, float, true>}},
       // Rounding to the compute type before the weight changes nothing.
       {{norm<float, NoWeight, false>, norm<float, NoWeight, false>},
        {norm<float, float, false>, norm<float, float, false>},
        {norm<float, float, false>, norm<float, float, false>}},
       {{norm<double, NoWeight, false>, norm<double, NoWeight, false>},
        {norm<double, double, false>, norm<double, double, false>},
        {nullptr, nullptr}}},
      {{correlate<float16, NoWeight>, correlate<float16, float16>, correlate<float16, float>},
       {correlate<bfloat16, NoWeight>, correlate<bfloat16, bfloat16>, correlate<bfloat16, float>},
       {correlate<float, NoWeight>, correlate<float, float>, correlate<float, float>},
       {correlate<double, NoWeight>, correlate<double, double>, nullptr}},
      {{differentiate<float16, NoWeight>, differentiate<float16, float16>,
        differentiate<float16, float>},
       {differentiate<bfloat16, NoWeight>, differentiate<bfloat16, bfloat16>,
        differentiate<bfloat16, float>},
       {differentiate<float, NoWeight>, differentiate<float, float>, differentiate<float, float>},
       {differentiate<double, NoWeight>, differentiate<double, double>, nullptr}},
      block_ops<float>(),
      block_ops<double>(),
  };
  return table;
}

#endif
