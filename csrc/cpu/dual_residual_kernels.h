// y <- beta y + (p + c x), its inverse and its adjoint, on flat memory. Inside namespace REVK_ISA.
#pragma once

#include "rows.h"

// The map's elements from `i` on, where all of it is one row.
static inline char* at(const Map& m, int64_t i) {
  return static_cast<char*>(m.data) + i * size_of(m.dtype);
}

// Bit j of byte e becomes bit e of byte j: 8 values of 8 bits <-> 8 bit planes.
REVK_INLINE uint64_t transposed_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ (t << 28);
}

// Byte g bits + j of the packed remainders holds bit j of the elements 8 g .. 8 g + 7.
static inline void pack(const int32_t* low, uint8_t* packed, int64_t bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    for (int64_t j = 0; j < bits; j += 8) {
      uint64_t word = 0;
      for (int64_t e = 0; e < 8; ++e) {
        const int32_t value = i + e < n ? low[i + e] : 0;
        word |= uint64_t(value >> j & 0xff) << (8 * e);
      }
      word = transposed_bits(word);
      const int64_t planes = smaller(8, bits - j);
      for (int64_t b = 0; b < planes; ++b) packed[j + b] = uint8_t(word >> (8 * b));
    }
    packed += bits;
  }
}

static inline void unpack(const uint8_t* packed, int32_t* low, int64_t bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    int32_t values[8] = {};
    for (int64_t j = 0; j < bits; j += 8) {
      uint64_t word = 0;
      const int64_t planes = smaller(8, bits - j);
      for (int64_t b = 0; b < planes; ++b) word |= uint64_t(packed[j + b]) << (8 * b);
      word = transposed_bits(word);
      for (int64_t e = 0; e < 8; ++e) values[e] |= int32_t(word >> (8 * e) & 0xff) << j;
    }
    for (int64_t e = 0; e < smaller(8, n - i); ++e) low[i + e] = values[e];
    packed += bits;
  }
}

REVK_INLINE IVec<float> load_integers(const int16_t* p, int64_t left) { return load_left(p, left); }
REVK_INLINE IVec<float> load_integers(const int32_t* p, int64_t left) {
  return (IVec<float>)load_left(reinterpret_cast<const float*>(p), left);
}
REVK_INLINE void store_integers(int16_t* p, IVec<float> v, int64_t left) { store_left(p, v, left); }
REVK_INLINE void store_integers(int32_t* p, IVec<float> v, int64_t left) {
  store_left(reinterpret_cast<float*>(p), (Vec<float>)v, left);
}

typedef uint32_t Unsigned __attribute__((vector_size(REVK_BYTES)));

REVK_INLINE IVec<float> subtract_wrapped(IVec<float> a, IVec<float> b) {
  return (IVec<float>)((Unsigned)a - (Unsigned)b);
}

// All ones where the integer sum z = a + b does not fit T.
template <class T>
REVK_INLINE IVec<float> outside_of(IVec<float> a, IVec<float> b, IVec<float> z) {
  if (sizeof(T) == 2) return z << 16 >> 16 != z;
  return ((a ^ z) & (b ^ z)) < 0;
}

// y <- (y >> k) + q, keeping the k bits that go, or y <- ((y - q) << k) | bits, with q = rint(steps
// p + c x) of the integers x; q is 0 where that is no int32.
template <class T>
static void dual_residual_integers(const DualResidualArgs& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<float>;
  const float steps = float(args.steps), c = float(args.coefficient);
  const int bits = int(args.bits);
  const int32_t mask = int32_t((int64_t(1) << bits) - 1);
  Scratch scratch(Scratch::bytes<float>(kSegment) + Scratch::bytes<int32_t>(kSegment));
  float* p_scratch = scratch.take<float>(kSegment);
  int32_t* low = scratch.take<int32_t>(kSegment);
  IVec<float> beyond{};
  const int64_t last = smaller(end * kDualResidualBlock, args.size);
  for (int64_t start = begin * kDualResidualBlock; start < last; start += kSegment) {
    const int64_t n = smaller(kSegment, last - start);
    const float* p = row_as(args.p, at(args.p, start), p_scratch, n);
    T* y = static_cast<T*>(args.y.data) + start;
    const T* x = args.x.data ? static_cast<const T*>(args.x.data) + start : nullptr;
    uint8_t* packed = args.remainder ? args.remainder + start / 8 * bits : nullptr;
    if (args.inverse && bits > 0) unpack(packed, low, bits, n);
    for (int64_t i = 0; i < n; i += L) {
      const int64_t left = n - i;
      Vec<float> t = load_left(p + i, left) * steps;
      if (x) t += __builtin_convertvector(load_integers(x + i, left), Vec<float>) * c;
      IVec<float> q = nearest_int32(t);
      const IVec<float> none = q == INT32_MIN;
      q &= ~none;
      const IVec<float> before = load_integers(y + i, left);
      if (args.inverse) {
        const IVec<float> z = (IVec<float>)((Unsigned)subtract_wrapped(before, q) << bits);
        store_integers(y + i, bits > 0 ? z | load_integers(low + i, left) : z, left);
        continue;
      }
      if (bits > 0) store_integers(low + i, before & mask, left);
      const IVec<float> scaled = before >> bits, z = add_wrapped(scaled, q);
      store_integers(y + i, z, left);
      const IVec<float> wrong = none | outside_of<T>(scaled, q, z);
      beyond -= left < L ? wrong & first_ones<float>(left) : wrong;
    }
    if (!args.inverse && packed && bits > 0) pack(low, packed, bits, n);
  }
  if (args.overflow) {
    int64_t count = 0;
    for (int l = 0; l < L; ++l) count += beyond[l];
    __atomic_fetch_add(args.overflow, count, __ATOMIC_RELAXED);
  }
}

