// C entry points to an MBConv's passes as CUDA has them, on emulated kernels: memory is the
// heap's, and products are sums in double.
#include "cuda_emulation.h"
#include "mbconv_backend.h"

namespace {

using namespace revkernels;

struct HeapDevice {
  static inline int64_t allocated = 0, peak = 0;  // bytes

  class Memory {
   public:
    Memory() = default;
    explicit Memory(int64_t bytes)
        : bytes_(new char[size_t(bytes)], [bytes](char* memory) {
            allocated -= bytes;
            delete[] memory;
          }) {
      std::memset(bytes_.get(), emulation::kPoison, size_t(bytes));
      allocated += bytes;
      peak = std::max(peak, allocated);
    }
    void* data() const { return bytes_.get(); }

   private:
    std::shared_ptr<char> bytes_;
  };

  cuda::Stream stream = nullptr;

  Memory allocate(int64_t bytes) const { return Memory(bytes); }

  void multiply(cuda::Dtype dtype, cuda::Dtype out_dtype, const cuda::Matrices& out,
                const cuda::Matrices& a, const cuda::Matrices& b, bool add) const {
    for (int64_t i = 0; i < out.batch; ++i) {
      for (int64_t r = 0; r < out.rows; ++r) {
        for (int64_t c = 0; c < out.columns; ++c) {
          const int64_t to = i * out.stride_b + r * out.stride_r + c * out.stride_c;
          double sum = add ? get(out_dtype, out.data, to) : 0;
          for (int64_t k = 0; k < a.columns; ++k) {
            sum += get(dtype, a.data, i * a.stride_b + r * a.stride_r + k * a.stride_c) *
                   get(dtype, b.data, i * b.stride_b + k * b.stride_r + c * b.stride_c);
          }
          set(out_dtype, const_cast<void*>(out.data), to, sum);
        }
      }
    }
  }

