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

#include "sums.inl"

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
