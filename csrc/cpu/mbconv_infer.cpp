// Couplings of MBConvs with running statistics, one call for all of a network's: kernels are called
// back to back, and what an MBConv computes on the way lies in one workspace, which stays in cache.
#include "mbconv_backend.h"

namespace revkernels {
namespace {

// y <- y + up_f(BN_2(p)), or y <- up_f(BN_2(p)).
struct Step {
  MBConv m;
  Statistics statistics[3];
  Map y;
  int64_t factor = 1;
  bool assign = false;
};

constexpr int64_t kNumbers = 7;  // of `terms` per step
constexpr int64_t kAssign = 1, kExpands = 2, kSqueezes = 4;

// Takes the tensors of `weights` one after another.
class Weights {
 public:
  Weights(const std::vector<Tensor>& tensors, ScalarType dtype)
      : tensors_(tensors), dtype_(dtype) {}

  // The next one, dense, of the shape [sizes...] or, where that is -1, of any size.
  void* take(std::initializer_list<int64_t*> sizes) {
    const Name name("weights", next_);
    STD_TORCH_CHECK(next_ < int64_t(tensors_.size()), "weights: expected more than ",
                    tensors_.size(), " tensors for these terms");
    const Tensor& t = tensors_[size_t(next_++)];
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype_, name,
                    ": expected a CPU tensor of the maps' dtype, ",
                    torch::headeronly::toString(dtype_), ", got ",
                    torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
    const Layout layout(t);
    const int64_t dim = int64_t(sizes.size());
    bool fits = layout.dim == dim;
    for (int64_t d = 0; d < std::min(dim, layout.dim); ++d) {
      int64_t& size = *sizes.begin()[d];
      if (size < 0) size = layout.sizes[d];
      fits = fits && size == layout.sizes[d];
    }
    if (!fits) {
      std::vector<int64_t> wanted;
      for (const int64_t* size : sizes) wanted.push_back(*size);
      STD_TORCH_CHECK(false, name, ": expected ", text_of(wanted), ", got ", shape_of(t));
    }
    check_storage(t, name);
    if (t.is_contiguous()) return t.data_ptr();
    copies_.push_back(torch::stable::contiguous(t));
    return copies_.back().data_ptr();
  }

  void finish() const {
    STD_TORCH_CHECK(next_ == int64_t(tensors_.size()), "weights: expected ", next_,
                    " tensors for these terms, got ", tensors_.size());
  }

