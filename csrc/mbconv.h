// MBConv's forward, recompute and vector-Jacobian product, written once for every device: a Backend
// computes one step on one chunk of samples, and what is here puts the steps in order.
//
//   e = W_e x                     (only with expansion)     [N, E, H, W]
//   d = dw(h(BN_0(e))) or dw(x)                             [N, E, H', W']
//   gate = SE(mean_hw h(BN_1(d)))                           [N, E]
//   p = W_p (gate h(BN_1(d)))                               [N, C', H', W']
//
// h is hardswish, BN_k(x) = scale_k x + shift_k. The result of the branch is keep BN_2(p), which
// the coupling adds. Planes are the caller's or pieces of one workspace; nothing is allocated here.
// A forward and its recompute call the same steps on the same arguments, so that p comes out the
// same bit for bit.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "map.h"

namespace revkernels {

// Vectors and matrices are dense and in the type that sums are kept in, unless a stride says else.

struct Affine {  // z = hardswish(scale x + shift), [C] each; null for z = x
  const void *scale = nullptr, *shift = nullptr;
};

struct Matrix {  // of a 1x1 convolution: [rows, columns], or the transpose of [columns, rows]
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
  bool transposed = false;

  Matrix transpose() const { return {data, columns, rows, !transposed}; }
};

struct Filter {  // of a depthwise convolution: [channels, size, size]
  const void* data = nullptr;
  int64_t channels = 0, size = 1, stride = 1;
};

struct SqueezeExcite {  // w1 [R, E], b1 [R], w2 [E, R], b2 [E]; null w1 for none
  const void *w1 = nullptr, *b1 = nullptr, *w2 = nullptr, *b2 = nullptr;
  int64_t channels = 0, hidden = 0;
};

struct Squeezed {                                              // of some samples
  void *gate = nullptr, *hidden = nullptr, *pooled = nullptr;  // [n, E], [n, R], [n, E]
};

struct Norm {  // [C] each; `batch`: the statistics are those of the batch
  void *mean = nullptr, *rstd = nullptr, *scale = nullptr, *shift = nullptr;
  int64_t channels = 0;
  bool batch = false;

  Affine affine() const { return {scale, shift}; }
};

struct Statistics {  // what a Norm is made of: [C] each, running ones null where there are none
  const void *gamma = nullptr, *beta = nullptr;
  void *mean = nullptr, *var = nullptr;  // running: updated with batch statistics, used without
  int64_t* batches = nullptr;
  double momentum = 0, eps = 0;
};

struct NormGradient {  // [C] each: dx = scale g + slope x + offset, g = (gate dz + dpool) h'(u)
  void *gamma = nullptr, *beta = nullptr, *slope = nullptr, *offset = nullptr;
};

// From dz to dx, z = gate h(u), u = BN(x): sums over the pixels of every plane, their fold over the
// samples, and the map.
struct NormPull {
  Norm norm;
  Activation act = Activation::hardswish;
  const void* sums = nullptr;      // [5, N, C], or [2, N, C] without an activation
  int64_t samples = 0, count = 0;  // N, and of a channel's values
  Coefficient gate, dpool;         // [N, C]; dpool: of the mean of h(u), per pixel
  NormGradient gradient;

  bool five() const { return act != Activation::identity; }
};

// One MBConv and its input.
struct MBConv {
  Map x;            // [N, C, H, W]
  double unit = 1;  // what an integer of an int16 x stands for
  DType planes = DType::float32, sums = DType::float32;
  Matrix expand;  // [E, C]; null for none
  Filter depthwise;
  SqueezeExcite se;
  Matrix project;  // [C', E]
  Norm norms[3];
  int64_t chunk = 1;  // samples

