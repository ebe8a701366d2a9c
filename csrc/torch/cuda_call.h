// What the CUDA ops share: op arguments to the launchers' parameters, workspaces from PyTorch's allocator.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

#include "cuda/backend.h"
#include "cuda/common/rows.h"
#include "cuda/device_info.h"
#include "torch/bridge.h"
#include "torch/stream.h"

namespace cce::torch_api {

using cuda::kGroupCols;
// Bytes of a classifier chunk that has to be copied to be readable by the kernels.
inline constexpr int64_t kPackBytes = int64_t{128} << 20;
// Bytes of (max, sum) partials that a call may take for the sake of an even load.
inline constexpr int64_t kPartialBytes = int64_t{12} << 20;

using Guard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t stream_of(const Tensor& t) { return current_stream(t.get_device_index()); }

// The data of a contiguous tensor of a known dtype.
template <typename T>
T* data(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), name,
                  " has another dtype than expected or is not contiguous");
  return static_cast<T*>(t.mutable_data_ptr());
}
inline float* f32(const Tensor& t, const char* name) {
  return data<float>(t, ScalarType::Float, name);
}
inline int32_t* i32(const Tensor& t, const char* name) {
  return data<int32_t>(t, ScalarType::Int, name);
}
inline int64_t* i64(const Tensor& t, const char* name) {
  return data<int64_t>(t, ScalarType::Long, name);
}
inline uint8_t* u8(const Tensor& t, const char* name) {
  return data<uint8_t>(t, ScalarType::Byte, name);
}

// Zeros of four bytes each on PyTorch's current stream; a fill by PyTorch's own op takes the host three times as long.
inline Tensor zeroed(const Tensor& like, int64_t size, ScalarType dtype) {
  Tensor t = empty(like, {size}, dtype);
  if (size > 0)
    check_cuda(cudaMemsetAsync(t.mutable_data_ptr(), 0, 4 * size, stream_of(like)), "zeros");
  return t;
}

// Room for so many records of four-byte numbers.
template <typename Record>
Tensor empty_records(const Tensor& like, int64_t count) {
  static_assert(sizeof(Record) % sizeof(int32_t) == 0, "whole numbers");
  return empty(like, {count, static_cast<int64_t>(sizeof(Record) / sizeof(int32_t))},
               ScalarType::Int);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cuda::Dtype kernel_dtype(const Tensor& e) {
  const ScalarType t = e.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::BFloat16 || t == ScalarType::Half,
                  "the CUDA kernels take bfloat16 or float16, e is neither; cast e and c, or call "
                  "cce_ext.linear_cross_entropy, which has a blocked path for other dtypes");
  return t == ScalarType::BFloat16 ? cuda::Dtype::kBFloat16 : cuda::Dtype::kHalf;
}

inline const cuda::Backend& backend() {
  const cuda::Choice choice = cuda::choose_backend();
  STD_TORCH_CHECK(
      choice.backend != nullptr, "no compiled CUDA backend can run here:\n", choice.reasons,
      "\nUse cce_ext.linear_cross_entropy, whose blocked path runs anywhere, or move to the CPU.");
  return *choice.backend;
}

// The kernels read rows of whole 16-byte pieces, which must not lie in one another.
inline bool has_pieces(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % 8 == 0 && t.stride(0) >= t.size(1) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}
// Whether a tensor of a user's can be read as it is: what lies beyond a row's last column may be anything.
inline bool is_readable(const Tensor& t) { return has_pieces(t) && t.size(1) % 8 == 0; }

// t itself where the kernels can read it in this dtype, else a copy with zeros up to the next multiple of 8 columns.
inline Tensor readable(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && is_readable(t)) return t;
  const int64_t cols = t.size(1), padded = ceil_div(cols, 8) * 8;
  Tensor copy =
      padded == cols ? empty(t, {t.size(0), padded}, dtype) : zeros(t, {t.size(0), padded}, dtype);
  Tensor inside = torch::stable::narrow(copy, 1, 0, cols);
  torch::stable::copy_(inside, t);
  return inside;
}

inline cuda::Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.size(0), t.size(1)};
}
inline cuda::StridedMatrix strided(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.size(1)};
}
inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Row order and count, see cuda/common/rows.h.
struct Order {
  Tensor rows, count;

