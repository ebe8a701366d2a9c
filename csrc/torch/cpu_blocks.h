// What the CPU path's forward and backward share: PyTorch's matmul makes a block of logits from the valid rows and one chunk
// of the vocabulary, the row kernels of csrc/cpu fold it away. Rows whose target is ignored are left out before any matmul.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/linear_ce.h"
#include "torch/bridge.h"

namespace cce::torch_api {

// Without 512-bit bf16 instructions PyTorch's bf16 matmul is slower than converting a block and using fp32; its fp16
// matmul always is.
inline bool has_native_bf16() {
#if defined(__x86_64__)
  static const bool native = __builtin_cpu_supports("avx512bf16");
  return native;
#else
  return true;
#endif
}

// Logits up to which bf16 inputs are computed in fp32: it costs nothing there, and spares the rounding of partial sums.
inline constexpr int64_t kSmallCall = int64_t{1} << 20;

// The dtype that the matmuls run in.
inline ScalarType compute_type(const Inputs& in) {
  const ScalarType input = in.e.scalar_type();
  if (input == ScalarType::Half) return ScalarType::Float;
  if (input == ScalarType::BFloat16 && (!has_native_bf16() || in.n * in.v <= kSmallCall))
    return ScalarType::Float;
  return input;
}

// The valid rows of a call.
struct ValidRows {
  std::vector<int64_t> local_target;  // shard-local, -1 where another shard holds it
  Tensor index;                       // (count,) int64 row numbers
  int64_t count = 0;
  bool all = false;
};

inline ValidRows find_valid_rows(const Inputs& in) {
  ValidRows valid;
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  std::vector<int64_t> index;
  for (int64_t row = 0; row < in.n; ++row) {
    const auto kind = core::classify_target(targets[row], in.v, in.options);
    STD_TORCH_CHECK(kind != core::TargetKind::kInvalid, "targets[", row, "] = ", targets[row],
                    " is out of range: expected [0, ", in.options.vocab_total,
                    ") or ignore_index = ", in.options.ignore_index);
    if (kind == core::TargetKind::kIgnored) continue;
    const int64_t local = targets[row] - in.options.vocab_start;
    valid.local_target.push_back(kind == core::TargetKind::kHere ? local : -1);
    index.push_back(row);
  }
  valid.count = static_cast<int64_t>(index.size());
  valid.all = valid.count == in.n;
  valid.index = empty(in.e, {valid.count}, ScalarType::Long);
  std::copy(index.begin(), index.end(), valid.index.mutable_data_ptr<int64_t>());
  return valid;
}

// Rows [begin, begin + count) of the valid rows of t, in the compute dtype.
inline Tensor valid_block(const Tensor& t, const ValidRows& valid, int64_t begin, int64_t count,
                          ScalarType dtype) {
  return cast(valid.all ? rows(t, begin, count) : index_rows(t, rows(valid.index, begin, count)),
              dtype);
}

template <typename A>
struct Transform {
  Tensor bias;  // keeps the converted bias alive
  cpu::LogitTransform<A> value;

  explicit Transform(const Inputs& in) {
    if (in.bias) {
      bias = torch::stable::contiguous(cast(*in.bias, accumulate_type(in.e)));
      value.bias = bias.template const_data_ptr<A>();
    }
    value.logit_scale = static_cast<A>(in.options.logit_scale);
    value.softcap = static_cast<A>(in.options.softcap);
    value.inv_softcap = value.softcap == A(0) ? A(0) : A(1) / value.softcap;
  }
  cpu::LogitTransform<A> at(int64_t first_col) const {
    auto t = value;
    if (t.bias) t.bias += first_col;
    return t;
  }
};

// One vocabulary chunk of the classifier, in the compute dtype.
struct Chunk {
  Tensor c, lora_b;
  int64_t first = 0, cols = 0;

  Chunk(const Inputs& in, int64_t first_col, int64_t max_cols, ScalarType dtype)
      : first(first_col), cols(std::min(max_cols, in.v - first_col)) {
    c = cast(rows(in.c, first, cols), dtype);
    if (in.lora_b) lora_b = cast(rows(*in.lora_b, first, cols), dtype);
  }
};

// A logits buffer that is reused for every block, and its view as the row kernels want it.
template <typename Z>
struct LogitsBuffer {
  Tensor storage;
  Tensor view;  // (rows, cols) of the current block

  LogitsBuffer(const Inputs& in, int64_t max_rows, int64_t max_cols, ScalarType dtype)
      : storage(empty(in.e, {max_rows * max_cols}, dtype)) {}

  // view = E_block C_chunkᵀ + U_block B_chunkᵀ
  cpu::Block<Z> multiply(const Tensor& e, const std::optional<Tensor>& u, const Chunk& chunk) {
    const int64_t count = e.size(0);
    view = torch::stable::view(rows(storage, 0, count * chunk.cols), {count, chunk.cols});
    mm_out(view, e, transposed(chunk.c));
    if (u) cpu_addmm_out(view, *u, transposed(chunk.lora_b));
    return {static_cast<Z*>(view.mutable_data_ptr()), chunk.cols, chunk.cols, chunk.first};
  }
};

inline std::optional<Tensor> valid_u(const Inputs& in, const ValidRows& valid, int64_t begin,
                                     int64_t count, ScalarType dtype) {
  if (!in.u) return std::nullopt;
  return valid_block(*in.u, valid, begin, count, dtype);
}

// Calls body(Z{}, A{}) with the logits' storage type and the arithmetic type that the inputs ask for.
template <typename Body>
auto dispatch(const Inputs& in, Body&& body) {
  switch (compute_type(in)) {
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::BFloat16:
      return body(cpu::BF16{}, float{});
    default:
      STD_TORCH_CHECK(false, "e must be float64, float32, bfloat16 or float16 on a CPU");
  }
}

}  // namespace cce::torch_api