  bool expands() const { return expand.data != nullptr; }
  bool squeezes() const { return se.w1 != nullptr; }
  int64_t expanded() const { return depthwise.channels; }
  int64_t channels() const { return project.rows; }
  int64_t height() const { return depthwise_out_size(x.h, depthwise.stride); }
  int64_t width() const { return depthwise_out_size(x.w, depthwise.stride); }
  int64_t area() const { return height() * width(); }
};

// What the backward leaves per parameter, in the type of sums; null where a part is absent.
struct Gradients {
  void *expand = nullptr, *depthwise = nullptr, *project = nullptr;
  void *gamma[3] = {}, *beta[3] = {};
  void *w1 = nullptr, *b1 = nullptr, *w2 = nullptr, *b2 = nullptr;
};

// Pieces of one block of memory, each from a multiple of kAlignment bytes on. All are taken before
// any is used: `check` refuses a block that is too small.
class Workspace {
 public:
  static constexpr int64_t kAlignment = 64;

  Workspace(void* start, int64_t bytes) : start_(static_cast<char*>(start)), bytes_(bytes) {}

  void* take(int64_t bytes) {
    void* piece = start_ + next_;
    next_ += ceil_div(bytes, kAlignment) * kAlignment;
    needed_ = std::max(needed_, next_);
    return piece;
  }
  void* take(int64_t count, DType dtype) { return take(count * bytes_of(dtype)); }
  Map plane(DType dtype, int64_t n, int64_t c, int64_t h, int64_t w) {
    return {take(n * c * h * w, dtype), dtype, n, c, h, w, c * h * w, h * w, w, 1};
  }
  // What was taken since is used up at `mark`: the next pieces may have the same memory.
  int64_t mark() const { return next_; }
  void release(int64_t mark) { next_ = mark; }
  int64_t needed() const { return needed_; }

  void check() const {
    if (needed_ > bytes_) {
      throw std::runtime_error("workspace: expected at least " + std::to_string(needed_) +
                               " bytes, got " + std::to_string(bytes_));
    }
  }

 private:
  char* start_;
  int64_t bytes_, next_ = 0, needed_ = 0;
};

struct Chunk {
  int64_t begin, size;
};

// The planes and vectors of one MBConv, chunk by chunk: those of all samples where they are kept,
// else those of the latest chunk.
template <class Backend>
class Planes {
 public:
  // e, d: where to keep these planes, null data for a chunk of them in the workspace; `ready`: they
  // are computed already. squeezed: of all samples, null for none.
  Planes(Backend& backend, const MBConv& m, Map e, Map d, bool ready, Squeezed squeezed,
         Workspace& workspace)
      : b_(backend), m_(m), e_(e), d_(d), squeezed_(squeezed) {
    const int64_t samples = std::min(m.chunk, m.x.n);
    const bool integer = m.x.dtype == DType::int16;
    e_ready_ = ready && e.data != nullptr, d_ready_ = ready && d.data != nullptr;
    if constexpr (Backend::kReadsStreams) {  // integers as they are, their unit in the weights
      if (integer) {
        const Filter& f = m.depthwise;
        scaled_size_ =
            m.expands() ? m.expand.rows * m.expand.columns : f.channels * f.size * f.size;
        scaled_ = workspace.take(scaled_size_, m.sums);
      }
    } else if (m.x.dtype != m.planes) {
      x_ = workspace.plane(m.planes, samples, m.x.c, m.x.h, m.x.w);
    }
    if (m.expands() && e.data == nullptr) {
      e_ = workspace.plane(m.planes, samples, m.expanded(), m.x.h, m.x.w);
    }
    if (d.data == nullptr) {
      d_ = workspace.plane(m.planes, samples, m.expanded(), m.height(), m.width());
    }
    if (m.squeezes()) active_ = workspace.take(samples * m.se.hidden, m.sums);
  }

  // To be called when the workspace was checked.
  void prepare() {
    if (scaled_ == nullptr) return;
    const void* weight = m_.expands() ? m_.expand.data : m_.depthwise.data;
    b_.scale(scaled_, weight, scaled_size_, m_.unit);
    (m_.expands() ? m_.expand.data : m_.depthwise.data) = scaled_;
  }

  template <class Body>
  void for_chunks(const Body& body) const {
    for (int64_t begin = 0; begin < m_.x.n; begin += m_.chunk) {
      body(Chunk{begin, std::min(m_.chunk, m_.x.n - begin)});
    }
  }

  Map of(const Map& plane, Chunk c) const {
    return rows(plane, plane.n == m_.x.n ? c.begin : 0, c.size);
  }

