// What lies between the matmuls of the sparse gradient's tail as ops; see cce_ext/sparse/backward.py.
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

using TailRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

TailRows tail_rows_cuda(Tensor rows, Tensor weight, double lift, Tensor e, std::optional<Tensor> u,
                        Tensor lse, Tensor targets, double label_smoothing, int64_t ignore_index,
                        int64_t shard_size, int64_t vocab_start, int64_t vocab_total) {
  const Guard guard(e.get_device_index());
  kernel_dtype(e);
  check_readable(e, e, "e");
  cuda::TailRowsParams p;
  p.rows = i64(rows, "rows");
  p.samples = static_cast<int>(rows.size(0));
  p.e = matrix(e);
  const Tensor e_sampled = piece_rows(e, p.samples, e.size(1));
  p.e_sampled = e_sampled.mutable_data_ptr();
  p.e_sampled_ld = e_sampled.stride(0);
  const Tensor u_sampled = piece_rows(e, u ? p.samples : 0, u ? u->size(1) : 0);
  if (u) {
    check_readable(*u, e, "u");
    p.u = matrix(*u);
    p.u_sampled = u_sampled.mutable_data_ptr();
    p.u_sampled_ld = u_sampled.stride(0);
  }
  p.lse = f32(lse, "lse");
  p.targets = i64(targets, "targets");
  p.weight = f32(weight, "weight");
  p.lift = static_cast<float>(lift);
  p.shard_size = shard_size;
  p.options = {0.0, 1.0, label_smoothing, ignore_index, vocab_start, vocab_total};
  const Tensor order = empty(e, {p.samples}, ScalarType::Int);
  const Tensor count = empty(e, {1}, ScalarType::Int);
  const Tensor records = empty_records(e, p.samples);
  p.order = i32(order, "order");
  p.count = i32(count, "count");
  p.records = static_cast<cuda::RowGradient*>(records.mutable_data_ptr());
  check_cuda(cuda::tail_rows(p, stream_of(e)), "tail_rows");
  return {columns(e_sampled, e.size(1)), u ? columns(u_sampled, u->size(1)) : u_sampled, order,
          count, records};
}

std::tuple<Tensor, Tensor, Tensor> tail_classes_cuda(Tensor scores, Tensor e, Tensor a, Tensor d,
                                                     Tensor mass, Tensor rows, Tensor units,
                                                     int64_t tilt, int64_t hot, double scale,
                                                     std::optional<double> uniform) {
  const Guard guard(scores.get_device_index());
  STD_TORCH_CHECK(
      scores.size(1) <= cuda::kTailClasses && tilt % 8 == 0 && hot % 8 == 0 && units.size(0) == 3,
      "at most 8 anchors, columns of the tilt and hot ids in eights, three units");
  cuda::TailClassesParams p;
  p.dtype = kernel_dtype(e);
  p.scores = f32(scores, "scores");
  p.anchors = static_cast<int>(scores.size(1));
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
  const Tensor factors = piece_rows(e, p.n, width);
  p.factors = static_cast<uint16_t*>(factors.mutable_data_ptr()) + tilt;
  p.ld = factors.stride(0);
  p.width = p.ld - tilt;
  const Tensor classes = empty(e, {p.n}, ScalarType::Long);
  p.classes = i64(classes, "classes");
  p.rows = i64(rows, "rows");
  p.samples = static_cast<int>(rows.size(0));
  const Tensor member = empty(e, {cuda::kTailClasses, p.samples}, e.scalar_type());
  p.member = member.mutable_data_ptr();
  check_cuda(cuda::tail_classes(p, stream_of(scores)), "tail_classes");
  return {columns(factors, width), classes, member};
}

// dtype's: that of like.
std::tuple<Tensor, Tensor> tail_shapes_cuda(Tensor sums, Tensor like, double shared,
                                            bool smoothing) {
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
  return {columns(shapes, p.vocab), totals};
}

std::tuple<Tensor, Tensor> tilt_ids_cuda(Tensor sums, Tensor totals, int64_t count) {
  const Guard guard(sums.get_device_index());
  STD_TORCH_CHECK(sums.size(0) == cuda::kTailClasses, "sums must have a row for each class");
  cuda::TiltIdsParams p;
  p.sums = f32(sums, "sums");
  p.totals = i64(totals, "totals");
  p.vocab = sums.size(1);
  p.groups = static_cast<int>(totals.size(0));
  p.count = static_cast<int>(count);
  const Tensor ids = empty(sums, {count}, ScalarType::Long);
  const Tensor first = empty(sums, {p.groups + 1}, ScalarType::Int);
  p.ids = i64(ids, "ids");
  p.first = i32(first, "first");
  check_cuda(cuda::tilt_ids(p, stream_of(sums)), "tilt_ids");
  return {ids, first};
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

void add_rows_cuda(Tensor out, Tensor ids, Tensor product, Tensor unit, Tensor like) {
  const Guard guard(out.get_device_index());
  STD_TORCH_CHECK(
      out.size(1) == product.size(1) && out.stride(1) == 1 && ids.size(0) <= product.size(0),
      "out and product must have the same columns, ids a row each of product");
  cuda::AddRowsParams p;
  p.product = f32(product, "product");
  p.ids = i64(ids, "ids");
  p.unit = f32(unit, "unit");
  p.count = ids.size(0);
  p.width = out.size(1);
  p.dtype = kernel_dtype(like);
  p.out_fp32 = is_fp32_beside(out, like, "out");
  p.out = out.mutable_data_ptr();
  p.out_ld = out.stride(0);
  check_cuda(cuda::add_rows(p, stream_of(out)), "add_rows");
}

}  // namespace
}  // namespace cce::torch_api

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) {
  m.impl("tail_rows", TORCH_BOX(&cce::torch_api::tail_rows_cuda));
  m.impl("tail_classes", TORCH_BOX(&cce::torch_api::tail_classes_cuda));
  m.impl("tail_shapes", TORCH_BOX(&cce::torch_api::tail_shapes_cuda));
  m.impl("tilt_ids", TORCH_BOX(&cce::torch_api::tilt_ids_cuda));
  m.impl("tilt_", TORCH_BOX(&cce::torch_api::tilt_cuda));
  m.impl("add_rows_", TORCH_BOX(&cce::torch_api::add_rows_cuda));
}
