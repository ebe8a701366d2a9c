// What lies between the matmuls of the sparse gradient's tail as ops; see cce_ext/sparse/backward.py.
#include <cmath>

#include "cuda/sparse/tilt.h"
#include "torch/cuda_call.h"

namespace cce::torch_api {
namespace {

// 16-bit rows of whole 16-byte pieces.
Tensor piece_rows(const Tensor& like, int64_t count, int64_t cols) {
  return empty(like, {count, ceil_div(cols, 8) * 8}, like.scalar_type());
}
// The first columns of a matrix whose rows are longer.
Tensor columns(Tensor t, int64_t count) { return torch::stable::narrow(t, 1, 0, count); }

std::tuple<Tensor, Tensor> level_sums_cuda(Tensor levels, Tensor rows, Tensor draws, Tensor classes,
                                           Tensor bound2, Tensor lse, Tensor targets, Tensor exact,
                                           int64_t shard_size, double eps, double softcap,
                                           int64_t ignore_index, int64_t vocab_start,
                                           int64_t vocab_total) {
  const Guard guard(levels.get_device_index());
  STD_TORCH_CHECK(levels.size(0) == rows.size(0) && levels.size(1) >= shard_size &&
                      draws.size(0) == rows.size(0),
                  "levels must have a row for each sampled one, and a column for each id");
  cuda::LevelSumsParams p;
  p.levels = u8(levels, "levels");
  p.ld = levels.size(1);
  p.paired = backend().paired_columns;
  p.rows = i64(rows, "rows");
  p.draws = f32(draws, "draws");
  p.samples = static_cast<int>(rows.size(0));
  p.classes = i64(classes, "classes");
  p.bound2 = f32(bound2, "bound2");
  p.lse = f32(lse, "lse");
  p.targets = i64(targets, "targets");
  p.exact = data<uint8_t>(exact, ScalarType::Bool, "exact");
  p.vocab = shard_size;
  p.options = {softcap, 1.0, 0.0, ignore_index, vocab_start, vocab_total};
  p.log2_eps = static_cast<float>(std::log2(eps));
  const Tensor sorted = empty_records<cuda::LevelRow>(lse, p.samples);
  const Tensor weight = empty(lse, {p.samples}, ScalarType::Float);
  const Tensor sums = empty(lse, {cuda::kTailClasses, p.vocab}, ScalarType::Float);
  p.sorted = static_cast<cuda::LevelRow*>(sorted.mutable_data_ptr());
  p.weight = floats(weight);
  p.sums = floats(sums);
  check_cuda(cuda::level_sums(p, stream_of(lse)), "level_sums");
  return {sums, weight};
}

Tensor tail_factors_cuda(Tensor classes, Tensor like, Tensor a, Tensor d, Tensor mass, Tensor units,
                         int64_t tilt, int64_t hot, double scale, std::optional<double> uniform) {
  const Guard guard(mass.get_device_index());
  STD_TORCH_CHECK(tilt % 8 == 0 && hot % 8 == 0 && units.size(0) == 3,
                  "columns of the tilt and hot ids in eights, three units");
  cuda::TailFactorsParams p;
  p.dtype = kernel_dtype(like);
  p.classes = i64(classes, "classes");
  p.n = mass.size(0);
  p.a = f32(a, "a");
  p.d = f32(d, "d");
  p.mass = f32(mass, "mass");
  p.groups = static_cast<int>(mass.size(1));
  p.scale = static_cast<float>(scale);
  p.smoothing = uniform.has_value();
  p.uniform = static_cast<float>(uniform.value_or(0.0));
  p.units = f32(units, "units");
  p.hot = hot;
  const int64_t width = tilt + hot + p.groups * (cuda::kTailClasses + p.smoothing);
  const Tensor factors = piece_rows(like, p.n, width);
  p.factors = static_cast<uint16_t*>(factors.mutable_data_ptr()) + tilt;
  p.ld = factors.stride(0);
  p.width = p.ld - tilt;
  check_cuda(cuda::tail_factors(p, stream_of(mass)), "tail_factors");
  return columns(factors, width);
}

// dtype's: that of like.
std::tuple<Tensor, Tensor, Tensor> tail_shapes_cuda(Tensor sums, Tensor like, double shared,
                                                    bool smoothing, int64_t tilt) {
  const Guard guard(sums.get_device_index());
  STD_TORCH_CHECK(sums.size(0) == cuda::kTailClasses, "sums must have a row for each class");
  using Out = cuda::TailShapesParams::Out;
  const ScalarType dtype = like.scalar_type();
  cuda::TailShapesParams p;
  p.sums = f32(sums, "sums");
  p.vocab = sums.size(1);
  p.shared = static_cast<float>(shared);
  p.smoothing = smoothing;
  p.dtype = dtype == ScalarType::Float                     ? Out::kFloat
            : kernel_dtype(like) == cuda::Dtype::kBFloat16 ? Out::kBFloat16
                                                           : Out::kHalf;
  const Tensor shapes = piece_rows(like, cuda::kTailClasses + smoothing, p.vocab);
  p.shapes = shapes.mutable_data_ptr();
  p.ld = shapes.stride(0);
  const Tensor totals = empty(sums, {ceil_div(p.vocab, cuda::kGroupCols)}, ScalarType::Long);
  p.totals = i64(totals, "totals");
  check_cuda(cuda::tail_shapes(p, stream_of(sums)), "tail_shapes");

  cuda::TiltIdsParams t;
  t.sums = p.sums;
  t.totals = p.totals;
  t.vocab = p.vocab;
  t.groups = static_cast<int>(totals.size(0));
  t.count = static_cast<int>(tilt);
  const Tensor ids = empty(sums, {tilt}, ScalarType::Long);
  const Tensor first = empty(sums, {t.groups + 1}, ScalarType::Int);
  t.ids = i64(ids, "ids");
  t.first = i32(first, "first");
  check_cuda(cuda::tilt_ids(t, stream_of(sums)), "tilt_ids");
  return {columns(shapes, p.vocab), ids, first};
}

void tilt_cuda(Tensor z, Tensor ids, Tensor first, Tensor classes, Tensor rows, Tensor weight,
               Tensor row_mass, Tensor mass, Tensor a, std::optional<Tensor> bias, double softcap,
               double logit_scale, double shared, double strength, double damping, Tensor units) {
  const Guard guard(z.get_device_index());
  STD_TORCH_CHECK(z.size(1) == ids.size(0) && z.size(1) % 2 == 0 && z.stride(0) % 2 == 0 &&
                      z.stride(1) == 1 && units.size(0) == 3 && first.size(0) == mass.size(1) + 1 &&
                      mass.size(0) == z.size(0),
                  "z must have a column for each id, an even number, and a row for each of mass, "
                  "first a place for each group and one more, units three numbers");
  cuda::TiltParams p;
  p.dtype = kernel_dtype(z);
  p.z = z.mutable_data_ptr();
  p.ld = z.stride(0);
  p.n = z.size(0);
  p.count = static_cast<int>(ids.size(0));
  p.ids = i64(ids, "ids");
  p.first = i32(first, "first");
  p.classes = i64(classes, "classes");
  p.rows = i64(rows, "rows");
  p.samples = static_cast<int>(rows.size(0));
  p.weight = f32(weight, "weight");
  p.row_mass = f32(row_mass, "row_mass");
  p.mass = f32(mass, "mass");
  p.groups = static_cast<int>(mass.size(1));
  p.a = f32(a, "a");
  if (bias) p.bias = f32(*bias, "bias");
  p.options.softcap = softcap;
  p.options.logit_scale = logit_scale;
  p.shared = static_cast<float>(shared);
  p.strength = static_cast<float>(strength);
  p.damping = static_cast<float>(damping);
  p.units = f32(units, "units");
  const Tensor means = empty(z, {cuda::kTailClasses, ids.size(0)}, ScalarType::Float);
  p.means = f32(means, "means");
  check_cuda(cuda::tilt_rows(p, stream_of(z)), "tilt_");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("level_sums", TORCH_BOX(&cce::torch_api::level_sums_cuda));
  m.impl("tail_factors", TORCH_BOX(&cce::torch_api::tail_factors_cuda));
  m.impl("tail_shapes", TORCH_BOX(&cce::torch_api::tail_shapes_cuda));
  m.impl("tilt_", TORCH_BOX(&cce::torch_api::tilt_cuda));
}
