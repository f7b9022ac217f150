// Vectors of REVK_BYTES bytes through the compiler's vector extensions, with intrinsics only where
// they have no equivalent: masked tails and half precision. Included inside namespace REVK_ISA.
#pragma once

#define REVK_INLINE static inline __attribute__((always_inline))

template <class A>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(REVK_BYTES)));
  typedef int32_t I __attribute__((vector_size(REVK_BYTES)));
  typedef int32_t Index;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(REVK_BYTES)));
  typedef int64_t I __attribute__((vector_size(REVK_BYTES)));
  typedef int64_t Index;
};

template <class A>
using Vec = typename Simd<A>::V;
template <class A>
using IVec = typename Simd<A>::I;
template <class A>
constexpr int kLanes = REVK_BYTES / sizeof(A);

// Integers of a smaller magnitude are exact: 2^24, 2^53.
template <class A>
constexpr A kPrecision = std::is_same_v<A, double> ? A(int64_t(1) << 53) : A(1 << 24);

template <class A>
REVK_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class A, int... Lane>
REVK_INLINE IVec<A> iota_of(std::integer_sequence<int, Lane...>) {
  return IVec<A>{Lane...};
}

template <class A>
REVK_INLINE IVec<A> iota() {
  return iota_of<A>(std::make_integer_sequence<int, kLanes<A>>());
}

// --- loads and stores: float <-> T, n < kLanes of them in the masked forms --------------------

template <class A>
REVK_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
REVK_INLINE void store(A* p, Vec<A> v) {
  memcpy(p, &v, sizeof(v));
}

// Lanes lo <= l < hi: the others are neither read nor written, and load as zero.
#if defined(REVK_AVX512)
template <class A>
struct Mask {
  uint32_t bits;
};
template <class A>
REVK_INLINE Mask<A> lanes_between(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : (lo > kLanes<A> ? kLanes<A> : lo);
  hi = hi < lo ? lo : (hi > kLanes<A> ? kLanes<A> : hi);
  return {((1u << hi) - 1) & ~((1u << lo) - 1)};
}
template <class A>
REVK_INLINE Mask<A> first_lanes(int64_t n) {
  return {(1u << n) - 1};
}
REVK_INLINE Vec<float> load(const float* p, Mask<float> m) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(m.bits), p);
}
REVK_INLINE void store(float* p, Vec<float> v, Mask<float> m) {
  _mm512_mask_storeu_ps(p, __mmask16(m.bits), (__m512)v);
}
REVK_INLINE Vec<double> load(const double* p, Mask<double> m) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(m.bits), p);
}
REVK_INLINE void store(double* p, Vec<double> v, Mask<double> m) {
  _mm512_mask_storeu_pd(p, __mmask8(m.bits), (__m512d)v);
}
#elif defined(REVK_AVX2)
template <class A>
struct Mask {
  IVec<A> lanes;
};
template <class A>
REVK_INLINE Mask<A> lanes_between(int64_t lo, int64_t hi) {
  typedef typename Simd<A>::Index Index;
  return {(iota<A>() >= Index(lo)) & (iota<A>() < Index(hi))};
}
template <class A>
REVK_INLINE Mask<A> first_lanes(int64_t n) {
  return {iota<A>() < typename Simd<A>::Index(n)};
}
REVK_INLINE Vec<float> load(const float* p, Mask<float> m) {
  return (Vec<float>)_mm256_maskload_ps(p, (__m256i)m.lanes);
}
REVK_INLINE void store(float* p, Vec<float> v, Mask<float> m) {
  _mm256_maskstore_ps(p, (__m256i)m.lanes, (__m256)v);
}
REVK_INLINE Vec<double> load(const double* p, Mask<double> m) {
  return (Vec<double>)_mm256_maskload_pd(p, (__m256i)m.lanes);
}
REVK_INLINE void store(double* p, Vec<double> v, Mask<double> m) {
  _mm256_maskstore_pd(p, (__m256i)m.lanes, (__m256d)v);
}
#else
template <class A>
struct Mask {
  int64_t lo, hi;
};
template <class A>
REVK_INLINE Mask<A> lanes_between(int64_t lo, int64_t hi) {
  return {lo < 0 ? 0 : lo, hi > kLanes<A> ? kLanes<A> : hi};
}
template <class A>
REVK_INLINE Mask<A> first_lanes(int64_t n) {
  return {0, n};
}
template <class A>
REVK_INLINE Vec<A> load(const A* p, Mask<A> m) {
  if (m.lo == 0 && m.hi == kLanes<A>) return load(p);
  A lanes[kLanes<A>] = {};
  for (int64_t l = m.lo; l < m.hi; ++l) lanes[l] = p[l];
  return load(lanes);
}
template <class A>
REVK_INLINE void store(A* p, Vec<A> v, Mask<A> m) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t l = m.lo; l < m.hi; ++l) p[l] = lanes[l];
}
#endif