 private:
  template <class F>
  static void as(cuda::Dtype dtype, const F& f) {
    if (dtype == cuda::Dtype::float32) f(float{});
    if (dtype == cuda::Dtype::float64) f(double{});
    if (dtype == cuda::Dtype::float16) f(float16{});
    if (dtype == cuda::Dtype::bfloat16) f(bfloat16{});
  }
  static double get(cuda::Dtype dtype, const void* data, int64_t i) {
    double value = 0;
    as(dtype, [&](auto tag) { value = to_float(static_cast<const decltype(tag)*>(data)[i]); });
    return value;
  }
  static void set(cuda::Dtype dtype, void* data, int64_t i, double value) {
    as(dtype, [&](auto tag) {
      using T = decltype(tag);
      static_cast<T*>(data)[i] = from_float<T>(accumulate_t<T>(value));
    });
  }
};

using Steps = CudaSteps<HeapDevice>;

template <class F>
const char* emulate(int64_t reverse, const F& f) {
  static std::string error;
  emulation::device.error.clear();
  emulation::device.reverse = reverse != 0;
  try {
    f();
    error = emulation::device.error;
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.empty() ? nullptr : error.c_str();
}

// sizes: E, kernel, stride, R, C', chunk. weights: expand, depthwise, squeeze, squeeze_bias,
// excite, excite_bias, project.
MBConv described(const Map& x, double unit, int64_t planes, int64_t sums, const int64_t* sizes,
                 const void* const* weights, const int64_t* batch, void* norms) {
  MBConv m;
  m.x = x, m.unit = unit, m.planes = DType(planes), m.sums = DType(sums);
  const int64_t e = sizes[0], channels = sizes[4];
  if (weights[0] != nullptr) m.expand = {weights[0], e, x.c};
  m.depthwise = {weights[1], e, sizes[1], sizes[2]};
  if (weights[2] != nullptr) {
    m.se = {weights[2], weights[3], weights[4], weights[5], e, sizes[3]};
  }
  m.project = {weights[6], channels, e};
  m.chunk = sizes[5];
  const int64_t columns = (m.expands() ? 2 : 1) * e + channels, item = revkernels::bytes_of(m.sums);
  char* start = static_cast<char*>(norms);
  for (int64_t k = m.expands() ? 0 : 1; k < 3; ++k) {
    const auto row = [&](int64_t i) { return start + i * columns * item; };
    m.norms[k] = {row(0), row(1), row(2), row(3), k < 2 ? e : channels, batch[k] != 0};
    start += m.norms[k].channels * item;
  }
  return m;
}

Squeezed squeezed_at(const MBConv& m, void* data) {
  if (data == nullptr || !m.squeezes()) return {};
  const int64_t item = revkernels::bytes_of(m.sums);
  char* gate = static_cast<char*>(data);
  char* hidden = gate + m.x.n * m.expanded() * item;
  return {gate, hidden, hidden + m.x.n * m.se.hidden * item};
}

}  // namespace

extern "C" {

// parameters: gamma and beta of the three norms; running: mean, var and count of each.
const char* emulate_mbconv(int64_t reverse, const Map* x, double unit, int64_t planes, int64_t sums,
                           const int64_t* sizes, const void* const* weights, const int64_t* batch,
                           void* norms, const void* const* parameters, void* const* running,
                           const double* momentum, const double* eps, int64_t given, const Map* p,
                           const Map* d, void* workspace, int64_t bytes) {
  const MBConv m = described(*x, unit, planes, sums, sizes, weights, batch, norms);
  Statistics statistics[3];
  for (int k = 0; k < 3; ++k) {
    statistics[k] = {parameters[2 * k],
                     parameters[2 * k + 1],
                     running[3 * k],
                     running[3 * k + 1],
                     static_cast<int64_t*>(running[3 * k + 2]),
                     momentum[k],
                     eps[k]};
  }
  return emulate(reverse, [&] {
    Steps steps(m.sums);
    Workspace pieces(workspace, bytes);
    mbconv_forward(steps, m, statistics, given != 0, *p, d ? *d : Map{}, pieces);
  });
}

const char* emulate_mbconv_recompute(int64_t reverse, const Map* x, double unit, int64_t planes,
                                     int64_t sums, const int64_t* sizes, const void* const* weights,
                                     const int64_t* batch, void* norms, const Map* p, const Map* d,
                                     const Map* e, void* squeezed, void* workspace, int64_t bytes) {
  const MBConv m = described(*x, unit, planes, sums, sizes, weights, batch, norms);
  return emulate(reverse, [&] {
    Steps steps(m.sums);
    Workspace pieces(workspace, bytes);
    mbconv_recompute(steps, m, *p, d ? *d : Map{}, e ? *e : Map{}, squeezed_at(m, squeezed),
                     pieces);
  });
}

// gradients: of expand, gamma0, beta0, depthwise, gamma1, beta1, squeeze, squeeze_bias, excite,
// excite_bias, project, gamma2, beta2.
const char* emulate_mbconv_backward(int64_t reverse, const Map* x, double unit, int64_t planes,
                                    int64_t sums, const int64_t* sizes, const void* const* weights,
                                    const int64_t* batch, void* norms, const Map* du,
                                    const void* du_sums, const void* keep, const Map* p,
                                    const Map* d, const Map* e, void* squeezed, const Map* dz,
                                    const Map* dx, int64_t add, void* const* gradients,
                                    void* workspace, int64_t bytes) {
  const MBConv m = described(*x, unit, planes, sums, sizes, weights, batch, norms);
  Cotangent cotangent{*du, du_sums, {}};
  if (keep != nullptr) cotangent.keep = {keep, m.sums, 1, 0};
  const Kept kept{p ? *p : Map{}, d ? *d : Map{}, e ? *e : Map{}, squeezed_at(m, squeezed)};
  Gradients g;
  void** const to[] = {&g.expand,  &g.gamma[0], &g.beta[0], &g.depthwise, &g.gamma[1],
                       &g.beta[1], &g.w1,       &g.b1,      &g.w2,        &g.b2,
                       &g.project, &g.gamma[2], &g.beta[2]};
  for (int i = 0; i < 13; ++i) *to[i] = gradients[i];
  return emulate(reverse, [&] {
    Steps steps(m.sums);
    Workspace pieces(workspace, bytes);
    mbconv_backward(steps, m, cotangent, kept, dz ? *dz : Map{}, dx ? *dx : Map{}, add != 0, g,
                    pieces);
  });
}

// The weight gradient of a 1x1 convolution alone, and how many bytes it took at a time.
const char* emulate_pointwise_grad_weight(int64_t reverse, const Map* x, const Map* dy,
                                          const void* scale, const void* shift, const void* gate,
                                          void* dw, int64_t add, int64_t* peak) {
  return emulate(reverse, [&] {
    HeapDevice device;
    HeapDevice::peak = HeapDevice::allocated = 0;
    const Activation act = scale ? Activation::hardswish : Activation::identity;
    cuda::pointwise_grad_weight(device, type_of(x->dtype), dw, map_of(*x), map_of(*dy),
                                {scale, shift, gate, act}, add != 0);
    *peak = HeapDevice::peak;
  });
}

}  // extern "C"