  Order(const Inputs& in, cudaStream_t stream)
      : rows(empty(in.e, {in.n}, ScalarType::Int)),
        count(in.n == 0 ? zeroed(in.e, 1, ScalarType::Int) : empty(in.e, {1}, ScalarType::Int)) {
    if (in.n == 0) return;
    const size_t bytes = cuda::order_rows_workspace(in.n);
    Tensor workspace = empty(in.e, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    check_cuda(cuda::order_rows(in.targets.const_data_ptr<int64_t>(), in.n, in.options.ignore_index,
                                rows.mutable_data_ptr<int32_t>(), count.mutable_data_ptr<int32_t>(),
                                workspace.mutable_data_ptr(), bytes, stream),
               "order_rows");
  }
  // One that exists already.
  Order(Tensor row_order, Tensor row_count)
      : rows(std::move(row_order)), count(std::move(row_count)) {}
  cuda::RowOrder view() const {
    return {rows.const_data_ptr<int32_t>(), count.const_data_ptr<int32_t>()};
  }
};

// Column tiles that share one partial: a divisor of a group's tiles, as large as an even load of the multiprocessors
// allows. Blocks take units (row block x split) in turn, so the last round may be all but empty.
inline int choose_tiles_per_split(int64_t n, int64_t v, const cuda::Backend& backend) {
  const int whole = static_cast<int>(kGroupCols / backend.block_n());
  const int64_t tiles = ceil_div(v, backend.block_n());
  int best = whole;
  int64_t best_rounds = 0;  // in tiles
  for (int t = whole; t >= 1; --t) {
    if (whole % t != 0) continue;
    const int64_t splits = ceil_div(tiles, t);
    if (best_rounds && 8 * splits * n > kPartialBytes) break;
    const int64_t rounds = backend.forward_rounds(n, splits) * t;
    // A hundredth is worth smaller units, less is not.
    if (best_rounds && 100 * rounds >= 99 * best_rounds) continue;
    best = t;
    best_rounds = rounds;
  }
  return best;
}

// Partials of all splits of a call, and which of them a launch fills.
struct PartialBuffers {
  Tensor max_sum, logit_sum, weighted, argmax, capped;
  int64_t n = 0, splits = 0;
  int tiles_per_split = 1;