 private:
  const std::vector<Tensor>& tensors_;
  std::vector<Tensor> copies_;
  ScalarType dtype_;
  int64_t next_ = 0;
};

Map channels_of(Map m, int64_t first, int64_t count, const Name& name) {
  STD_TORCH_CHECK(first >= 0 && count >= 0 && first + count <= m.c, name, ": expected channels ",
                  first, " to ", first + count, ", got ", m.c);
  m.data = static_cast<char*>(m.data) + first * m.sc * bytes_of(m.dtype);
  m.c = count;
  return m;
}

Step step_of(const std::vector<Map>& maps, const int64_t* numbers, const double* eps,
             Weights& weights) {
  const int64_t target = numbers[0], source = numbers[2], flags = numbers[6];
  const int64_t count = int64_t(maps.size());
  STD_TORCH_CHECK(target >= 0 && target < count && source >= 0 && source < count,
                  "terms: expected maps 0 to ", count - 1, ", got ", target, " and ", source);
  Step step;
  step.factor = numbers[5];
  step.assign = (flags & kAssign) != 0;
  check_factor(step.factor);
  MBConv& m = step.m;
  m.planes = m.sums = maps[0].dtype;
  int64_t c = -1, e = -1, k = -1, one = 1, r = -1, out = -1;
  const auto norm = [&](int64_t i, int64_t& channels) {
    Statistics& s = step.statistics[i];
    s.gamma = weights.take({&channels}), s.beta = weights.take({&channels});
    s.mean = weights.take({&channels}), s.var = weights.take({&channels});
    s.eps = eps[i];
    m.norms[i].channels = channels;
  };
  if (flags & kExpands) {
    m.expand.data = weights.take({&e, &c, &one, &one});
    m.expand.rows = e, m.expand.columns = c;
    norm(0, e);
  }
  m.depthwise.data = weights.take({&e, &one, &k, &k});
  m.depthwise.channels = e, m.depthwise.size = k, m.depthwise.stride = numbers[4];
  STD_TORCH_CHECK(k % 2 == 1 && numbers[4] >= 1,
                  "terms: expected an odd kernel and a stride of at ", "least 1, got ", k, " and ",
                  numbers[4]);
  if (c < 0) c = e;
  norm(1, e);
  if (flags & kSqueezes) {
    m.se.w1 = weights.take({&r, &e, &one, &one}), m.se.b1 = weights.take({&r});
    m.se.w2 = weights.take({&e, &r, &one, &one}), m.se.b2 = weights.take({&e});
    m.se.channels = e, m.se.hidden = r;
  }
  m.project.data = weights.take({&out, &e, &one, &one});
  m.project.rows = out, m.project.columns = e;
  norm(2, out);
  m.x = channels_of(maps[size_t(source)], numbers[3], c, {"maps", source});
  step.y = channels_of(maps[size_t(target)], numbers[1], out, {"maps", target});
  const bool apart =
      source != target || numbers[1] + out <= numbers[3] || numbers[3] + c <= numbers[1];
  STD_TORCH_CHECK(apart, "terms: expected a source beside its target, got channels of maps[",
                  target, "] that overlap");
  STD_TORCH_CHECK(step.y.h == m.height() * step.factor && step.y.w == m.width() * step.factor,
                  "maps[", target, "]: expected ", m.height() * step.factor, " x ",
                  m.width() * step.factor, " pixels, got ", step.y.h, " x ", step.y.w);
  return step;
}

// All that one step needs besides its maps; called once to count it, and once to have it.
class Run {
 public:
  Run(const CpuBackend& backend, const Step& step, int64_t chunk_bytes, Workspace& workspace)
      : b_(backend), m_(step.m), step_(step) {
    const int64_t plane = m_.expanded() * m_.x.h * m_.x.w * bytes_of(m_.planes);
    m_.chunk = std::max(int64_t(1), std::min(m_.x.n, chunk_bytes / std::max(plane, int64_t(1))));
    for (Norm& norm : m_.norms) {
      for (void** row : {&norm.mean, &norm.rstd, &norm.scale, &norm.shift}) {
        *row = workspace.take(norm.channels, m_.sums);
      }
    }
    if (m_.expands()) {
      e_ = workspace.plane(m_.planes, m_.chunk, m_.expanded(), m_.x.h, m_.x.w);
    }
    d_ = workspace.plane(m_.planes, m_.chunk, m_.expanded(), m_.height(), m_.width());
    squeezed_ = take_squeezed(m_, m_.chunk, workspace);
    if (m_.squeezes()) active_ = workspace.take(m_.chunk * m_.se.hidden, m_.sums);
    if (step.factor > 1) {
      p_ = workspace.plane(m_.planes, m_.chunk, m_.channels(), m_.height(), m_.width());
    }
  }

  void operator()(Upsampling mode) const {
    for (int64_t k = m_.expands() ? 0 : 1; k < 3; ++k) {
      b_.fold_running(step_.statistics[k], m_.norms[k]);
    }
    for (int64_t begin = 0; begin < m_.x.n; begin += m_.chunk) {
      const int64_t size = std::min(m_.chunk, m_.x.n - begin);
      couple(mode, rows(step_.y, begin, size), rows(m_.x, begin, size));
    }
  }