  // x as the first convolution reads it.
  Map x(Chunk c) {
    const Map x = rows(m_.x, c.begin, c.size);
    if constexpr (!Backend::kReadsStreams) {
      if (x_.data != nullptr) {
        b_.convert(of(x_, c), x, m_.unit);
        return of(x_, c);
      }
    }
    return x;
  }

  // What the depthwise convolution reads through its prologue: e or x.
  Map source(Chunk c) {
    if (!m_.expands()) return x(c);
    if (!e_ready_) b_.pointwise(of(e_, c), x(c), m_.expand, Affine{}, nullptr, false);
    return of(e_, c);
  }

  Map d(Chunk c, const Map& source) {
    if (!d_ready_) b_.depthwise(of(d_, c), source, m_.depthwise, prologue());
    return of(d_, c);
  }
  Map d(Chunk c) { return d_ready_ ? of(d_, c) : d(c, source(c)); }

  Affine prologue() const { return m_.expands() ? m_.norms[0].affine() : Affine{}; }

  Squeezed squeezed(Chunk c) const {
    const int64_t bytes = bytes_of(m_.sums), e = m_.expanded() * bytes, r = m_.se.hidden * bytes;
    const auto at = [](void* data, int64_t offset) { return static_cast<char*>(data) + offset; };
    return {at(squeezed_.gate, c.begin * e), at(squeezed_.hidden, c.begin * r),
            at(squeezed_.pooled, c.begin * e)};
  }

  // gate = SE(mean_hw h(BN_1(d)))
  const void* gate(Chunk c, const Map& d) {
    if (!m_.squeezes()) return nullptr;
    const Squeezed s = squeezed(c);
    b_.squeeze(d, m_.norms[1].affine(), s.pooled);
    b_.gate(m_.se, c.size, s, active_);
    return s.gate;
  }

  void project(const Map& p, const Map& d, const void* gate) {
    b_.pointwise(p, d, m_.project, m_.norms[1].affine(), gate, false);
  }

  // The gate, and p with it.
  void squeeze_project(const Map& p, const Map& d, Chunk c) {
    if (!m_.squeezes()) return project(p, d, nullptr);
    b_.squeeze_project(p, d, m_.project, m_.norms[1].affine(), m_.se, squeezed(c), active_);
  }

  void keep_e() { e_ready_ = m_.expands(); }
  void keep_d() { d_ready_ = true; }