  PartialBuffers(const Inputs& in, const cuda::Backend& backend, bool metrics, bool training)
      : n(in.n), tiles_per_split(choose_tiles_per_split(in.n, in.v, backend)) {
    splits = ceil_div(in.v, int64_t{tiles_per_split} * backend.block_n());
    max_sum = empty(in.e, {splits, n, 2}, ScalarType::Float);
    if (in.options.label_smoothing != 0.0) logit_sum = empty(in.e, {splits, n}, ScalarType::Float);
    if (training && in.options.softcap != 0.0) capped = empty(in.e, {splits, n}, ScalarType::Float);
    if (metrics) {
      weighted = empty(in.e, {splits, n}, ScalarType::Float);
      argmax = empty(in.e, {splits, n}, ScalarType::Int);
    }
  }
  cuda::Partials from(int64_t split) const {
    const auto at = [&](const Tensor& t) { return t.defined() ? floats(t) + split * n : nullptr; };
    cuda::Partials p;
    p.max_sum = reinterpret_cast<float2*>(floats(max_sum)) + split * n;
    p.logit_sum = at(logit_sum);
    p.weighted = at(weighted);
    p.capped = at(capped);
    p.argmax = argmax.defined() ? argmax.mutable_data_ptr<int32_t>() + split * n : nullptr;
    return p;
  }
};

// Columns of the classifier that one launch takes: all of them, unless C or B must be copied first.
inline int64_t launch_cols(const Inputs& in) {
  const ScalarType dtype = in.e.scalar_type();
  int64_t bytes = is_readable(in.c) ? 0 : 2 * in.d;
  if (in.lora_b && !(in.lora_b->scalar_type() == dtype && is_readable(*in.lora_b)))
    bytes += 2 * in.r;
  if (bytes == 0) return in.v;
  return std::max<int64_t>(1, kPackBytes / bytes / kGroupCols) * kGroupCols;
}

// Room for a matrix's rows in the order, and the copy.
inline Tensor compacted(const Tensor& t, const Order& order, cudaStream_t stream) {
  const int64_t n = t.size(0), cols = t.size(1);
  Tensor copy = empty(t, {n, ceil_div(cols, 8) * 8}, t.scalar_type());
  cuda::Matrix to = matrix(copy);
  to.cols = cols;
  check_cuda(cuda::compact_rows(matrix(t), order.view(), n, to, stream), "compact_rows");
  return copy;
}

// compact: memory for a second E may be taken.
inline void fill_partials(const Inputs& in, const cuda::Backend& backend, const Order& order,
                          const Tensor& bias, const PartialBuffers& partials,
                          const cuda::Candidates& candidates, bool compact, cudaStream_t stream) {
  const ScalarType dtype = in.e.scalar_type();
  const Tensor e = readable(in.e, dtype);
  const Tensor u = in.u ? readable(*in.u, dtype) : Tensor();
  compact = compact && backend.wants_compact_rows;
  const Tensor e_compact = compact ? compacted(e, order, stream) : Tensor();
  const Tensor u_compact = compact && in.u ? compacted(u, order, stream) : Tensor();
  const Tensor pace = empty(in.e, {cuda::kPaceSteps}, ScalarType::Int);
  const int64_t step = launch_cols(in);
  for (int64_t first = 0; first < in.v; first += step) {
    const int64_t cols = std::min(step, in.v - first);
    const Tensor c = readable(rows(in.c, first, cols), dtype);
    const Tensor b = in.lora_b ? readable(rows(*in.lora_b, first, cols), dtype) : Tensor();
    cuda::ForwardParams p;
    p.head.dtype = kernel_dtype(in.e);
    p.head.e = matrix(e);
    p.head.c = matrix(c);
    if (in.u) p.head.u = matrix(u), p.head.lora_b = matrix(b);
    const auto as = [](const Tensor& t, cuda::Matrix like) {
      like.data = t.const_data_ptr();
      like.ld = t.stride(0);
      return like;
    };
    if (compact) p.head.e_compact = as(e_compact, p.head.e);
    if (compact && in.u) p.head.u_compact = as(u_compact, p.head.u);
    p.head.bias = bias.defined() ? floats(bias) + first : nullptr;
    p.head.first_col = first;
    p.head.order = order.view();
    p.head.options = in.options;
    p.partials = partials.from(first / (int64_t{partials.tiles_per_split} * backend.block_n()));
    p.candidates = candidates;
    p.n = in.n;
    p.tiles_per_split = partials.tiles_per_split;
    p.pace = i32(pace, "pace");
    check_cuda(backend.forward(p, stream), "linear_ce_forward");
  }
}

inline Tensor gather_target_logits(const Inputs& in, const Order& order, const Tensor& bias,
                                   cudaStream_t stream) {
  Tensor result = empty(in.e, {in.n}, ScalarType::Float);
  // A few rows of B alone are read: of the usual float32 adapter no copy is made.
  const bool wide_b = in.lora_b && in.lora_b->scalar_type() == ScalarType::Float;
  const Tensor b = !in.lora_b ? Tensor()
                   : wide_b   ? *in.lora_b
                              : cast(*in.lora_b, in.e.scalar_type());
  cuda::TargetLogitParams p;
  p.dtype = kernel_dtype(in.e);
  p.e = strided(in.e);
  p.c = strided(in.c);
  if (in.u) p.u = strided(*in.u), p.lora_b = strided(b);
  p.lora_b_fp32 = wide_b;
  p.bias = bias.defined() ? floats(bias) : nullptr;
  p.targets = in.targets.const_data_ptr<int64_t>();
  p.order = order.view();
  p.n = in.n;
  p.shard_size = in.v;
  p.options = in.options;
  p.target_logit = floats(result);
  check_cuda(cuda::target_logits(p, stream), "target_logits");
  return result;
}

inline Tensor fp32_bias(const std::optional<Tensor>& bias) {
  return bias ? torch::stable::contiguous(cast(*bias, ScalarType::Float)) : Tensor();
}

inline const float* fp32_vector(const std::optional<Tensor>& t, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), name,
                  " must be float32 and contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

// cuda::RowGradient of the rows in the order.
inline Tensor row_records(const std::optional<Tensor>& dnll, const std::optional<Tensor>& dlse,
                          const Tensor& lse, const Tensor& targets, const Tensor& row_order,
                          const Tensor& row_count, int64_t shard_size,
                          const core::LossOptions& options) {
  cuda::RowGradientParams p;
  p.dnll = fp32_vector(dnll, "dnll");
  p.dlse = fp32_vector(dlse, "dlse");
  p.lse = fp32_vector(lse, "lse");
  p.targets = i64(targets, "targets");
  p.order = {row_order.const_data_ptr<int32_t>(), row_count.const_data_ptr<int32_t>()};
  p.n = row_order.size(0);
  p.shard_size = shard_size;
  p.options = options;
  const Tensor out = empty_records<cuda::RowGradient>(lse, p.n);
  p.out = static_cast<cuda::RowGradient*>(out.mutable_data_ptr());
  check_cuda(cuda::row_gradients(p, stream_of(lse)), "row_gradients");
  return out;
}

// Whether out is float beside a 16-bit other.
inline bool is_fp32_beside(const Tensor& out, const Tensor& other, const char* name) {
  if (out.scalar_type() == ScalarType::Float) return true;
  STD_TORCH_CHECK(out.scalar_type() == other.scalar_type(), name,
                  " must be float32 or of the inputs' dtype");
  return false;
}

inline void check_readable(const Tensor& t, const Tensor& e, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == e.scalar_type() && has_pieces(t), name,
                  " must have e's dtype and rows that start at multiples of 16 bytes");
}