template <class A>
static void dual_residual_floats(const DualResidualArgs& args, int64_t begin, int64_t end) {
  const A c = A(args.coefficient), beta = A(args.beta);
  Scratch scratch(4 * Scratch::bytes<A>(kSegment));
  A *y_scratch = scratch.take<A>(kSegment), *x_scratch = scratch.take<A>(kSegment);
  A *p_scratch = scratch.take<A>(kSegment), *zeros = scratch.zeros<A>(kSegment);
  const int64_t last = smaller(end * kDualResidualBlock, args.size);
  for (int64_t start = begin * kDualResidualBlock; start < last; start += kSegment) {
    const int64_t n = smaller(kSegment, last - start);
    char* data = at(args.y, start);
    A* y = row_out(args.y, data, y_scratch);
    if (y == y_scratch) read_row(args.y, data, y, n);
    const A* p = row_as(args.p, at(args.p, start), p_scratch, n);
    const A* x = args.x.data ? row_as(args.x, at(args.x, start), x_scratch, n) : zeros;
    if (args.inverse) {
      for (int64_t i = 0; i < n; ++i) y[i] = (y[i] - (p[i] + c * x[i])) / beta;
    } else {
      for (int64_t i = 0; i < n; ++i) y[i] = beta * y[i] + (p[i] + c * x[i]);
    }
    finish_row(args.y, y, data, n);
  }
}

static void dual_residual(const DualResidualArgs& args, int64_t begin, int64_t end) {
  args.integer_bytes == 2   ? dual_residual_integers<int16_t>(args, begin, end)
  : args.integer_bytes == 4 ? dual_residual_integers<int32_t>(args, begin, end)
  : args.wide               ? dual_residual_floats<double>(args, begin, end)
                            : dual_residual_floats<float>(args, begin, end);
}

template <class A>
static void dual_residual_gradients(const DualResidualArgs& args, int64_t begin, int64_t end) {
  const A c = A(args.coefficient), beta = A(args.beta);
  Scratch scratch(4 * Scratch::bytes<A>(kSegment));
  A *dx_scratch = scratch.take<A>(kSegment), *dy_scratch = scratch.take<A>(kSegment);
  A *g_scratch = scratch.take<A>(kSegment), *zeros = scratch.zeros<A>(kSegment);
  const int64_t last = smaller(end * kDualResidualBlock, args.size);
  for (int64_t start = begin * kDualResidualBlock; start < last; start += kSegment) {
    const int64_t n = smaller(kSegment, last - start);
    char *dx_data = at(args.x, start), *dy_data = at(args.y, start);
    A* dx = row_out(args.x, dx_data, dx_scratch);
    A* dy = row_out(args.y, dy_data, dy_scratch);
    if (dx == dx_scratch) read_row(args.x, dx_data, dx, n);
    if (dy == dy_scratch) read_row(args.y, dy_data, dy, n);
    const A* g = args.p.data ? row_as(args.p, at(args.p, start), g_scratch, n) : zeros;
    for (int64_t i = 0; i < n; ++i) {
      dx[i] += g[i] + c * dy[i];
      dy[i] *= beta;
    }
    finish_row(args.x, dx, dx_data, n);
    finish_row(args.y, dy, dy_data, n);
  }
}

static void dual_residual_adjoint(const DualResidualArgs& args, int64_t begin, int64_t end) {
  args.wide ? dual_residual_gradients<double>(args, begin, end)
            : dual_residual_gradients<float>(args, begin, end);
}