 private:
  Backend& b_;
  MBConv m_;
  Map x_, e_, d_;
  Squeezed squeezed_;
  bool e_ready_, d_ready_;
  void *scaled_ = nullptr, *active_ = nullptr;
  int64_t scaled_size_ = 0;
};

inline Squeezed take_squeezed(const MBConv& m, int64_t samples, Workspace& workspace) {
  if (!m.squeezes()) return {};
  Squeezed s;
  s.gate = workspace.take(samples * m.expanded(), m.sums);
  s.hidden = workspace.take(samples * m.se.hidden, m.sums);
  s.pooled = workspace.take(samples * m.expanded(), m.sums);
  return s;
}

// p, and the norms: those of `given` as they are, the others from the batch or from running
// statistics. With batch statistics, every chunk of a plane is computed before the next plane.
// d: where to keep it, or null data.
template <class Backend>
void mbconv_forward(Backend& b, const MBConv& m, const Statistics (&statistics)[3], bool given,
                    const Map& p, Map d, Workspace& workspace) {
  const int64_t n = m.x.n, first = m.expands() ? 0 : 1;
  bool batch = false;
  for (int64_t k = first; k < 3; ++k) batch = batch || m.norms[k].batch;
  Map e;
  double* moments = nullptr;
  if (batch) {
    if (m.expands()) e = workspace.plane(m.planes, n, m.expanded(), m.x.h, m.x.w);
    if (d.data == nullptr) d = workspace.plane(m.planes, n, m.expanded(), m.height(), m.width());
    moments = static_cast<double*>(
        workspace.take(2 * n * std::max(m.expanded(), m.channels()), DType::float64));
  }
  const Squeezed squeezed = take_squeezed(m, n, workspace);
  Planes<Backend> planes(b, m, e, d, false, squeezed, workspace);
  workspace.check();
  planes.prepare();

  const bool whole = m.chunk >= n;  // a plane comes in one chunk
  const auto observe = [&](int64_t k, Chunk c, const Map& plane) {
    if (!m.norms[k].batch) return;
    if (whole) {
      b.statistics(plane, moments, statistics[k], m.norms[k]);
    } else {
      b.moments(plane, moments + 2 * c.begin * plane.c);
    }
  };
  const auto fold = [&](int64_t k) {
    if (m.norms[k].batch) {
      if (whole) return;
      b.fold(moments, n, k == 0 ? m.x.h * m.x.w : m.area(), statistics[k], m.norms[k]);
    } else if (!given) {
      b.fold_running(statistics[k], m.norms[k]);
    }
  };
  if (!batch) {
    for (int64_t k = first; k < 3; ++k) fold(k);
  } else {
    if (m.expands()) {
      planes.for_chunks([&](Chunk c) { observe(0, c, planes.source(c)); });
      planes.keep_e();
      fold(0);
    }
    planes.for_chunks([&](Chunk c) { observe(1, c, planes.d(c)); });
    planes.keep_d();
    fold(1);
  }
  planes.for_chunks([&](Chunk c) {
    const Map chunk_d = planes.d(c), chunk_p = planes.of(p, c);
    planes.squeeze_project(chunk_p, chunk_d, c);
    observe(2, c, chunk_p);
  });
  if (batch) fold(2);
}

// p again, and squeeze-excite's vectors; d and e are kept where they have data.
template <class Backend>
void mbconv_recompute(Backend& b, const MBConv& m, const Map& p, const Map& d, const Map& e,
                      Squeezed squeezed, Workspace& workspace) {
  Planes<Backend> planes(b, m, e, d, false, squeezed, workspace);
  workspace.check();
  planes.prepare();
  planes.for_chunks([&](Chunk c) {
    const Map chunk_d = planes.d(c);
    planes.squeeze_project(planes.of(p, c), chunk_d, c);
  });
}

// What the backward starts from.
struct Cotangent {
  Map du;                      // of keep BN_2(p)
  const void* sums = nullptr;  // [2, N, C']: sum_hw du, sum_hw du (p - mean); null: not known yet
  Coefficient keep;            // [N], stochastic depth; null for none
};

// What there is of the forward: null data for what is to be computed again.
struct Kept {
  Map p, d, e;
  Squeezed squeezed;
};

// The gradients of the parameters, and of the input into dx: added to it, or with `add` unset
// written, where dx may be x, dz or du: a chunk of them was read for the last time by then.
// dz: for the gradient of the projection's input [N, E, H', W'], or null; by default it is written
// over p where that has its shape.
template <class Backend>
void mbconv_backward(Backend& b, const MBConv& m, const Cotangent& cotangent, const Kept& kept,
                     Map dz, const Map& dx, bool add, const Gradients& gradients,
                     Workspace& workspace) {
  const int64_t n = m.x.n, e = m.expanded(), out = m.channels();
  const int64_t samples = std::min(m.chunk, n), item = bytes_of(m.sums);
  const int64_t h = m.x.h, w = m.x.w, out_h = m.height(), out_w = m.width();
  const int64_t count = n * out_h * out_w;

  // Memory.
  const bool squeezed = !m.squeezes() || kept.squeezed.gate != nullptr;
  const Squeezed se = squeezed ? kept.squeezed : take_squeezed(m, n, workspace);
  Planes<Backend> planes(b, m, kept.e, kept.d, true, se, workspace);
  void* dpool = m.squeezes() ? workspace.take(n * e, m.sums) : nullptr;
  void* sums2 = cotangent.sums ? nullptr : workspace.take(2 * n * out, m.sums);
  void* sums1 = workspace.take(5 * n * e, m.sums);
  void* sums0 = m.expands() ? workspace.take(5 * n * e, m.sums) : nullptr;
  void* slope2 = workspace.take(out, m.sums);
  void* offset2 = workspace.take(out, m.sums);
  void* slope = workspace.take(e, m.sums);  // of BN_1, then of BN_0
  void* offset = workspace.take(e, m.sums);
  void* partial = workspace.take(
      ceil_div(samples, kSamplesPerPartial) * e * m.depthwise.size * m.depthwise.size, m.sums);
  void* gate_scratch = m.squeezes() ? workspace.take(n * (e + 2 * m.se.hidden), m.sums) : nullptr;
  const bool over_p = kept.p.data != nullptr && out == e;
  // Where d is not kept, dz is neither, unless dv takes its place.
  const bool dz_again = dz.data == nullptr && !over_p && kept.d.data == nullptr &&
                        !(m.expands() && m.depthwise.stride == 1);
  if (dz.data == nullptr) {
    dz = over_p ? kept.p : workspace.plane(m.planes, dz_again ? samples : n, e, out_h, out_w);
  }
  Map dp;
  if (dz_again) dp = workspace.plane(m.planes, samples, out, out_h, out_w);
  Map dv;  // gradient of v = h(BN_0(e))
  if (m.expands()) dv = m.depthwise.stride == 1 ? dz : workspace.plane(m.planes, n, e, h, w);
  const int64_t mark = workspace.mark();
  if (!dz_again) dp = workspace.plane(m.planes, samples, out, out_h, out_w);
  const Map again = kept.p.data ? kept.p : workspace.plane(m.planes, samples, out, out_h, out_w);
  workspace.release(mark);
  const Map dd = workspace.plane(m.planes, samples, e, out_h, out_w);
  Map dsource;
  if (!m.expands() && dx.data &&
      add) {  // over dz, which was read by then, where that has its shape
    dsource = m.depthwise.stride == 1 ? dz : workspace.plane(m.planes, samples, e, h, w);
  }
  workspace.release(mark);
  Map de;
  if (m.expands()) de = workspace.plane(m.planes, samples, e, h, w);
  workspace.check();
  planes.prepare();

  const auto at = [&](const void* rows, Chunk c, int64_t width) -> void* {  // of [.., N, width]
    if (rows == nullptr) return nullptr;
    return const_cast<char*>(static_cast<const char*>(rows)) + c.begin * width * item;
  };
  const auto per_sample = [&](const void* rows) {  // [n, E]
    Coefficient v;
    v.data = rows, v.dtype = m.sums, v.sn = e, v.sc = 1;
    return v;
  };
  const Norm &norm0 = m.norms[0], &norm1 = m.norms[1], &norm2 = m.norms[2];
  bool has_gate = squeezed;
  const auto gate = [&](Chunk c, const Map& d) -> const void* {
    if (!m.squeezes()) return nullptr;
    return has_gate ? planes.squeezed(c).gate : planes.gate(c, d);
  };
  const auto p_of = [&](Chunk c, const Map& d, const void* gate) {
    const Map p = planes.of(again, c);
    if (kept.p.data == nullptr) planes.project(p, d, gate);
    return p;
  };

  // The last two steps from a norm's result to its input; both at once, and with `sums` all three,
  // where a plane comes in one chunk.
  const bool whole = m.chunk >= n;
  const auto fold = [&](const NormPull& pull) {
    if (!whole) b.fold_grad(pull);
  };
  const auto pull_norm = [&](const NormPull& pull, Chunk c, const Map& dx, const Map& dz,
                             const Map& x, void* sums) {
    if (whole) {
      b.norm_grad(dx, dz, x, pull, sums);
    } else {
      b.act_grad(dx, dz, x, pull, c.begin);
    }
  };

  // result = keep BN_2(p)
  const Map& du = cotangent.du;
  const bool summed = cotangent.sums != nullptr;
  if (!summed && !whole && kept.p.data) {
    b.coupling_sums(du, kept.p, norm2, sums2, n * out);
  } else if (!summed && !whole) {
    planes.for_chunks([&](Chunk c) {
      const Map d = planes.d(c), p = p_of(c, d, gate(c, d));
      b.coupling_sums(planes.of(du, c), p, norm2, at(sums2, c, out), n * out);
    });
    has_gate = true;
  }
  const NormPull pull2{norm2,
                       Activation::identity,
                       summed ? cotangent.sums : sums2,
                       n,
                       count,
                       cotangent.keep,
                       Coefficient{},
                       {gradients.gamma[2], gradients.beta[2], slope2, offset2}};
  fold(pull2);

  // p = W_p z, z = gate h(BN_1(d))
  const auto pull_project = [&](Chunk c, const Map& p, bool folded) {
    const Map chunk_dp = planes.of(dp, c), chunk_du = planes.of(du, c);
    if (folded) {
      b.act_grad(chunk_dp, chunk_du, p, pull2, c.begin);
    } else {
      pull_norm(pull2, c, chunk_dp, chunk_du, p, summed ? nullptr : sums2);
    }
    b.pointwise(planes.of(dz, c), chunk_dp, m.project.transpose(), Affine{}, nullptr, false);
  };
  planes.for_chunks([&](Chunk c) {
    const Map d = planes.d(c);
    const void* chunk_gate = gate(c, d);
    pull_project(c, p_of(c, d, chunk_gate), false);
    b.project_grad(gradients.project, d, planes.of(dp, c), planes.of(dz, c), norm1, chunk_gate,
                   at(sums1, c, e), n * e, c.begin > 0);
  });

  // gate = SE(mean_hw h(BN_1(d))): every pixel of h gets dpool on top of gate dz
  if (m.squeezes()) {
    b.gate_grad(m.se, n, sums1, se, m.area(), dpool, gradients, gate_scratch);
  }
  const NormPull pull1{norm1,
                       Activation::hardswish,
                       sums1,
                       n,
                       count,
                       per_sample(se.gate),
                       per_sample(dpool),
                       {gradients.gamma[1], gradients.beta[1], slope, offset}};
  fold(pull1);

  // d = dw(v), v = h(BN_0(e)) or x
  planes.for_chunks([&](Chunk c) {
    const Map source = planes.source(c), d = planes.d(c, source), chunk_dd = planes.of(dd, c);
    if (dz_again) pull_project(c, planes.of(kept.p, c), true);
    pull_norm(pull1, c, chunk_dd, planes.of(dz, c), d, nullptr);
    b.depthwise_grad_weight(gradients.depthwise, source, chunk_dd, m.depthwise, planes.prologue(),
                            c.begin > 0, partial);
    if (m.expands()) {
      const Map chunk_dv = planes.of(dv, c);
      b.depthwise_grad_input(chunk_dv, chunk_dd, m.depthwise, false, Map{});
      if (!whole) b.act_grad_sums(chunk_dv, source, norm0, at(sums0, c, e), n * e);
    } else if (dx.data != nullptr) {
      const Map spare = add ? planes.of(dsource, c) : Map{};
      b.depthwise_grad_input(planes.of(dx, c), chunk_dd, m.depthwise, add, spare);
    }
  });
  const bool scaled = m.unit != 1 && Backend::kReadsStreams;  // integers were read as they are
  const int64_t taps = e * m.depthwise.size * m.depthwise.size;
  if (!m.expands()) {
    if (scaled) b.scale(gradients.depthwise, gradients.depthwise, taps, m.unit);
    return;
  }

  // v = h(BN_0(e)), e = W_e x
  const NormPull pull0{norm0,         Activation::hardswish,
                       sums0,         n,
                       n * h * w,     Coefficient{},
                       Coefficient{}, {gradients.gamma[0], gradients.beta[0], slope, offset}};
  fold(pull0);
  planes.for_chunks([&](Chunk c) {
    const Map source = planes.source(c), chunk_de = planes.of(de, c);
    pull_norm(pull0, c, chunk_de, planes.of(dv, c), source, sums0);
    b.pointwise_grad_weight(gradients.expand, planes.x(c), chunk_de, Affine{}, nullptr,
                            c.begin > 0);
    if (dx.data != nullptr) {
      b.pointwise(planes.of(dx, c), chunk_de, m.expand.transpose(), Affine{}, nullptr, add);
    }
  });
  if (scaled) {
    b.scale(gradients.expand, gradients.expand, e * m.x.c, m.unit);
  }
}

}  // namespace revkernels