// A head whose matrices the kernels can read as they are.
inline cuda::Head readable_head(const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& u, const std::optional<Tensor>& lora_b,
                                const Tensor& row_order, const Tensor& row_count, double softcap,
                                double logit_scale, double label_smoothing) {
  check_readable(e, e, "e");
  check_readable(c, e, "c");
  cuda::Head head;
  head.dtype = kernel_dtype(e);
  head.e = matrix(e);
  head.c = matrix(c);
  if (u) {
    check_readable(*u, e, "u");
    head.u = matrix(*u);
  }
  if (lora_b) {
    check_readable(*lora_b, e, "lora_b");
    head.lora_b = matrix(*lora_b);
  }
  head.bias = fp32_vector(bias, "bias");
  head.order = {row_order.const_data_ptr<int32_t>(), row_count.const_data_ptr<int32_t>()};
  head.options.softcap = softcap;
  head.options.logit_scale = logit_scale;
  head.options.label_smoothing = label_smoothing;
  return head;
}

// Merges the partials into what linear_ce_forward returns.
inline ForwardResult finish(const Inputs& in, const Order& order, const PartialBuffers& partials,
                            const Tensor& target_logit, bool metrics, cudaStream_t stream) {
  const auto output = [&](bool wanted) {
    return empty(in.e, {wanted ? in.n : 0}, ScalarType::Float);
  };
  const bool smoothing = in.options.label_smoothing != 0.0;
  const Tensor nll = output(true), lse = output(true), logit_sum = output(smoothing);
  const Tensor max_logit = output(metrics), entropy = output(metrics);
  const Tensor argmax = empty(in.e, {metrics ? in.n : 0}, ScalarType::Long);
  cuda::FinishParams f;
  f.partials = partials.from(0);
  f.n = in.n;
  f.splits = static_cast<int>(partials.splits);
  f.order = order.view();
  f.options = in.options;
  f.target_logit = floats(target_logit);
  f.nll = floats(nll);
  f.lse = floats(lse);
  if (smoothing) f.logit_sum = floats(logit_sum);
  if (metrics) {
    f.max_logit = floats(max_logit);
    f.argmax = argmax.mutable_data_ptr<int64_t>();
    f.entropy = floats(entropy);
  }
  check_cuda(cuda::finish_rows(f, stream), "finish_rows");
  return {nll, lse, target_logit, logit_sum, max_logit, argmax, entropy};
}

}  // namespace cce::torch_api