// All lanes, or as many as are left.
template <class A>
REVK_INLINE Vec<A> load_left(const A* p, int64_t left) {
  return left < kLanes<A> ? load(p, first_lanes<A>(left)) : load(p);
}

template <class A>
REVK_INLINE void store_left(A* p, Vec<A> v, int64_t left) {
  left < kLanes<A> ? store(p, v, first_lanes<A>(left)) : store(p, v);
}

// int16 in memory, int32 in registers; its low half is stored.
typedef int16_t Int16s __attribute__((vector_size(REVK_BYTES / 2)));

REVK_INLINE IVec<float> widen(Int16s v) {
#if defined(REVK_AVX512)
  return (IVec<float>)_mm512_cvtepi16_epi32((__m256i)v);
#elif defined(REVK_AVX2)
  return (IVec<float>)_mm256_cvtepi16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, IVec<float>);
#endif
}

REVK_INLINE Int16s low_halves(IVec<float> v) {
#if defined(REVK_AVX512)
  return (Int16s)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, Int16s);
#endif
}

REVK_INLINE IVec<float> load_left(const int16_t* p, int64_t left) {
  Int16s v{};
  if (left >= kLanes<float>) {
    memcpy(&v, p, sizeof(v));
  } else {
#if defined(REVK_AVX512)
    v = (Int16s)_mm256_maskz_loadu_epi16(__mmask16(first_lanes<float>(left).bits), p);
#else
    for (int64_t l = 0; l < left; ++l) v[l] = p[l];
#endif
  }
  return widen(v);
}

REVK_INLINE void store_left(int16_t* p, IVec<float> wide, int64_t left) {
  const Int16s v = low_halves(wide);
  if (left >= kLanes<float>) {
    memcpy(p, &v, sizeof(v));
  } else {
#if defined(REVK_AVX512)
    _mm256_mask_storeu_epi16(p, __mmask16(first_lanes<float>(left).bits), (__m256i)v);
#else
    for (int64_t l = 0; l < left; ++l) p[l] = v[l];
#endif
  }
}

// -1 in the first n lanes, 0 in the others.
template <class A>
REVK_INLINE IVec<A> first_ones(int64_t n) {
  return iota<A>() < typename Simd<A>::Index(n);
}

// Zeroes lanes n and above.
template <class A>
REVK_INLINE Vec<A> first(Vec<A> v, int64_t n) {
  return (Vec<A>)((IVec<A>)v & first_ones<A>(n));
}

// value in one lane, zero elsewhere.
template <class A>
REVK_INLINE Vec<A> lane_only(A value, int64_t lane) {
  const IVec<A> keep = iota<A>() == typename Simd<A>::Index(lane);
  return (Vec<A>)((IVec<A>)splat(value) & keep);
}

// --- lanes ------------------------------------------------------------------------------------

template <class A>
REVK_INLINE Vec<A> permute(Vec<A> v, IVec<A> lanes) {
#if defined(__clang__)
  Vec<A> out;
  for (int l = 0; l < kLanes<A>; ++l) out[l] = v[lanes[l]];
  return out;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// Sum of all lanes, in an order fixed by the vector width.
template <class A, int Half = kLanes<A> / 2>
REVK_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (Half == 0) {
    return v[0];
  } else {
    return sum_lanes<A, Half / 2>(v + permute<A>(v, iota<A>() ^ Half));
  }
}