 private:
  void couple(Upsampling mode, const Map& y, const Map& x) const {
    Map source = x;
    if (m_.expands()) {
      source = rows(e_, 0, x.n);
      b_.pointwise(source, x, m_.expand, Affine{}, nullptr, false);
    }
    const Map d = rows(d_, 0, x.n);
    b_.depthwise(d, source, m_.depthwise, m_.expands() ? m_.norms[0].affine() : Affine{});
    if (m_.squeezes()) {
      b_.squeeze(d, m_.norms[1].affine(), squeezed_.pooled);
      b_.gate(m_.se, x.n, squeezed_, active_);
    }
    const Affine last = m_.norms[2].affine();
    if (step_.factor == 1) {
      b_.project(y, d, m_.project, m_.norms[1].affine(), squeezed_.gate, last, !step_.assign);
      return;
    }
    const Map p = rows(p_, 0, x.n);
    b_.pointwise(p, d, m_.project, m_.norms[1].affine(), squeezed_.gate, false);
    b_.upsample(y, p, last, step_.factor, mode, step_.assign);
  }

  const CpuBackend& b_;
  MBConv m_;
  const Step& step_;
  Map e_, d_, p_;
  Squeezed squeezed_;
  void* active_ = nullptr;
};

void mbconv_infer_(std::vector<Tensor> maps, std::vector<Tensor> weights,
                   std::vector<int64_t> terms, std::vector<double> eps, std::string interpolation,
                   int64_t chunk_bytes) {
  const int64_t count = int64_t(terms.size()) / kNumbers;
  STD_TORCH_CHECK(!maps.empty(), "maps: expected at least one");
  STD_TORCH_CHECK(int64_t(terms.size()) == count * kNumbers, "terms: expected ", kNumbers,
                  " numbers each, got ", terms.size());
  STD_TORCH_CHECK(int64_t(eps.size()) == 3 * count, "eps: expected ", 3 * count,
                  " numbers, 3 for each of ", count, " terms, got ", eps.size());
  const Upsampling mode = upsampling_of(interpolation);
  std::vector<Map> places;
  std::vector<Argument> written;
  for (const Tensor& map : maps) {
    const Name name("maps", int64_t(places.size()));
    places.push_back(map_of(map, name));
    const Map &m = places.back(), &first = places.front();
    STD_TORCH_CHECK(m.dtype == first.dtype && m.n == first.n, name, ": expected ", first.n,
                    " samples of the dtype of maps[0], got ", shape_of(map), " of ",
                    torch::headeronly::toString(map.scalar_type()));
    STD_TORCH_CHECK(m.dtype == DType::float32 || m.dtype == DType::float64, name,
                    ": expected float32 or float64, got ",
                    torch::headeronly::toString(map.scalar_type()));
    STD_TORCH_CHECK(has_distinct_elements(m), name,
                    ": elements overlap in memory; pass a tensor of its own");
    written.emplace_back(map, name);
  }
  for (const Argument& map : written) {
    check_apart(map, written);
    for (size_t i = 0; i < weights.size(); ++i) {
      const Argument weight(weights[i], {"weights", int64_t(i)});
      STD_TORCH_CHECK(weight.begin >= map.end || weight.end <= map.begin, map.name,
                      ": expected memory of its own, as the op writes it, but it shares some with ",
                      weight.name);
    }
  }
  Weights given(weights, maps[0].scalar_type());
  std::vector<Step> steps;
  for (int64_t i = 0; i < count; ++i) {
    steps.push_back(step_of(places, terms.data() + i * kNumbers, eps.data() + 3 * i, given));
  }
  given.finish();
  if (numel(places[0]) == 0) return;

  const CpuBackend backend(maps[0], places[0].dtype);
  Workspace counted(nullptr, 0);
  for (const Step& step : steps) {
    Run(backend, step, chunk_bytes, counted);
    counted.release(0);
  }
  const Tensor memory = empty(maps[0], {counted.needed()}, torch::headeronly::ScalarType::Byte);
  Workspace workspace(memory.data_ptr(), counted.needed());
  for (const Step& step : steps) {
    Run(backend, step, chunk_bytes, workspace)(mode);
    workspace.release(0);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(revkernels, CPU, m) {
  m.impl("mbconv_infer_", TORCH_BOX(&mbconv_infer_));
}

}  // namespace revkernels