// Lanes from a where lane & Half is 0, from b elsewhere, each with its partner at distance Half.
template <class A, int Half>
REVK_INLINE Vec<A> fold(Vec<A> a, Vec<A> b) {
  const IVec<A> upper = (iota<A>() & Half) != 0;
  const Vec<A> kept = (Vec<A>)(((IVec<A>)b & upper) | ((IVec<A>)a & ~upper));
  const Vec<A> other = (Vec<A>)(((IVec<A>)a & upper) | ((IVec<A>)b & ~upper));
  return kept + permute<A>(other, iota<A>() ^ Half);
}

// Sums of the lanes of v[Count] in the order of sum_lanes: that of v[i] in lane i kLanes / Count.
template <class A, int Count, int Half = kLanes<A> / 2>
REVK_INLINE Vec<A> sum_lanes_of(Vec<A>* v) {
  if constexpr (Half == 0) {
    return v[0];
  } else if constexpr (Count == 1) {
    v[0] += permute<A>(v[0], iota<A>() ^ Half);
    return sum_lanes_of<A, 1, Half / 2>(v);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) v[i] = fold<A, Half>(v[i], v[i + Count / 2]);
    return sum_lanes_of<A, Count / 2, Half / 2>(v);
  }
}

template <class A>
REVK_INLINE Vec<A> vmin(Vec<A> a, Vec<A> b) {
  return a < b ? a : b;
}

template <class A>
REVK_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// The bits of |v|: ordered as its values are, infinity and NaN last.
template <class V>
REVK_INLINE auto magnitude_bits(V v) {
  using A = std::decay_t<decltype(v[0])>;
  return (IVec<A>)v & ~(IVec<A>)splat(-A(0));
}

// nearest: the nearest integer, ties to even. nearest_int32: likewise; -2^31 if beyond, or NaN.
#if defined(REVK_AVX512)
REVK_INLINE Vec<float> nearest(Vec<float> v) {
  return (Vec<float>)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
REVK_INLINE Vec<double> nearest(Vec<double> v) {
  return (Vec<double>)_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_NEAREST_INT);
}
REVK_INLINE IVec<float> nearest_int32(Vec<float> v) {
  return (IVec<float>)_mm512_cvtps_epi32((__m512)v);
}
#elif defined(REVK_AVX2)
REVK_INLINE Vec<float> nearest(Vec<float> v) {
  return (Vec<float>)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
REVK_INLINE Vec<double> nearest(Vec<double> v) {
  return (Vec<double>)_mm256_round_pd((__m256d)v, _MM_FROUND_TO_NEAREST_INT);
}
REVK_INLINE IVec<float> nearest_int32(Vec<float> v) {
  return (IVec<float>)_mm256_cvtps_epi32((__m256)v);
}
#else
// Adding 2^23 (2^52) leaves no bits for a fraction; from there on there is none.
template <class V>
REVK_INLINE V nearest(V v) {
  using A = std::decay_t<decltype(v[0])>;
  constexpr A whole = kPrecision<A> / 2;
  const IVec<A> magnitude = magnitude_bits(v), sign = (IVec<A>)v ^ magnitude;
  const IVec<A> rounded = (IVec<A>)((V)magnitude + whole - whole);
  const IVec<A> has_fraction = (V)magnitude < whole;
  return (V)((rounded & has_fraction) | (magnitude & ~has_fraction) | sign);
}
REVK_INLINE IVec<float> nearest_int32(Vec<float> v) {
  const IVec<float> fits = (Vec<float>)magnitude_bits(v) < 2147483648.f;
  const Vec<float> bounded = (Vec<float>)((IVec<float>)nearest(v) & fits);
  return __builtin_convertvector(bounded, IVec<float>) | (~fits & INT32_MIN);
}
#endif

REVK_INLINE IVec<float> add_wrapped(IVec<float> a, IVec<float> b) {
  typedef uint32_t Unsigned __attribute__((vector_size(REVK_BYTES)));
  return (IVec<float>)((Unsigned)a + (Unsigned)b);
}

template <class A>
REVK_INLINE Vec<A> hardswish_v(Vec<A> u) {
  const Vec<A> clamped = vmin<A>(vmax<A>(u + A(3), Vec<A>{}), splat<A>(6));
  return u * clamped * (A(1) / A(6));
}

template <class A>
REVK_INLINE Vec<A> hardswish_slope_v(Vec<A> u) {
  const Vec<A> inner = (A(2) * u + A(3)) * (A(1) / A(6));
  const Vec<A> low = u <= A(-3) ? Vec<A>{} : inner;
  return u >= A(3) ? splat<A>(1) : low;
}

// Evens and odds of the concatenation of a and b.
template <class A>
REVK_INLINE Vec<A> evens(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  Vec<A> out;
  for (int l = 0; l < kLanes<A>; ++l) out[l] = 2 * l < kLanes<A> ? a[2 * l] : b[2 * l - kLanes<A>];
  return out;
#else
  return __builtin_shuffle(a, b, iota<A>() * 2);
#endif
}

template <class A>
REVK_INLINE Vec<A> odds(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  Vec<A> out;
  for (int l = 0; l < kLanes<A>; ++l)
    out[l] = 2 * l < kLanes<A> ? a[2 * l + 1] : b[2 * l + 1 - kLanes<A>];
  return out;
#else
  return __builtin_shuffle(a, b, iota<A>() * 2 + 1);
#endif
}

// kLanes vectors of kLanes lanes: rows become columns.
template <class A>
REVK_INLINE void transpose(Vec<A>* v) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int h = 1; h < L; h *= 2) {
    Vec<A> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[i] = evens<A>(v[2 * i], v[2 * i + 1]);
      next[i + L / 2] = odds<A>(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = next[i];
  }
}

// v[F] consecutive vectors -> v[r] holds elements r, r + F, r + 2 F, ...
template <class A, int F>
REVK_INLINE void split(Vec<A>* v) {
  if constexpr (F > 1) {
    Vec<A> even[F / 2], odd[F / 2];
#pragma GCC unroll 8
    for (int i = 0; i < F / 2; ++i) {
      even[i] = evens<A>(v[2 * i], v[2 * i + 1]);
      odd[i] = odds<A>(v[2 * i], v[2 * i + 1]);
    }
    split<A, F / 2>(even);
    split<A, F / 2>(odd);
#pragma GCC unroll 8
    for (int i = 0; i < F / 2; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
  }
}

// out[r * pitch + q] = in[F q + r] for q < n. Reads and writes whole groups of lanes past the end.
template <class A, int F>
REVK_INLINE void deinterleave_pow2(const A* in, A* out, int64_t pitch, int64_t n) {
  constexpr int L = kLanes<A>;
  for (int64_t q = 0; q < n; q += L) {
    Vec<A> v[F];
#pragma GCC unroll 8
    for (int i = 0; i < F; ++i) v[i] = load(in + F * q + i * L);
    split<A, F>(v);
#pragma GCC unroll 8
    for (int r = 0; r < F; ++r) store(out + r * pitch + q, v[r]);
  }
}

template <class A>
REVK_INLINE void deinterleave(const A* in, A* out, int64_t pitch, int64_t n, int64_t factor) {
  if (factor == 2) {
    deinterleave_pow2<A, 2>(in, out, pitch, n);
  } else if (factor == 4) {
    deinterleave_pow2<A, 4>(in, out, pitch, n);
  } else if (factor == 8) {
    deinterleave_pow2<A, 8>(in, out, pitch, n);
  } else {
    for (int64_t r = 0; r < factor; ++r) {
      for (int64_t q = 0; q < n; ++q) out[r * pitch + q] = in[factor * q + r];
    }
  }
}
